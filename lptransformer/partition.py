"""Where the blocks go: from the spans of an objective to stages, and from stages to pipeline ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lptransformer.cost import ModelCosts
from lptransformer.errors import ConfigError
from lptransformer.objective import Span


@dataclass(frozen=True)
class StagePlan:
    """One stage: consecutive blocks between two cuts, on one pipeline rank.

    `gradient_below` and `gradient_above` say whether the border to the previous and to the next stage carries a
    gradient. `span` numbers the span that the stage belongs to; stages of one span clip and skip together.
    """

    index: int
    first_block: int
    last_block: int
    pipeline_rank: int
    span: int
    has_head: bool
    is_first: bool
    is_last: bool
    gradient_below: bool
    gradient_above: bool

    @property
    def num_blocks(self) -> int:
        return self.last_block - self.first_block + 1


def rank_sizes(spans: Sequence[Span], pipeline: int, costs: ModelCosts) -> list[int]:
    """Blocks per pipeline rank: fewest borders that carry a gradient, then the smallest cost of the costliest rank.

    Heads count. Dynamic programming over cuts between blocks; the pair (gradient borders, greatest cost) is compared
    in that order, and both parts only grow with the prefix, so the best prefix is part of the best whole.

    Raises ConfigError when there are more pipeline ranks than blocks.
    """
    num_blocks = spans[-1].last + 1
    if pipeline > num_blocks:
        raise ConfigError(f"parallel.pipeline is {pipeline}: a model of {num_blocks} blocks takes 1 to {num_blocks}")
    ends = {span.last for span in spans}

    def rank_cost(first: int, last: int) -> float:
        heads = sum(block in ends for block in range(first, last + 1))
        return (last - first + 1) * costs.block_flops + heads * costs.head_flops

    best: dict[int, tuple[int, float, list[int]]] = {0: (0, 0.0, [])}  # blocks placed -> (borders, cost, sizes)
    for rank in range(pipeline):
        reached: dict[int, tuple[int, float, list[int]]] = {}
        for placed, (borders, cost, sizes) in best.items():
            for last in range(placed, num_blocks - (pipeline - rank - 1)):
                candidate = (
                    borders + (last not in ends),
                    max(cost, rank_cost(placed, last)),
                    [*sizes, last - placed + 1],
                )
                if last + 1 not in reached or candidate < reached[last + 1]:
                    reached[last + 1] = candidate
        best = reached
    return best[num_blocks][2]


def cut(
    spans: Sequence[Span], pipeline: int, costs: ModelCosts, partition: str | Sequence[int] = "balanced"
) -> list[StagePlan]:
    """The stages in order. Every block is in exactly one stage.

    `partition` is "balanced" or the number of blocks on every pipeline rank.
    Raises ConfigError when a given partition does not place every block once on `pipeline` ranks.
    """
    num_blocks = spans[-1].last + 1
    sizes = rank_sizes(spans, pipeline, costs) if isinstance(partition, str) else list(partition)
    if len(sizes) != pipeline or min(sizes) < 1 or sum(sizes) != num_blocks:
        raise ConfigError(
            f"parallel.partition is {sizes}: it needs {pipeline} numbers (parallel.pipeline), each 1 or more, that "
            f"add up to {num_blocks} blocks"
        )
    rank_of = [rank for rank, size in enumerate(sizes) for _ in range(size)]
    span_of = [number for number, span in enumerate(spans) for _ in range(span.first, span.last + 1)]
    assert len(span_of) == num_blocks, "spans of a chunked objective cover every block once"

    def border(block: int) -> bool:
        """Whether a stage ends after this block."""
        last = block == num_blocks - 1
        return last or span_of[block] != span_of[block + 1] or rank_of[block] != rank_of[block + 1]

    def carries_gradient(block: int) -> bool:
        return 0 <= block < num_blocks - 1 and span_of[block] == span_of[block + 1]

    stages: list[StagePlan] = []
    first = 0
    for block in range(num_blocks):
        if border(block):
            stages.append(
                StagePlan(
                    index=len(stages),
                    first_block=first,
                    last_block=block,
                    pipeline_rank=rank_of[block],
                    span=span_of[block],
                    has_head=not carries_gradient(block),
                    is_first=first == 0,
                    is_last=block == num_blocks - 1,
                    gradient_below=carries_gradient(first - 1),
                    gradient_above=carries_gradient(block),
                )
            )
            first = block + 1
    return stages


def table(stages: Sequence[StagePlan], costs: ModelCosts) -> list[dict[str, object]]:
    """One row per stage for people: blocks, pipeline rank, head, share of the forward FLOPs."""
    flops = [stage.num_blocks * costs.block_flops + stage.has_head * costs.head_flops for stage in stages]
    return [
        {
            "stage": stage.index,
            "pipeline rank": stage.pipeline_rank,
            "blocks": f"{stage.first_block}-{stage.last_block}",
            "head": "own" if stage.is_last else "auxiliary" if stage.has_head else "none (gradient from above)",
            "MFLOP/token": round(cost / 1e6, 2),
            "share": f"{cost / sum(flops):.1%}",
        }
        for stage, cost in zip(stages, flops, strict=True)
    ]
