"""One stage as a module: its blocks (and the embedding, in the first), its head, its loss.

The gradient does not stop here but where a stage hands over to the next: engine/executor.Executor.handed_over.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.pytorch_utils import Conv1D

from lptransformer.errors import OptionError, RunError
from lptransformer.methods.cost import TrainedWeights
from lptransformer.methods.gradient_flow import Duty
from lptransformer.methods.heads import HEADS, blocks_like
from lptransformer.methods.recomputing import KEPT, SELECTIVE, recomputed
from lptransformer.methods.stages import StagePlan
from lptransformer.models import adapters, hf_config, hf_parts
from lptransformer.models.head import (
    CROSS_ENTROPY,
    ROUTER,
    Copy,
    FittedMap,
    Head,
    LossBatch,
    LossTerm,
    Material,
    StageLoss,
    build_readout,
    make_read_only,
    placed,
)
from lptransformer.models.hf_parts import Anatomy, Passing
from lptransformer.models.router_loss import RouterLoss
from lptransformer.models.split import Piece, copied_piece, load_piece, new_head, new_head_blocks, new_piece

if TYPE_CHECKING:
    from lptransformer.models.blueprint import Blueprint

Pull = Callable[[Tensor], Tensor]
Pretrained = str | Path | Mapping[str, Tensor]  # a model folder, or the `state_dict()` of a whole model


class StageOutput(NamedTuple):
    """What a stage gives. A tuple, because DeepSpeed finds tensors in tuples, lists and dictionaries only.

    Hidden states [b, T, H]; the loss terms of its head and of its routers by name, empty without any. Where the head
    was split off, `loss_gradient` [b, T, H] is the gradient of its loss at the hidden states, for the caller to weigh.
    Where the inputs carry a gradient, `pull` takes a gradient at the hidden states and gives the one at the inputs,
    without gradients of weights; it can be called several times before the backward pass.
    """

    hidden_states: Tensor
    losses: dict[str, LossTerm]
    loss_gradient: Tensor | None = None
    pull: Pull | None = None

    @property
    def loss(self) -> Tensor | None:
        """The sum of the scaled loss terms; None where there are none."""
        return add(term.loss for term in self.losses.values())

    @property
    def nll_sum(self) -> Tensor | None:
        """The sum of the negative log-likelihoods of the labels, in nats; None without a head."""
        return self.losses[CROSS_ENTROPY].total if CROSS_ENTROPY in self.losses else None


def backward_loss(output: StageOutput, duty: Duty, above: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The scalar whose ordinary backward pass gives a stage's weights their gradient (and its inputs theirs).

    The stage's own loss, and the gradients at its hidden states [b, T, H] with their weights: those that come from
    `above`, and its own where the head was split off. They enter as a vector-Jacobian product.
    """
    weighed = list(above)
    if output.loss_gradient is not None and duty.loss_weight is not None:
        weighed.insert(0, (output.loss_gradient, duty.loss_weight))
    gradient = add(part if weight == 1.0 else part * weight for part, weight in weighed if weight != 0.0)
    product = None if gradient is None else (output.hidden_states * gradient).sum()
    total = add(term for term in (output.loss, product) if term is not None)
    assert total is not None, "a backward pass without a gradient"
    return total


def add(tensors: Iterable[Tensor]) -> Tensor | None:
    """The sum from left to right; None of nothing."""
    total = None
    for tensor in tensors:
        total = tensor if total is None else total + tensor
    return total


