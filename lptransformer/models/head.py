"""LM heads, auxiliary and final: from hidden states to the loss, and to logits.

A head is, in this order: extra Transformer blocks (none by default), a norm, for low rank a map to few dimensions, and
the readout to the vocabulary with the loss behind it. What of it is not trained is a buffer: what follows other stages'
weights (`Head.copies` lists those, and `Head.refresh` takes what came in), and what stays as it was (`Head.frozen`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lptransformer.errors import OptionError
from lptransformer.methods.cost import labels_seen
from lptransformer.methods.heads import HEADS, HeadOptions, LowRankOptions
from lptransformer.models import hf_parts
from lptransformer.models.cross_entropy import (
    IGNORE_INDEX,
    PLAIN,
    Kernel,
    LogitRule,
    chunked,
    chunked_cross_entropy,
    token_cross_entropy,
)
from lptransformer.models.seeds import unit_seed


class LossBatch(NamedTuple):
    """What a stage sees of a micro-batch beside its inputs.

    `labels` int64 [b, T], IGNORE_INDEX where there is none; `scale` is what the sum over the labels is multiplied by;
    of every row only the `positions` int64 [b, k] count (None: all). `share` is what a loss of the whole micro-batch is
    multiplied by. `position_ids` int64 [b, T] keep documents apart (None: 0 to T - 1, one document); `document_ids`,
    those of Batch (data/token_set), say where: None is one document in every window.
    """

    labels: Tensor
    scale: float
    positions: Tensor | None = None
    share: float = 1.0
    position_ids: Tensor | None = None
    document_ids: Tensor | None = None


class LossTerm(NamedTuple):
    """A scaled loss to call backward on, and the sum in nats over the labels, for reports; scalars."""

    loss: Tensor
    total: Tensor


class StageLoss(Protocol):
    """The loss of a stage: hidden states [b, T, H] of its last block to loss terms by name, which are added up."""

    def __call__(self, hidden_states: Tensor, batch: LossBatch) -> dict[str, LossTerm]: ...


CROSS_ENTROPY = "cross_entropy"  # the term of an LM head, a negative log-likelihood
ROUTER = "router"  # the term of a stage's mixtures of experts, a loss of the micro-batch
RIDGE = 1e-2  # the penalty of a fit, of the mean of the diagonal of its normal equations


@dataclass(frozen=True)
class Copy:
    """A tensor that follows another stage's weight instead of being trained.

    `target` is its name below this stage, `source` the name in the checkpoint of the stage that holds block
    `source_block`. With a decay above 0 it is a moving average: decay * average + (1 - decay) * received.
    """

    target: str
    source: str
    source_block: int
    decay: float = 0.0


class Readout(nn.Module):
    """The linear map to the vocabulary and the loss behind it.

    One module with one forward: ZeRO 3 gathers the weight of a module around its forward and backward, so the weight
    must not be used from outside.
    """

    kernel: Kernel = staticmethod(chunked)

    def __init__(self, weight: Tensor, chunk_tokens: int, rule: LogitRule = PLAIN, bias: Tensor | None = None) -> None:
        super().__init__()
        assert isinstance(weight, nn.Parameter)
        self.weight = weight  # [vocab_size, width of the rows]
        self.register_parameter("bias", bias)  # type: ignore[arg-type]  # [vocab_size]
        self.bias: Tensor | None
        self.chunk_tokens = chunk_tokens
        self.rule = rule

    @classmethod
    def of(cls, linear: nn.Linear, chunk_tokens: int, rule: LogitRule) -> Readout:
        """With the weights of this map."""
        return cls(linear.weight, chunk_tokens, rule, linear.bias)

    def forward(self, rows: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """rows [tokens, H] and labels [tokens] to (scaled loss, sum of the losses in nats)."""
        given = rows, self.weight, labels, scale, self.chunk_tokens, self.rule, self.bias
        return chunked_cross_entropy(*given, self.kernel)

    def logits(self, rows: Tensor) -> Tensor:
        """rows [..., H] to logits [..., V]; for evaluation, outside DeepSpeed."""
        return self.rule(F.linear(rows, self.weight, self.bias))

    def token_nlls(self, rows: Tensor, labels: Tensor) -> Tensor:
        """rows [tokens, H] and labels [tokens] to the loss of each, [tokens]; for evaluation, outside DeepSpeed."""
        return token_cross_entropy(rows, self.weight, labels, self.chunk_tokens, self.rule, self.bias)


class SharedReadout(nn.Module):
    """A read-only copy of the last stage's readout, and a trained temperature that multiplies the logits.

    The copy is a buffer: no gradient is computed for it and no optimizer knows it. The temperature is applied to the
    rows, which is the same before rounding and takes no pass over logits; the family's scale and soft cap come after.
    """

    kernel: Kernel = staticmethod(chunked)

    def __init__(self, readout: nn.Linear, chunk_tokens: int, rule: LogitRule = PLAIN) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", readout.weight.detach())  # [vocab_size, H]
        self.register_buffer("bias", None if readout.bias is None else readout.bias.detach())  # [vocab_size]
        self.temperature = nn.Parameter(torch.ones(1))  # DeepSpeed cannot broadcast a scalar
        self.chunk_tokens = chunk_tokens
        self.rule = rule

    def forward(self, rows: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See Readout.forward."""
        given = rows * self.temperature, self.weight, labels, scale, self.chunk_tokens, self.rule, self.bias
        return chunked_cross_entropy(*given, self.kernel)

    def logits(self, rows: Tensor) -> Tensor:
        """See Readout.logits."""
        return self.rule(F.linear(rows * self.temperature, self.weight, self.bias))

    def token_nlls(self, rows: Tensor, labels: Tensor) -> Tensor:
        """See Readout.token_nlls."""
        rows = rows * self.temperature
        return token_cross_entropy(rows, self.weight, labels, self.chunk_tokens, self.rule, self.bias)


