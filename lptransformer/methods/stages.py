"""Where the blocks go: from the spans of an objective to stages, and from stages to pipeline ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lptransformer.errors import ConfigError
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.objectives import Objective
from lptransformer.methods.spans import Phase


@dataclass(frozen=True)
class StagePlan:
    """One stage: consecutive blocks between two cuts, on one pipeline rank.

    A stage that is not `trained` stays as it was initialised: it has no optimizer, and a head only where weights are
    frozen. It hands gradients down to stages below it that train.
    """

    index: int
    first_block: int
    last_block: int
    pipeline_rank: int
    has_head: bool
    is_first: bool
    is_last: bool
    trained: bool

    @property
    def num_blocks(self) -> int:
        return self.last_block - self.first_block + 1


def rank_sizes(objective: Objective, pipeline: int, costs: ModelCosts) -> list[int]:
    """Blocks per pipeline rank: fewest gradients across borders, then the smallest cost of the costliest rank.

    Heads count; blocks that are not trained cost a third. Dynamic programming over cuts between blocks; the pair
    (gradients across borders, greatest cost) is compared in that order, and both parts only grow with the prefix, so
    the best prefix is part of the best whole.

    Raises ConfigError when there are more pipeline ranks than blocks.
    """
    num_blocks, heads, trained = objective.num_blocks, objective.heads, objective.trained
    if pipeline > num_blocks:
        raise ConfigError(f"parallel.pipeline is {pipeline}: a model of {num_blocks} blocks takes 1 to {num_blocks}")
    crossing = [sum(_gradients_across(phase, block) for phase in objective.phases) for block in range(num_blocks)]
    cost_up_to = [0.0]
    for block in range(num_blocks):
        reaching = [span for phase in objective.phases for span in phase.spans if block in span]
        down = any(costs.trains(span.first, block - 1) for span in reaching)
        backward = costs.backward_flops(block, block, down) if block in trained else 0
        head_flops = costs.after(block).head_training_flops(block == num_blocks - 1) if block in heads else 0
        cost_up_to.append(cost_up_to[-1] + costs.block_flops + backward + head_flops)

    best: dict[int, tuple[int, float, list[int]]] = {0: (0, 0.0, [])}  # blocks placed -> (crossing, cost, sizes)
    for rank in range(pipeline):
        reached: dict[int, tuple[int, float, list[int]]] = {}
        for placed, (gradients, cost, sizes) in best.items():
            for last in range(placed, num_blocks - (pipeline - rank - 1)):
                candidate = (
                    gradients + crossing[last],
                    max(cost, cost_up_to[last + 1] - cost_up_to[placed]),
                    [*sizes, last - placed + 1],
                )
                if last + 1 not in reached or candidate < reached[last + 1]:
                    reached[last + 1] = candidate
        best = reached
    return best[num_blocks][2]


def _gradients_across(phase: Phase, block: int) -> int:
    """How many gradients cross the border behind a block, in one message each."""
    down = [
        span for span in phase.spans if block + 1 in span and any(phase.weight(span, b) > 0 for b in range(block + 1))
    ]
    return len({span.first if phase.own_weight is None else span for span in down})


def balanced_chunks(num_blocks: int, chunks: int, costs: ModelCosts) -> list[int]:
    """Blocks of every chunk so that the costliest, its head counted, is as cheap as can be, and the others are near.

    By dynamic programming over where a chunk ends: (greatest cost, sum of squared costs) only grows with the prefix.
    """

    def cost(first: int, last: int) -> float:
        head = costs.after(last).head_training_flops(last == num_blocks - 1)
        return 3 * (last - first + 1) * costs.block_flops + head

    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}  # blocks placed -> (greatest, squares, sizes)
    for chunk in range(chunks):
        reached: dict[int, tuple[float, float, list[int]]] = {}
        for placed, (greatest, squares, sizes) in best.items():
            for last in range(placed, num_blocks - (chunks - chunk - 1)):
                own = cost(placed, last)
                candidate = max(greatest, own), squares + own**2, [*sizes, last - placed + 1]
                if last + 1 not in reached or candidate < reached[last + 1]:
                    reached[last + 1] = candidate
        best = reached
    return best[num_blocks][2]


def cut(
    objective: Objective, pipeline: int, costs: ModelCosts, partition: str | Sequence[int] = "balanced"
) -> list[StagePlan]:
    """The stages in order. Every block is in exactly one stage.

    Cuts are the ends and starts of the spans of all phases, of their clip groups, and the borders between pipeline
    ranks. `partition` is "balanced" or the number of blocks on every pipeline rank.
    Raises ConfigError when a given partition does not place every block once on `pipeline` ranks.
    """
    num_blocks = objective.num_blocks
    sizes = rank_sizes(objective, pipeline, costs) if isinstance(partition, str) else list(partition)
    if len(sizes) != pipeline or min(sizes) < 1 or sum(sizes) != num_blocks:
        raise ConfigError(
            f"parallel.partition is {sizes}: it needs {pipeline} numbers (parallel.pipeline), each 1 or more, that "
            f"add up to {num_blocks} blocks"
        )
    rank_of = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    starts = {0, num_blocks, *(sum(sizes[:rank]) for rank in range(pipeline))}
    for phase in objective.phases:
        starts |= set(phase.clip_at)
        for span in phase.spans:
            starts |= {span.first, span.last + 1}
    in_order = sorted(starts)
    return [
        StagePlan(
            index=index,
            first_block=first,
            last_block=after - 1,
            pipeline_rank=rank_of[first],
            has_head=after - 1 in objective.heads,
            is_first=first == 0,
            is_last=after == num_blocks,
            trained=first in objective.trained and _trains(first, after - 1, objective, costs),
        )
        for index, (first, after) in enumerate(zip(in_order, in_order[1:], strict=False))
    ]


def _trains(first: int, last: int, objective: Objective, costs: ModelCosts) -> bool:
    """Whether anything is left to train in a stage, its head included."""
    if costs.trained is None or costs.trains(first, last):
        return True
    return last in objective.heads and costs.trained_in_head(last, last == objective.num_blocks - 1) > 0


def weights_of(stage: StagePlan, costs: ModelCosts) -> tuple[int, int]:
    """Own weights and read-only copies of a stage."""
    costs = costs.after(stage.last_block)
    auxiliary = stage.has_head and not stage.is_last
    own = stage.num_blocks * costs.block_parameters + stage.is_first * costs.embedding_parameters
    own += costs.head_parameters if stage.is_last else auxiliary * costs.auxiliary_parameters
    own -= (stage.is_first and stage.is_last) * costs.tied_parameters
    return own, auxiliary * costs.auxiliary_copied


def trained_of(stage: StagePlan, costs: ModelCosts) -> int:
    """The weights of a stage that train."""
    if not stage.trained:
        return 0
    if costs.trained is None:
        return weights_of(stage, costs)[0]
    of = costs.trained
    own = sum(of.blocks[stage.first_block : stage.last_block + 1]) + stage.is_first * of.embedding
    own += stage.has_head * costs.trained_in_head(stage.last_block, stage.is_last)
    tied = stage.is_first and stage.is_last and of.head >= costs.tied_parameters
    return own - tied * costs.tied_parameters


def stage_rows(
    stages: Sequence[StagePlan], costs: ModelCosts, head: str, state_bytes: int, weight_bytes: int = 4
) -> list[dict[str, object]]:
    """One row per stage for people: blocks, pipeline rank, head, forward FLOPs and their share, weights and memory.

    `head` says what the auxiliary heads are, `state_bytes` what a trained weight takes with its gradient and the
    optimizer's state (before ZeRO divides it among replicas), `weight_bytes` one without; a read-only copy takes four
    bytes.
    """
    rows = []
    of_all = sum(_flops(stage, costs) for stage in stages)
    for stage in stages:
        flops = _flops(stage, costs)
        auxiliary = stage.has_head and not stage.is_last
        weights, copies = weights_of(stage, costs)
        trained = trained_of(stage, costs)
        memory = trained * state_bytes + (weights - trained) * weight_bytes + copies * 4
        kind = head if auxiliary else "the model's own" if stage.has_head else "none"
        rows.append(
            {
                "stage": stage.index,
                "pipeline rank": stage.pipeline_rank,
                "blocks": f"{stage.first_block}-{stage.last_block}",
                "head": kind if stage.trained else f"{kind}, not trained",
                "MFLOP/token": round(flops / 1e6, 2),
                "share": f"{flops / of_all:.1%}",
                "weights": f"{(weights + copies) / 1e6:.2f} M",
                "with gradients and optimizer": f"{memory / 2**20:,.0f} MiB",
            }
        )
    return rows


def _flops(stage: StagePlan, costs: ModelCosts) -> float:
    """Forward FLOPs per token."""
    of_head = costs.head_flops if stage.is_last else costs.after(stage.last_block).auxiliary_flops
    return stage.num_blocks * costs.block_flops + stage.has_head * of_head
