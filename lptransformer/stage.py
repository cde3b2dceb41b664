"""One stage as a module: its blocks (and the embedding, in the first), its head, its loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lptransformer import pieces
from lptransformer.errors import RunError
from lptransformer.family import Anatomy
from lptransformer.head import HEADS, PrivateHead
from lptransformer.partition import StagePlan


class Stage(nn.Module):
    """Consecutive blocks and the head that trains them.

    The body is a piece of the Hugging Face model (pieces.py); the head is None where the stage's gradient comes from
    the stage above.
    """

    def __init__(self, plan: StagePlan, body: nn.Module, head: PrivateHead | None) -> None:
        super().__init__()
        self.plan = plan
        self.body = body
        self.head = head

    def hidden_states(self, inputs: Tensor) -> Tensor:
        """input_ids [b, T] in the first stage, hidden states [b, T, H] in later ones, to hidden states [b, T, H]."""
        name = "input_ids" if self.plan.is_first else "inputs_embeds"
        return self.body(**{name: inputs}, use_cache=False).last_hidden_state

    def forward(self, inputs: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hidden states [b, T, H], scaled loss, and sum of the losses in nats over the labels [b, T].

        The losses are None in a stage without a head.
        """
        hidden_states = self.hidden_states(inputs)
        if self.head is None:
            return hidden_states, None, None
        loss, loss_sum = self.head(hidden_states, labels, scale)
        return hidden_states, loss, loss_sum


def make_stage(
    plan: StagePlan,
    config: Any,
    parts: Anatomy,
    *,
    seed: int | None,
    chunk_tokens: int,
    head_kind: str = "private",
    pretrained: str | Path | None = None,
) -> Stage:
    """A stage in fp32 on the CPU: new, or from the tensors it owns in the model folder `pretrained`.

    An auxiliary head of a pretrained model starts as a copy of the model's own norm and readout. With `seed` None the
    weights of a new stage are for the caller to fill in.
    """
    blocks = range(plan.first_block, plan.last_block + 1)
    if pretrained is None:
        piece = pieces.new_piece(config, parts, blocks, plan.is_first, plan.is_last, seed)
    else:
        piece = pieces.load_piece(pretrained, config, parts, blocks, plan.is_first, plan.is_last)
    if not plan.has_head:
        return Stage(plan, piece.base, None)
    if plan.is_last:
        norm, readout = piece.norm, piece.readout
    elif pretrained is None:
        norm, readout = pieces.new_head(config, parts, plan.last_block, seed)
    else:
        own = pieces.load_piece(pretrained, config, parts, range(0), False, True)
        norm, readout = own.norm, own.readout
    assert norm is not None and readout is not None
    return Stage(plan, piece.base, HEADS[head_kind](norm, readout, chunk_tokens))


def load_stage(
    plan: StagePlan,
    config: Any,
    parts: Anatomy,
    weights: Mapping[str, Tensor],
    *,
    chunk_tokens: int,
    head_kind: str = "private",
) -> Stage:
    """A stage in fp32 on the CPU, in evaluation mode, with the weights of a checkpoint (in any dtype).

    Raises RunError when they are not those of this stage.
    """
    stage = make_stage(plan, config, parts, seed=None, chunk_tokens=chunk_tokens, head_kind=head_kind)
    needed = {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}
    held = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(needed.keys() | held.keys()):
        if needed.get(name) != held.get(name):
            raise RunError(
                f"stage {plan.index}: its weights do not fit the model: {name} is {held.get(name, 'missing')} in the "
                f"checkpoint and {needed.get(name, 'unknown')} in the model (shapes)"
            )
    stage.load_state_dict(dict(weights))
    return stage.eval()
