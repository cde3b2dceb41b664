"""Floating-point operations and numbers of weights of the parts of a model. Plain arithmetic, no torch.

FLOPs are per token: two per weight, and the two products of causal attention (half of T positions on average). A
backward pass costs twice the forward pass, because every product has two factors with a gradient; a product with
read-only weights costs once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from lptransformer.methods.heads import HEADS, HeadOptions


@dataclass(frozen=True)
class ModelCosts:
    """The parts of a model with local updates: blocks, the last stage's head, and one auxiliary head as configured.

    Forward FLOPs per token of one block, of the LM head, and of an auxiliary head with its extra blocks; backward FLOPs
    per token of the auxiliary head. Numbers of weights: of the embedding, one block, the head with its norm; of an
    auxiliary head those that are trained (they have gradients and optimizer state), those of them that are its readout,
    and those that are read-only. `fewer` are the costs with 0, 1, ... extra blocks, as a fitted head has where few of
    the `num_blocks` of the model are above it (`after`).
    """

    block_flops: float
    head_flops: float
    auxiliary_flops: float
    auxiliary_backward_flops: float = 0.0
    embedding_parameters: int = 0
    block_parameters: int = 0
    head_parameters: int = 0
    auxiliary_parameters: int = 0
    auxiliary_copied: int = 0
    auxiliary_readout: int = 0
    num_blocks: int = 0
    fewer: tuple[ModelCosts, ...] = ()

    def after(self, block: int) -> ModelCosts:
        """With the auxiliary head as it is after a block."""
        above = self.num_blocks - 1 - block
        return self.fewer[above] if 0 <= above < len(self.fewer) else self

    def head_training_flops(self, is_last: bool) -> float:
        """FLOPs per token of a head's forward and backward pass: of the last one, or of an auxiliary one."""
        return 3 * self.head_flops if is_last else self.auxiliary_flops + self.auxiliary_backward_flops


def loss_positions(sequence_length: int, token_fraction: float) -> int:
    """How many of the `sequence_length` - 1 positions of a window that have a label the loss of a fraction sees."""
    return max(1, round(token_fraction * (sequence_length - 1)))


def model_costs(
    block_parameters: int,
    hidden_size: int,
    vocab_size: int,
    sequence_length: int,
    head: HeadOptions,
    *,
    readout_width: int | None = None,
    embedding_parameters: int = 0,
    norm_parameters: int = 0,
    num_blocks: int = 0,
) -> ModelCosts:
    """The costs of a model whose auxiliary heads are as `head` says.

    The readout takes rows of `readout_width` (None: of the hidden size). What stands beside it (norm, and where a
    family has them a projection and a bias) costs weights, but no FLOPs that count.
    """
    width, kind = readout_width or hidden_size, HEADS[head.kind]
    attention = 2 * sequence_length * hidden_size
    block_flops = 2.0 * block_parameters + attention
    full = width * vocab_size
    readout = kind.cost(head, width, vocab_size)
    # Without a fraction the last position of a window is computed too, and has no label.
    fraction = head.token_fraction
    share = 1.0 if fraction == 1.0 else loss_positions(sequence_length, fraction) / sequence_length
    block_backward = 2.0 * block_parameters * (1 + head.trains_blocks) + 2 * attention

    def with_blocks(blocks: int) -> ModelCosts:
        trained, copied = (blocks, 0) if head.trains_blocks else (0, blocks)
        map_flops, map_parameters = 0.0, 0
        if kind.fitted:  # before extra blocks the map sees all positions, and has a norm beside theirs
            map_flops = 2.0 * hidden_size**2 * (1.0 if blocks else share)
            map_parameters = hidden_size**2 + hidden_size + (norm_parameters if blocks else 0)
        backward = 2.0 * (2 * readout.multiplied - readout.copied) * share + blocks * block_backward + 2 * map_flops
        return ModelCosts(
            block_flops=block_flops,
            head_flops=2.0 * full,
            auxiliary_flops=2.0 * readout.multiplied * share + blocks * block_flops + map_flops,
            auxiliary_backward_flops=backward,
            embedding_parameters=embedding_parameters,
            block_parameters=block_parameters,
            head_parameters=norm_parameters + full,
            auxiliary_parameters=norm_parameters + readout.trained + trained * block_parameters + map_parameters,
            auxiliary_copied=readout.copied + copied * block_parameters,
            auxiliary_readout=readout.vocabulary,
        )

    fewer = tuple(with_blocks(blocks) for blocks in range(head.blocks)) if kind.fitted else ()
    return replace(with_blocks(head.blocks), num_blocks=num_blocks, fewer=fewer)