class Stage(nn.Module):
    """Consecutive blocks and the head that trains them.

    The body is a piece of the Hugging Face model (models/split.py); the head is None where the stage's gradient comes
    from the stage above. With a `router_loss` its mixtures of experts have a loss of their own in training.
    """

    def __init__(
        self, plan: StagePlan, body: nn.Module, head: Head | None, router_loss: RouterLoss | None = None
    ) -> None:
        super().__init__()
        self.plan = plan
        self.body = body
        self.head = head
        self.router_loss = router_loss

    def hidden_states(self, inputs: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """input_ids [b, T] in the first stage, hidden states [b, T, H] in later ones, to hidden states [b, T, H].

        `position_ids` as of LossBatch.
        """
        return self._run(inputs, position_ids).last_hidden_state

    def _run(self, inputs: Tensor, position_ids: Tensor | None) -> Any:
        name = "input_ids" if self.plan.is_first else "inputs_embeds"
        return self.body(**{name: inputs}, use_cache=False, **placed(position_ids))

    def forward(self, inputs: Tensor, batch: LossBatch, split: bool = False) -> StageOutput:
        """Inputs as of `hidden_states`. With `split` the loss is taken at a copy of the hidden states and reaches the
        head's weights alone."""
        with hf_parts.known_documents(batch.document_ids):
            ran = self._run(inputs, batch.position_ids)
        hidden_states, pull, gradient, losses = ran.last_hidden_state, None, None, {}
        if inputs.requires_grad:
            pull = partial(_pull, hidden_states, inputs)
            # DeepSpeed puts hooks on what a module gives out: pulls must not run through those.
            hidden_states = hidden_states.view_as(hidden_states)
        if self.head is not None:
            at = hidden_states.detach().requires_grad_() if split else hidden_states
            stage_loss: StageLoss = self.head
            losses = stage_loss(at, batch)
            if split:
                loss = add(term.loss for term in losses.values())
                assert loss is not None
                (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
        if self.router_loss is not None and torch.is_grad_enabled() and ran.router_logits:
            balance = self.router_loss(ran.router_logits)
            losses = losses | {ROUTER: LossTerm(balance * batch.share, balance.detach())}
        return StageOutput(hidden_states, losses, gradient, pull)


def _pull(hidden_states: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    (pulled,) = torch.autograd.grad(hidden_states, inputs, gradient, retain_graph=True)
    return pulled


def make_stage(
    plan: StagePlan, blueprint: Blueprint, *, seed: int | None, pretrained: Pretrained | None = None
) -> Stage:
    """A stage in fp32 on the CPU: new, or from the tensors it owns of the model `pretrained`.

    An auxiliary head is what the blueprint says; the last stage's head is the model's own. With `seed` None the weights
    of a new stage are for the caller to fill in.
    """
    piece = _pieces(blueprint, seed, pretrained)
    own = piece(range(plan.first_block, plan.last_block + 1), plan.is_first, plan.is_last)
    if not plan.has_head:
        return Stage(plan, own.base, None, own.router_loss)
    if not plan.is_last:
        fitted = HEADS[blueprint.head.kind].fitted
        init = blueprint.head.init or ("scratch" if pretrained is None and not fitted else "model")
        as_model = init == "model" and seed is not None  # without a seed the shapes are all that counts
        head = _auxiliary_head(plan.last_block, blueprint, seed, as_model, piece)
    else:
        head = own.head(blueprint.chunk_tokens, blueprint.parts.logit_rule)
    return Stage(plan, own.base, head, own.router_loss)


def empty_head(block: int, blueprint: Blueprint) -> Head:
    """The auxiliary head after `block`, whose weights are for the caller to fill in."""
    return _auxiliary_head(block, blueprint, None, False, _pieces(blueprint, None, None))


def _pieces(
    blueprint: Blueprint, seed: int | None, pretrained: Pretrained | None
) -> Callable[[range, bool, bool], Piece]:
    """What gives parts of the model by blocks, embedding and final norm and readout: new ones, or those of a model."""
    config, parts = hf_config.with_attention(blueprint.model_config, blueprint.attention), blueprint.parts

    def piece(blocks: range, embedding: bool, final: bool) -> Piece:
        if pretrained is None:
            return new_piece(config, parts, blocks, embedding, final, seed)
        if isinstance(pretrained, Mapping):
            return copied_piece(pretrained, config, parts, blocks, embedding, final)
        return load_piece(pretrained, config, parts, blocks, embedding, final)

    return piece


def _auxiliary_head(
    block: int,
    blueprint: Blueprint,
    seed: int | None,
    as_model: bool,
    piece: Callable[[range, bool, bool], Piece],
) -> Head:
    """The head after `block`, with the weights it starts from: new ones, or copies of the model's (`as_model`).

    `piece` gives parts of the model (blocks, embedding, final norm and readout). What follows other stages starts as a
    copy of what it follows. Raises OptionError where the options do not fit.
    """
    config = hf_config.with_attention(blueprint.model_config, blueprint.attention)
    parts, options = blueprint.parts, blueprint.head
    depth, decay = config.num_hidden_layers, options.ema_decay
    final = cache(lambda: piece(range(0), False, True))

    def model_maps() -> list[nn.Linear]:
        return [one for one in (final().projection, final().readout) if one is not None]

    made = new_head(config, parts, block, seed)
    norm = final().norm if as_model else made.norm
    assert norm is not None
    material = Material(
        hidden_size=parts.hidden_size,
        readout_width=parts.readout_width,
        vocab_size=parts.vocab_size,
        depth=depth,
        chunk_tokens=blueprint.chunk_tokens,
        rule=parts.logit_rule,
        as_model=as_model,
        new=made.linear,
        model_maps=model_maps,
    )
    read, down, copies, frozen = build_readout(options, material)
    fitted = HEADS[options.kind].fitted
    if options.blocks == 0:
        if fitted:
            norm = FittedMap(made.norm, parts.hidden_size, residual=False)
        return Head(norm, read, down=down, copies=copies, frozen=frozen)

    like = blocks_like(options, block, depth)
    if as_model or decay is not None:
        blocks = piece(like, False, False).base
    else:
        blocks = new_head_blocks(config, parts, block, like, seed)
    if fitted:
        lead = FittedMap(copy.deepcopy(made.norm), parts.hidden_size, residual=True)
        if not options.trains_blocks:
            frozen = (*frozen, *(f"blocks.{name}" for name in make_read_only(blocks)))
        return Head(norm, read, blocks=blocks, down=down, map=lead, frozen=frozen)
    averaged: list[Copy] = []
    if decay is not None:
        for name in make_read_only(blocks):
            index = int(name.removeprefix(f"{parts.blocks_in_base}.").partition(".")[0])
            averaged.append(Copy(f"head.blocks.{name}", f"body.{name}", index, decay))
    return Head(norm, read, blocks=blocks, down=down, copies=(*copies, *averaged))


def load_stage(plan: StagePlan, blueprint: Blueprint, weights: Mapping[str, Tensor]) -> Stage:
    """A stage in fp32 on the CPU, in evaluation mode, with the weights of a checkpoint (in any dtype).

    Raises RunError when they are not those of this stage: its parameters and its read-only copies.
    """
    stage = make_stage(plan, blueprint, seed=None)
    if blueprint.adapters is not None:
        weights = adapters.merged(weights, blueprint.adapters, blueprint.parts)
    needed = {name: tuple(tensor.shape) for name, tensor in stage.state_dict().items()}
    held = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(needed.keys() | held.keys()):
        if needed.get(name) != held.get(name):
            raise RunError(
                f"stage {plan.index}: its weights do not fit the model: {name} is {held.get(name, 'missing')} in the "
                f"checkpoint and {needed.get(name, 'unknown')} in the model (shapes)"
            )
    stage.load_state_dict(dict(weights))
    return stage.eval()


# ---------------------------------------------------------------------------------------------- what trains


def for_training(stage: Stage, blueprint: Blueprint) -> Stage:
    """The stage with what the run makes of it: one matrix for embedding and readout (`model.tie`), adapters (`lora`),
    frozen weights without a gradient, and blocks that compute their activations again."""
    parts, plan = blueprint.parts, stage.plan
    if blueprint.tied:
        assert stage.head is not None and plan.is_first and plan.is_last, "config/checks refuses it"
        embedding = stage.body.get_submodule(parts.token_embedding.removeprefix(f"{parts.base}."))
        assert isinstance(embedding, nn.Embedding)
        stage.head.readout.weight = embedding.weight
    if blueprint.adapters is not None:
        blocks = range(plan.first_block, plan.last_block + 1)
        adapters.add(stage.body, parts, blocks, blueprint.adapters, blueprint.seed)
    for name, weight in stage.named_parameters(remove_duplicate=False):
        whole_name = parts.whole_name(adapters.saved_name(name), plan.is_last)
        if not plan.trained or _frozen(whole_name, blueprint):
            weight.requires_grad_(False)
    if blueprint.activation_checkpointing != KEPT:
        for of_blocks in block_lists(stage, parts):
            _recompute(of_blocks, blueprint.activation_checkpointing)
    return stage


def block_lists(stage: Stage, parts: Anatomy) -> list[nn.Module]:
    """The model's list of blocks in the stage's body and in its head's extra blocks; of others nothing is in there."""
    bodies = [stage.body, *([stage.head.blocks] if stage.head is not None and stage.head.blocks is not None else [])]
    return [body.get_submodule(parts.blocks_in_base) for body in bodies]


def block_matrices(stage: Stage, parts: Anatomy) -> set[nn.Parameter]:
    """The weights [out, in] or [in, out] of the linear maps in the stage's blocks and in its head's extra blocks.

    Other tensors of two dimensions are no maps (Mamba's `A_log`, norms of single heads), and experts that lie in one
    tensor have three.
    """
    modules = (module for blocks in block_lists(stage, parts) for module in blocks.modules())
    weights = (one.weight for one in modules if isinstance(one, nn.Linear | Conv1D))
    return {weight for weight in weights if isinstance(weight, nn.Parameter)}


def trained_weights(blueprint: Blueprint) -> TrainedWeights:
    """How many weights train beside those that are frozen, from empty modules.

    Raises OptionError for a pattern that no weight has, and where nothing is left to train.
    """
    config, parts, objective = blueprint.model_config, blueprint.parts, blueprint.objective
    model = hf_config.empty_model(hf_config.model_class(config), config)
    tied = {f"{parts.lm_head}.weight", f"{parts.token_embedding}.weight"} if blueprint.tied else set()
    sizes = {name: weight.numel() for name, weight in model.named_parameters(remove_duplicate=False)}
    if (added := blueprint.adapters) is not None:
        for target in added.targets:
            sizes |= added.weights(target)
    names, trained = set(sizes), Counter[int | str]()
    for name, size in sizes.items():
        same = tied if name in tied else (name,)
        trained[_part(name, parts)] += size * (not any(_frozen(one, blueprint) for one in same))
    auxiliary = Counter[int]()
    for block in objective.heads[:-1]:
        with torch.device("meta"):
            head = empty_head(block, blueprint)
        for name, weight in head.named_parameters(prefix="head"):
            names.add(name)
            auxiliary[block] += weight.numel() * (not _frozen(name, blueprint))
    value = list(blueprint.freeze)
    for pattern in value:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = ", ".join(get_close_matches(pattern, sorted(names), n=3, cutoff=0.0))
            raise OptionError("train.freeze", value, f"no weight is called {pattern}; near it are {near}")
    found = TrainedWeights(
        embedding=trained[_EMBEDDING],
        blocks=tuple(trained[block] for block in range(objective.num_blocks)),
        head=trained[_HEAD],
        auxiliary={block: auxiliary[block] for block in objective.heads[:-1]},
    )
    reached = [count for block, count in enumerate(found.blocks) if block in objective.trained]
    if not any([*reached, found.head, *auxiliary.values(), 0 in objective.trained and found.embedding]):
        raise OptionError("train.freeze", value, "it leaves nothing to train; name fewer weights")
    return found


_EMBEDDING, _HEAD = "embedding", "head"


def _part(name: str, parts: Anatomy) -> int | str:
    """The part of the model that a weight belongs to: a block by its number, what is before the blocks, the head."""
    if name.startswith(f"{parts.blocks}."):
        return int(name.removeprefix(f"{parts.blocks}.").partition(".")[0])
    return _EMBEDDING if name.startswith(tuple(f"{before}." for before in parts.before)) else _HEAD


def _frozen(name: str, blueprint: Blueprint) -> bool:
    """Whether a weight of this name in the Hugging Face model, or in an auxiliary head, is frozen."""
    of_model = blueprint.adapters is not None and ".lora_" not in name and not name.startswith("head.")
    return of_model or any(fnmatchcase(name, pattern) for pattern in blueprint.freeze)


# ------------------------------------------------------------------------ what is computed again, and what is compiled

COMPILER = "inductor"

# What `selective` keeps: products with weights, and attention as one operation. The products of eager attention are as
# large as T x T, so they are computed again.
_KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
)


def _recompute(blocks: nn.Module, how: str) -> None:
    """Let those of a list of blocks that `train.activation_checkpointing` means compute their activations again.

    Their `forward` is replaced in place, so names of weights, hooks and types stay, and whatever calls it (a family,
    DeepSpeed) need not know. It is torch's own checkpoint without reentrance: a graph is there after the forward pass,
    and gradients can be taken from it more than once, as pulls do.
    """
    for index, block in enumerate(blocks.children()):
        if recomputed(how, index) and not isinstance(block, Passing):
            block.forward = partial(_again, block.forward, how == SELECTIVE)


def _again(forward: Callable[..., Any], selective: bool, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    # There are no random numbers in training (models/hf_config.for_training).
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if selective:
        options["context_fn"] = _contexts
    return checkpoint(forward, *args, **options, **kwargs)


def _contexts() -> tuple[Any, Any]:
    kept = _kept()
    keeping, giving = create_selective_checkpoint_contexts(kept)
    return keeping, _Giving(giving, kept)


def compile_blocks(stage: Stage, parts: Anatomy) -> None:
    """Let every block run through torch.compile, in place. Blocks of one kind share a graph for each shape."""
    # A pull and the backward pass run one graph backward twice: it must not give its buffers away in the first.
    functorch_config.donated_buffer = False
    for blocks in block_lists(stage, parts):
        for block in blocks.children():
            if not isinstance(block, Passing):
                block.compile(dynamic=False, backend=COMPILER)


class _Giving(TorchDispatchMode):
    """Torch's context, for any number of backward passes.

    It takes out what it gives, so it gets a copy of its table for each. And it gives the very tensors that it keeps, on
    which autograd would hang all that was computed again: blocks get other tensors of the same memory.
    """

    def __init__(self, giving: Any, kept: list[Any]) -> None:
        super().__init__()
        self._giving, self._kept = giving, kept

    def __enter__(self) -> Any:
        self._now = copy.copy(self._giving)
        self._now.storage = {key: copy.copy(entries) for key, entries in self._giving.storage.items()}
        self._now.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._now.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return tree_map_only(Tensor, Tensor.detach, out) if func in self._kept else out


def _kept() -> list[Any]:
    """Those of the operations that are there: of a package of its own only where that was imported."""
    found = []
    for name in _KEPT:
        namespace, _, operation = name.partition("::")
        packet = getattr(getattr(torch.ops, namespace), operation, None)
        if packet is not None:
            found.append(packet.default)
    return found
