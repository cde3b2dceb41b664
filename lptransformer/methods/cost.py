"""Floating-point operations and numbers of weights of the parts of a model. Plain arithmetic, no torch.

FLOPs are per token: two per weight, and the two products of causal attention (half of T positions on average). A
backward pass costs twice the forward pass, because every product has two factors with a gradient; a product with
read-only weights costs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lptransformer.methods.heads import HEADS, HeadOptions


@dataclass(frozen=True)
class TrainedWeights:
    """How many weights train where some are frozen: of the embedding, of every block, of the model's head (norm and
    readout), and of the auxiliary head behind a block."""

    embedding: int
    blocks: tuple[int, ...]
    head: int
    auxiliary: Mapping[int, int]


@dataclass(frozen=True)
class ModelCosts:
    """The parts of a model with local updates: blocks, the last stage's head, and one auxiliary head as configured.

    Forward FLOPs per token of one block, of the LM head, and of an auxiliary head with its extra blocks; backward FLOPs
    per token of the auxiliary head. Numbers of weights: of the embedding, one block, the head with its norm; of an
    auxiliary head those that are trained (they have gradients and optimizer state), those of them that are its readout,
    and those that are read-only. `trained` says how many of all train (None: all). `tied_parameters` are those of the
    readout that are the embedding's too, in a stage that holds both. `fewer` are the costs with 0, 1, ... extra blocks,
    as a fitted head has where few of the `num_blocks` of the model are above it (`after`).
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
    tied_parameters: int = 0
    trained: TrainedWeights | None = None
    num_blocks: int = 0
    fewer: tuple[ModelCosts, ...] = ()

    def after(self, block: int) -> ModelCosts:
        """With the auxiliary head as it is after a block."""
        above, trained = self.num_blocks - 1 - block, self.trained
        costs = self.fewer[above] if 0 <= above < len(self.fewer) else self
        if trained is None or block not in trained.auxiliary:
            return costs
        return replace(costs, trained=replace(trained, auxiliary={block: trained.auxiliary[block]}))

    def head_training_flops(self, is_last: bool) -> float:
        """FLOPs per token of a head's forward and backward pass: of the last one, or of an auxiliary one (the mean,
        where not the same is frozen in all of them)."""
        if self.trained is None:
            return 3 * self.head_flops if is_last else self.auxiliary_flops + self.auxiliary_backward_flops
        if is_last:  # the norm costs nothing that counts
            return (2 + (self.trained.head >= self.head_flops / 2)) * self.head_flops
        of_heads = self.trained.auxiliary.values()
        frozen = self.auxiliary_parameters - sum(of_heads) / max(1, len(of_heads))
        return self.auxiliary_flops + max(0.0, self.auxiliary_backward_flops - 2 * frozen)

    def trained_in_head(self, block: int, is_last: bool) -> int:
        """How many weights of the head after a block train; of an exit that the run does not have, all."""
        if self.trained is None:
            return self.head_parameters if is_last else self.auxiliary_parameters
        return self.trained.head if is_last else self.trained.auxiliary.get(block, self.auxiliary_parameters)

    def trains(self, first: int, last: int) -> bool:
        """Whether a weight of the blocks `first` to `last` trains; the embedding belongs to the first block."""
        if self.trained is None or (first == 0 and self.trained.embedding > 0):
            return first <= last
        return any(self.trained.blocks[first : last + 1])

    def backward_flops(self, first: int, last: int, down: bool) -> float:
        """FLOPs per token of the backward pass through the blocks `first` to `last`: as much as forward for the
        gradients of their weights, as much for those at their inputs, down to the first weight that trains, or, where
        the gradient goes on `down`, all the way."""
        if self.trained is None:
            return 2 * (last - first + 1) * self.block_flops
        blocks = range(first, last + 1)
        weights = sum(self.trained.blocks[block] / self.block_parameters for block in blocks)
        inputs = sum(down or self.trains(first, block) for block in blocks)
        return (weights + inputs) * self.block_flops


def loss_positions(sequence_length: int, token_fraction: float) -> int:
    """How many of the `sequence_length` - 1 labels of a full window the loss of a fraction sees."""
    return labels_seen(sequence_length - 1, token_fraction)


def labels_seen(labels: int, token_fraction: float) -> int:
    """How many of a row's labels the loss of a fraction sees: one at least, where there is one."""
    return min(labels, max(1, round(token_fraction * labels)))


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
    tied: bool = False,
    trained: TrainedWeights | None = None,
    num_blocks: int = 0,
) -> ModelCosts:
    """The costs of a model whose auxiliary heads are as `head` says.

    With `tied` a stage that holds embedding and readout has one matrix for both. The readout takes rows of
    `readout_width` (None: of the hidden size). What stands beside it (norm, and where a family has them a projection
    and a bias) costs weights, but no FLOPs that count.
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
        own, copied = (blocks, 0) if head.trains_blocks else (0, blocks)
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
            auxiliary_parameters=norm_parameters + readout.trained + own * block_parameters + map_parameters,
            auxiliary_copied=readout.copied + copied * block_parameters,
            auxiliary_readout=readout.vocabulary,
            tied_parameters=full if tied else 0,
            trained=trained,
        )

    fewer = tuple(with_blocks(blocks) for blocks in range(head.blocks)) if kind.fitted else ()
    return replace(with_blocks(head.blocks), num_blocks=num_blocks, fewer=fewer)