class FittedMap(nn.Module):
    """Hidden states x [..., H] to W norm(x) + b, with `residual` to x + W norm(x) + b; W and b are 0 until fitted.

    From what one block of a pretrained model gives to what stands further up in it. engine/fitting.py has the data; a
    head of the kind `fitted` trains it on.
    """

    def __init__(self, norm: nn.Module, hidden_size: int, residual: bool) -> None:
        super().__init__()
        self.norm = norm
        self.linear = nn.utils.skip_init(nn.Linear, hidden_size, hidden_size, device=torch.get_default_device())
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
        self.residual = residual

    def forward(self, hidden_states: Tensor) -> Tensor:
        mapped: Tensor = self.linear(self.norm(hidden_states))
        return hidden_states + mapped if self.residual else mapped

    @torch.no_grad()
    def fit(self, hidden_states: Tensor, wanted: Tensor) -> None:
        """Let the map take hidden states [n, H] to those that are `wanted` [n, H], as near as can be."""
        outputs = wanted.double() - hidden_states.double() if self.residual else wanted
        weight, bias = ridge(self.norm(hidden_states), outputs)
        self.linear.weight.copy_(weight)
        self.linear.bias.copy_(bias)


@torch.no_grad()
def ridge(inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] and b [out] of outputs [n, out] = W inputs [n, in] + b by ridge regression, all in fp64.

    Centred, so that b is not penalised; W is, by RIDGE of the mean of the diagonal.
    """
    x, y = inputs.double(), outputs.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_((RIDGE * gram.diagonal().mean()).clamp(min=1e-30))  # of rows that are all alike it is 0
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight, y_mean - weight @ x_mean


class Head(nn.Module):
    """Norm and readout, with extra blocks before the norm and a map to few dimensions after it where they are given.

    The last stage's head holds the model's own norm and full readout; an auxiliary head is whatever the configuration
    says (2012.03837, section 3: an auxiliary network per chunk). `blocks` is a piece of the model (models/split.py)
    that owns nothing but blocks; with an `ema_decay` in `copies` they are read-only. A fitted head has a FittedMap
    before its blocks, `map`, or without blocks as its `norm`. `frozen` are the names below the head of what stays as it
    was.
    """

    def __init__(
        self,
        norm: nn.Module,
        readout: Readout | SharedReadout,
        *,
        blocks: nn.Module | None = None,
        down: nn.Linear | None = None,
        copies: Sequence[Copy] = (),
        map: FittedMap | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        # The order in which parameters are listed: map, blocks, norm, down, readout, temperature.
        self.map = map
        self.blocks = blocks
        self.norm = norm
        self.down = down
        self.readout = readout
        self.copies = tuple(copies)
        self.frozen = tuple(frozen)
        averaged = [copy.target for copy in self.copies if copy.decay > 0]
        if averaged:
            self.average = _Average({name: self._below(name) for name in averaged})

    def forward(self, hidden_states: Tensor, batch: LossBatch) -> dict[str, LossTerm]:
        """See StageLoss. Norm and readout see the positions that count and no others."""
        with hf_parts.known_documents(batch.document_ids):
            hidden_states, labels = self._through_blocks(hidden_states, batch.position_ids), batch.labels
        if batch.positions is not None:
            width = hidden_states.shape[-1]
            positions = batch.positions.unsqueeze(-1).expand(-1, -1, width)
            hidden_states = hidden_states.gather(1, positions)  # [b, k, H]
            labels = labels.gather(1, batch.positions)
        rows = self._rows(hidden_states).flatten(0, 1)
        return {CROSS_ENTROPY: LossTerm(*self.readout(rows, labels.flatten(), batch.scale))}

    def logits(self, hidden_states: Tensor) -> Tensor:
        """hidden_states [b, T, H] to logits [b, T, V]; for evaluation, outside DeepSpeed."""
        return self.readout.logits(self._rows(self._through_blocks(hidden_states)))

    def token_nlls(self, hidden_states: Tensor, labels: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """hidden_states [b, T, H] and labels [b, T] to the negative log-likelihood of each label in nats, [b, T]."""
        rows = self._rows(self._through_blocks(hidden_states, position_ids)).flatten(0, 1)
        return self.readout.token_nlls(rows, labels.flatten()).view(labels.shape)

    @torch.no_grad()
    def refresh(self, received: Mapping[str, Tensor]) -> None:
        """Take new values for read-only copies, by target, in any dtype; their sources' weights as of some update."""
        by_target = {copy.target: copy for copy in self.copies}
        for target, tensor in received.items():
            decay, held = by_target[target].decay, self._below(target)
            if decay > 0:
                average = self.average.of(target)
                received_here = tensor.to(average, non_blocking=True)
                tensor = average.copy_(decay * average + (1 - decay) * received_here)
            held.copy_(tensor, non_blocking=True)

    @torch.no_grad()
    def begin_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """Let read-only copies, by target, and their averages begin with these."""
        for copy in self.copies:
            if copy.decay > 0:
                self.average.of(copy.target).copy_(tensors[copy.target])
            self._below(copy.target).copy_(tensors[copy.target])

    def cast_copies(self, dtype: torch.dtype) -> None:
        """Bring what is read-only to the dtype of the weights beside it; averages stay precise.

        DeepSpeed casts parameters and leaves buffers as they are.
        """
        for target in (*(copy.target for copy in self.copies), *self.frozen):
            self._put(target, self._below(target).to(dtype))

    def share_frozen(self, held: dict[str, Tensor], device: torch.device) -> None:
        """Use the frozen tensors that another head of this process has brought into `held`, on the device, and bring
        the others."""
        for name in self.frozen:
            if name not in held:
                held[name] = self._below(name).to(device)
            self._put(name, held[name])

    @property
    def fitted(self) -> FittedMap | None:
        """The map that is fitted to a pretrained model, of a head that has one."""
        return self.norm if isinstance(self.norm, FittedMap) else self.map

    def _put(self, target: str, tensor: Tensor) -> None:
        owner, _, name = target.removeprefix("head.").rpartition(".")
        setattr(self.get_submodule(owner), name, tensor)

    def _through_blocks(self, hidden_states: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if self.map is not None:
            hidden_states = self.map(hidden_states)
        if self.blocks is None:
            return hidden_states
        return self.blocks(inputs_embeds=hidden_states, use_cache=False, **placed(position_ids)).last_hidden_state

    def _rows(self, hidden_states: Tensor) -> Tensor:
        rows = self.norm(hidden_states)
        return rows if self.down is None else self.down(rows)

    def _below(self, target: str) -> Tensor:
        """The read-only tensor of a name below the stage."""
        return self.get_buffer(target.removeprefix("head."))


def placed(position_ids: Tensor | None) -> dict[str, Tensor]:
    """What a base model is called with where documents are kept apart; not every family takes None for it."""
    return {} if position_ids is None else {"position_ids": position_ids}


class _Average(nn.Module):
    """Moving averages, in fp32 or more whatever the dtype of the module around them: bf16 would lose the updates.

    They are buffers under the names of what they average (`head.average.h.3...` for `head.blocks.h.3...`), so that a
    checkpoint keeps them.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for target, tensor in tensors.items():
            *path, name = self._name(target).split(".")
            module: nn.Module = self
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_buffer(name, tensor.detach().clone())

    def of(self, target: str) -> Tensor:
        return self.get_buffer(self._name(target))

    @staticmethod
    def _name(target: str) -> str:
        return target.removeprefix("head.blocks.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What `to`, `bfloat16` and the like go through."""

        def keep_precise(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            precise = torch.promote_types(moved.dtype, torch.float32)
            return moved if moved.dtype == precise else tensor.to(moved.device, precise)

        return super()._apply(keep_precise, recurse)


def make_read_only(module: nn.Module) -> list[str]:
    """Turn all parameters of a module into buffers, which no optimizer and no ZeRO touches; their names."""
    names = [name for name, _ in module.named_parameters()]
    for name in names:
        parent, _, own = name.rpartition(".")
        owner = module.get_submodule(parent)
        weight = owner.get_parameter(own).detach()
        del owner._parameters[own]
        owner.register_buffer(own, weight)
    return names


# ---------------------------------------------------------------------------------------------------- builders


@dataclass(frozen=True)
class Material:
    """What a builder of a readout works with.

    `new` takes shapes (in, out) and gives new linear maps (HeadMaker.linear in models/split.py). `model_maps` are the
    model's own behind its final norm, with the weights that training starts from: the readout, and before it the
    projection of a family whose readout is narrower (`readout_width`) than its hidden states. With `as_model` the head
    starts from those instead of new ones. `depth` is the number of the model's blocks.
    """

    hidden_size: int
    readout_width: int
    vocab_size: int
    depth: int
    chunk_tokens: int
    rule: LogitRule
    as_model: bool
    new: Callable[..., list[nn.Linear]]
    model_maps: Callable[[], list[nn.Linear]]

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Of the model's own maps, (in, out)."""
        projected = [(self.hidden_size, self.readout_width)] if self.readout_width != self.hidden_size else []
        return [*projected, (self.readout_width, self.vocab_size)]

    def whole_readout(self) -> Tensor:
        """The product of the model's own maps, [V, H]."""
        *projection, readout = self.model_maps()
        return readout.weight @ projection[0].weight if projection else readout.weight


class BuiltReadout(NamedTuple):
    """A readout, the map before it where there is one; what of them are copies of other stages' weights, and the names
    below the head of what stays as it was."""

    readout: Readout | SharedReadout
    down: nn.Linear | None = None
    copies: tuple[Copy, ...] = ()
    frozen: tuple[str, ...] = ()


class BuildReadout(Protocol):
    """What a row of HEADS names as its builder."""

    def __call__(self, options: Any, material: Material) -> BuiltReadout: ...


def build_readout(options: HeadOptions, material: Material) -> BuiltReadout:
    """The readout of an auxiliary head, by the builder that its kind names."""
    module, _, function = HEADS[options.kind].builder.partition(":")
    build: BuildReadout = getattr(import_module(module), function)
    return build(options, material)


def private(options: HeadOptions, material: Material) -> BuiltReadout:
    """A readout of the head's own."""
    *down, readout = material.model_maps() if material.as_model else material.new(*material.shapes)
    return BuiltReadout(Readout.of(readout, material.chunk_tokens, material.rule), down[0] if down else None)


def shared(options: HeadOptions, material: Material) -> BuiltReadout:
    """A copy of the last readout (2609.35440)."""
    *down, own = material.model_maps()
    if down and not material.as_model:
        down = material.new(*material.shapes[:-1])
    readout = SharedReadout(own, material.chunk_tokens, material.rule)
    names = [f"head.readout.{name}" for name, _ in readout.named_buffers()]
    copies = tuple(Copy(name, name, material.depth - 1) for name in names)
    return BuiltReadout(readout, down[0] if down else None, copies)


def frozen(options: HeadOptions, material: Material) -> BuiltReadout:
    """The model's readout as it was before training."""
    *down, own = material.model_maps()
    readout = Readout.of(own, material.chunk_tokens, material.rule)
    names = [f"readout.{name}" for name in make_read_only(readout)]
    names += [f"down.{name}" for projection in down for name in make_read_only(projection)]
    return BuiltReadout(readout, down[0] if down else None, frozen=tuple(names))


def low_rank(options: LowRankOptions, material: Material) -> BuiltReadout:
    """A map to few dimensions and a readout from there. Raises OptionError for a rank that no readout has."""
    rank, shape = options.rank, (material.vocab_size, material.hidden_size)
    if rank > min(shape):
        problem = f"a readout of {shape[0]} x {shape[1]} has at most rank {min(shape)}"
        raise OptionError("head.rank", rank, problem)
    down, readout = material.new((material.hidden_size, rank), (rank, material.vocab_size))
    if material.as_model:
        factors = factorised(material.whole_readout(), rank)
        down.weight, readout.weight = (nn.Parameter(factor) for factor in factors)
        readout.bias = material.model_maps()[-1].bias
    return BuiltReadout(Readout.of(readout, material.chunk_tokens, material.rule), down)


def factorised(readout: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The matrices [rank, H] and [V, rank] whose product is nearest to `readout` [V, H]: its truncated SVD.

    The first has the right singular vectors as rows, the second the left ones times the singular values. Taken from
    the eigenvectors of [H, H], which is much faster than an SVD of [V, H].
    """
    exact = readout.detach().double()
    down = torch.linalg.eigh(exact.T @ exact).eigenvectors[:, -rank:].T  # eigenvalues ascend
    return down.to(readout.dtype).contiguous(), (exact @ down.T).to(readout.dtype)


def token_positions(
    seed: int,
    block: int,
    micro_batch: int,
    rows: int,
    sequence_length: int,
    fraction: float,
    labels: Tensor | None = None,
) -> Tensor:
    """The positions whose loss the auxiliary head after `block` sees: int64 [rows, k], ascending in every row.

    They are drawn among those with a label: all but the last one, or as `labels` [rows, T] say. Of a row with n labels
    they are methods/cost.labels_seen(n) many, and the last position, which has none, fills up to k. A pure function of
    its arguments: `micro_batch` is counted from the start of the run.
    """
    generator = torch.Generator().manual_seed(unit_seed(seed, f"head {block} positions {micro_batch}"))
    drawn = torch.rand(rows, sequence_length - 1, generator=generator, dtype=torch.float64)
    counts = [sequence_length - 1] * rows
    if labels is not None:
        labelled = labels[:, :-1] != IGNORE_INDEX
        drawn, counts = drawn.masked_fill(~labelled, 2.0), labelled.sum(1).tolist()
    seen = [labels_seen(count, fraction) for count in counts]
    chosen = drawn.argsort(dim=1, stable=True)[:, : max(1, *seen)]
    beyond = torch.arange(chosen.shape[1]) >= torch.tensor(seen).unsqueeze(1)
    return chosen.masked_fill(beyond, sequence_length - 1).sort(dim=1).values
