"""One stage as a module: its blocks (and the embedding, in the first), its head, its loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lptransformer import pieces
from lptransformer.config_sections import HeadSection
from lptransformer.errors import ConfigError, RunError
from lptransformer.family import Anatomy
from lptransformer.head import Copy, Head, Readout, SharedReadout, factorised, make_read_only
from lptransformer.partition import StagePlan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}  # train.dtype
Pull = Callable[[Tensor], Tensor]
Output = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Pull | None]


class Stage(nn.Module):
    """Consecutive blocks and the head that trains them.

    The body is a piece of the Hugging Face model (pieces.py); the head is None where the stage's gradient comes from
    the stage above.
    """

    def __init__(self, plan: StagePlan, body: nn.Module, head: Head | None) -> None:
        super().__init__()
        self.plan = plan
        self.body = body
        self.head = head

    def hidden_states(self, inputs: Tensor) -> Tensor:
        """input_ids [b, T] in the first stage, hidden states [b, T, H] in later ones, to hidden states [b, T, H]."""
        name = "input_ids" if self.plan.is_first else "inputs_embeds"
        return self.body(**{name: inputs}, use_cache=False).last_hidden_state

    def forward(
        self, inputs: Tensor, labels: Tensor, scale: float, positions: Tensor | None = None, split: bool = False
    ) -> Output:
        """Hidden states [b, T, H]; scaled loss; sum of the losses in nats over the labels [b, T]; split; pull.

        The losses are None in a stage without a head. `positions` [b, k] are those whose loss counts (None: all).
        With `split` the loss is taken at a copy of the hidden states and reaches the head's weights alone; the fourth
        output is its gradient at the hidden states, for the caller to weigh. The fifth, where the inputs carry a
        gradient, takes a gradient at the hidden states and gives the one at the inputs, without gradients of weights;
        it can be called several times before the backward pass.
        """
        hidden_states = self.hidden_states(inputs)
        pull, gradient, loss, loss_sum = None, None, None, None
        if inputs.requires_grad:
            pull = partial(_pull, hidden_states, inputs)
            # DeepSpeed puts hooks on what a module gives out: pulls must not run through those.
            hidden_states = hidden_states.view_as(hidden_states)
        if self.head is not None:
            at = hidden_states.detach().requires_grad_() if split else hidden_states
            loss, loss_sum = self.head(at, labels, scale, positions)
            if split:
                (gradient,) = torch.autograd.grad(loss, at, retain_graph=True)
        return hidden_states, loss, loss_sum, gradient, pull


def _pull(hidden_states: Tensor, inputs: Tensor, gradient: Tensor) -> Tensor:
    (pulled,) = torch.autograd.grad(hidden_states, inputs, gradient, retain_graph=True)
    return pulled


def make_stage(
    plan: StagePlan,
    config: Any,
    parts: Anatomy,
    *,
    seed: int | None,
    head: HeadSection,
    pretrained: str | Path | None = None,
) -> Stage:
    """A stage in fp32 on the CPU: new, or from the tensors it owns in the model folder `pretrained`.

    `head` says what an auxiliary head is; the last stage's head is the model's own. With `seed` None the weights of a
    new stage are for the caller to fill in.
    """
    blocks = range(plan.first_block, plan.last_block + 1)
    piece = _piece(config, parts, blocks, plan.is_first, plan.is_last, seed, pretrained)
    if not plan.has_head:
        return Stage(plan, piece.base, None)
    if not plan.is_last:
        return Stage(plan, piece.base, _auxiliary_head(plan.last_block, config, parts, seed, head, pretrained))
    assert piece.norm is not None and piece.readout is not None
    readout = Readout(piece.readout.weight, head.chunk_tokens, parts.logit_rule)
    return Stage(plan, piece.base, Head(piece.norm, readout))


def _piece(
    config: Any,
    parts: Anatomy,
    blocks: range,
    embedding: bool,
    final: bool,
    seed: int | None,
    pretrained: str | Path | None,
) -> pieces.Piece:
    if pretrained is None:
        return pieces.new_piece(config, parts, blocks, embedding, final, seed)
    return pieces.load_piece(pretrained, config, parts, blocks, embedding, final)


def _auxiliary_head(
    block: int, config: Any, parts: Anatomy, seed: int | None, options: HeadSection, pretrained: str | Path | None
) -> Head:
    """The head after `block`, with the weights it starts from: new ones, or copies of the model's.

    What follows other stages starts as a copy of what it follows. Raises ConfigError for a rank that no readout has.
    """
    depth, shape = config.num_hidden_layers, (parts.vocab_size, parts.hidden_size)
    shared, decay = options.kind == "shared", options.ema_decay
    rank = options.rank if options.kind == "low_rank" else None
    if rank is not None and rank > min(shape):
        raise ConfigError(f"head.rank is {rank}: a readout of {shape[0]} x {shape[1]} has at most rank {min(shape)}")
    init = options.init or ("scratch" if pretrained is None else "model")
    as_model = init == "model" and seed is not None  # without a seed the shapes are all that counts

    norm, down, readout = pieces.new_head(config, parts, block, seed, rank)
    if as_model or shared:
        own = _piece(config, parts, range(0), False, True, seed, pretrained)
        assert own.norm is not None and own.readout is not None
        norm = own.norm if as_model else norm
        if down is None:
            readout = own.readout
        else:
            factors = factorised(own.readout.weight, down.out_features)
            down.weight, readout.weight = (nn.Parameter(factor) for factor in factors)
    of_kind = SharedReadout if shared else Readout
    read = of_kind(readout.weight, options.chunk_tokens, parts.logit_rule)
    copies = [Copy("head.readout.weight", "head.readout.weight", depth - 1)] if shared else []
    if options.blocks == 0:
        return Head(norm, read, down=down, copies=copies)

    # Where fewer blocks follow, the model's last: beyond its depth the library knows no kind of block.
    start = min(block + 1, depth - options.blocks)
    like = range(start, start + options.blocks)
    if as_model or decay is not None:
        blocks = _piece(config, parts, like, False, False, seed, pretrained).base
    else:
        blocks = pieces.new_head_blocks(config, parts, block, like, seed)
    if decay is not None:
        for name in make_read_only(blocks):
            index = int(name.removeprefix(f"{parts.blocks_in_base}.").partition(".")[0])
            copies.append(Copy(f"head.blocks.{name}", f"body.{name}", index, decay))
    return Head(norm, read, blocks=blocks, down=down, copies=copies)


def load_stage(
    plan: StagePlan, config: Any, parts: Anatomy, weights: Mapping[str, Tensor], *, head: HeadSection
) -> Stage:
    """A stage in fp32 on the CPU, in evaluation mode, with the weights of a checkpoint (in any dtype).

    Raises RunError when they are not those of this stage: its parameters and its read-only copies.
    """
    stage = make_stage(plan, config, parts, seed=None, head=head)
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
