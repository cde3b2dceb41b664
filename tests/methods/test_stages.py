"""Blocks to stages to pipeline ranks: nothing is dropped or doubled, and balanced cuts are the best there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import (
    all_compositions,
    any_spans,
    compositions,
    every_objective,
    every_placement,
    objectives,
    placements,
    wanted_at_border,
)

from lptransformer.errors import ConfigError
from lptransformer.methods.cost import ModelCosts, model_costs
from lptransformer.methods.heads import FittedOptions, HeadOptions
from lptransformer.methods.objectives import Objective, build
from lptransformer.methods.stages import StagePlan, balanced_chunks, cut, rank_sizes, stage_rows

COSTS = ModelCosts(block_flops=3.0, head_flops=5.0, auxiliary_flops=4.0)


def chunked(num_blocks: int, chunks: int | list[int]) -> Objective:
    return build(num_blocks, "chunked", chunks=chunks)


def price(sizes: Sequence[int], objective: Objective, costs: ModelCosts) -> tuple[int, float]:
    """Gradients that cross borders between ranks, in all phases, and the FLOPs of the costliest rank.

    A forward pass costs once and a backward twice; blocks that no loss reaches have no backward.
    """
    starts = list(itertools.accumulate(sizes, initial=0))
    gradients = sum(len(wanted_at_border(phase, start)) for phase in objective.phases for start in starts[1:-1])
    spans = [span for phase in objective.phases for span in phase.spans]
    flops = []
    for first, after in itertools.pairwise(starts):
        of_rank = 0.0
        for block in range(first, after):
            of_rank += costs.block_flops * (3 if any(span.first <= block <= span.last for span in spans) else 1)
            if block == objective.num_blocks - 1:
                of_rank += 3 * costs.head_flops
            elif any(span.last == block for span in spans):
                of_rank += costs.auxiliary_flops + costs.auxiliary_backward_flops
        flops.append(of_rank)
    return gradients, max(flops)


def check(stages: Sequence[StagePlan], objective: Objective, pipeline: int) -> None:
    """What must hold of any partition, said from the spans alone."""
    num_blocks = objective.num_blocks
    spans = [span for phase in objective.phases for span in phase.spans]
    assert [s.index for s in stages] == list(range(len(stages)))
    blocks = [block for s in stages for block in range(s.first_block, s.last_block + 1)]
    assert blocks == list(range(num_blocks)), "every block once, in order"
    assert [s.num_blocks for s in stages] == [s.last_block - s.first_block + 1 for s in stages]
    ranks = [s.pipeline_rank for s in stages]
    assert ranks == sorted(ranks) and set(ranks) == set(range(pipeline)), "consecutive stages, no empty rank"
    assert [s.is_first for s in stages] == [True] + [False] * (len(stages) - 1)
    assert [s.is_last for s in stages] == [False] * (len(stages) - 1) + [True]
    for stage in stages:
        assert stage.has_head == any(span.last == stage.last_block for span in spans)
        reached = [any(span.first <= b <= span.last for span in spans) for b in range(num_blocks)]
        assert set(reached[stage.first_block : stage.last_block + 1]) == {stage.trained}
    for below, above in itertools.pairwise(stages):
        between_ranks = below.pipeline_rank != above.pipeline_rank
        end_of_span = any(above.first_block in (span.first, span.last + 1) for span in spans)
        end_of_run = any(above.first_block in phase.clip_at for phase in objective.phases)
        assert between_ranks or end_of_span or end_of_run, "no border without a reason"
    inside = {block for s in stages for block in range(s.first_block + 1, s.last_block + 1)}
    assert not inside & {border for span in spans for border in (span.first, span.last + 1)}, "a span ends in no stage"
    assert not inside & {border for phase in objective.phases for border in phase.clip_at}


def test_every_block_is_in_exactly_one_stage_in_all_small_cases() -> None:
    for num_blocks in range(1, 5):
        for objective in every_objective(num_blocks):
            for sizes, stages in zip(all_compositions(num_blocks), every_placement(objective), strict=True):
                check(stages, objective, len(sizes))
                on_rank = [sum(s.num_blocks for s in stages if s.pipeline_rank == r) for r in range(len(sizes))]
                assert on_rank == list(sizes), "as the user gave them"


@settings(deadline=None)  # a busy machine is no error
@given(placements(objectives(most_blocks=24) | any_spans()))
def test_every_block_is_in_exactly_one_stage(case: tuple[Objective, list[StagePlan]]) -> None:
    objective, stages = case
    check(stages, objective, stages[-1].pipeline_rank + 1)


STAGES: list[tuple[Objective, list[int], str]] = [
    # objective, blocks on every rank, its stages: blocks, h where there is a head, - where nothing is trained
    (build(4, "backprop"), [4], "0-3h"),
    (build(4, "backprop"), [1, 3], "0-0 1-3h"),
    (build(6, "chunked", chunks=2), [6], "0-2h 3-5h"),
    (build(6, "chunked", chunks=2), [4, 2], "0-2h 3-3 4-5h"),
    (build(6, "last", trained_blocks=2), [6], "0-3- 4-5h"),
    (build(6, "last", trained_blocks=2), [2, 4], "0-1- 2-3- 4-5h"),
    (build(6, "deep_supervision", chunks=3), [6], "0-1h 2-3h 4-5h"),
    (build(6, "delayed", chunks=3), [6], "0-1 2-3 4-5h"),
    (build(8, "overlapping", chunks=4, overlap=1, own_weight=0.5, first_head=False), [8], "0-1 2-3h 4-5h 6-7h"),
    (build(8, "overlapping", chunks=4, overlap=2, own_weight=0.5, first_head=False), [8], "0-1 2-5h 6-7h"),
    (build(8, "overlapping", chunks=4, overlap=2, own_weight=0.5, first_head=True), [3, 5], "0-1h 2-2 3-3h 4-5h 6-7h"),
    (build(4, "greedy", backprop_every=3), [2, 2], "0-0h 1-1h 2-2h 3-3h"),
]


@pytest.mark.parametrize("number", range(len(STAGES)))
def test_stages_by_hand(number: int) -> None:
    objective, sizes, wanted = STAGES[number]
    stages = cut(objective, len(sizes), COSTS, sizes)
    said = [f"{s.first_block}-{s.last_block}" + "h" * s.has_head + "-" * (not s.trained) for s in stages]
    assert " ".join(said) == wanted


# ------------------------------------------------------------------------------------------------------ balanced


@pytest.mark.parametrize(("head_flops", "auxiliary_flops"), [(0.0, 0.0), (0.5, 3.0), (5.0, 5.0), (40.0, 1.0)])
def test_balanced_is_the_best_of_all_partitions(head_flops: float, auxiliary_flops: float) -> None:
    costs = ModelCosts(3.0, head_flops, auxiliary_flops, auxiliary_flops)  # as of a shared readout
    for num_blocks in range(1, 5):
        for objective in every_objective(num_blocks):
            for pipeline in range(1, num_blocks + 1):
                best = min(price(sizes, objective, costs) for sizes in compositions(num_blocks, pipeline))
                assert price(rank_sizes(objective, pipeline, costs), objective, costs) == best, (objective, pipeline)


@settings(deadline=None)
@given(
    objective=objectives(most_blocks=12) | any_spans(),
    pipeline=st.integers(1, 6),
    block_flops=st.integers(1, 100),
    head_flops=st.integers(0, 1000),
    auxiliary_flops=st.integers(0, 1000),
)
def test_balanced_with_any_costs(
    objective: Objective, pipeline: int, block_flops: int, head_flops: int, auxiliary_flops: int
) -> None:
    costs = ModelCosts(block_flops, head_flops, auxiliary_flops, 2 * auxiliary_flops)
    pipeline = min(pipeline, objective.num_blocks)
    best = min(price(sizes, objective, costs) for sizes in compositions(objective.num_blocks, pipeline))
    sizes = rank_sizes(objective, pipeline, costs)
    assert price(sizes, objective, costs) == best
    assert cut(objective, pipeline, costs) == cut(objective, pipeline, costs, sizes)


def test_heads_count_in_the_balance() -> None:
    """Four runs on two ranks, but the last run's blocks are many: with a costly head two and two, else by blocks."""
    runs = chunked(8, [1, 1, 1, 5])
    assert rank_sizes(runs, 2, ModelCosts(1.0, 0.0, 0.0)) == [3, 5]
    assert rank_sizes(runs, 2, ModelCosts(1.0, 100.0, 100.0, 200.0)) == [2, 6]
    assert rank_sizes(runs, 2, ModelCosts(1.0, 100.0, 0.0)) == [3, 5]  # cheap auxiliary heads


def test_blocks_that_are_not_trained_cost_a_third() -> None:
    assert rank_sizes(build(8, "last", trained_blocks=2), 2, ModelCosts(1.0, 0.0, 0.0)) == [6, 2]
    assert rank_sizes(build(12, "last", trained_blocks=1), 2, ModelCosts(1.0, 0.0, 0.0)) == [7, 5]


def test_no_border_carries_a_gradient_where_that_can_be_had() -> None:
    stages = cut(chunked(8, [1, 7]), 2, COSTS)
    assert [s.num_blocks for s in stages] == [1, 7] and all(s.has_head for s in stages)


def test_where_every_border_carries_one_gradient_the_balance_alone_counts() -> None:
    """Losses that are added up travel as one gradient, so all borders of deep supervision are alike."""
    heads_for_free = ModelCosts(1.0, 0.0, 0.0)
    for name in ("backprop", "deep_supervision", "delayed"):
        assert rank_sizes(build(8, name, chunks=4), 2, heads_for_free) == [4, 4], name


def test_a_loss_that_no_block_below_takes_crosses_no_border() -> None:
    """With own_weight 1 at overlap 1 every run trains itself: cuts between runs are free, those within are not."""
    options: dict[str, Any] = {"chunks": [1, 3], "overlap": 1, "own_weight": 1.0, "first_head": True}
    assert rank_sizes(build(4, "overlapping", **options), 2, ModelCosts(1.0, 0.0, 0.0)) == [1, 3]


# ----------------------------------------------------------------------------------------------- what does not fit


def test_more_ranks_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pipeline is 5: a model of 4 blocks takes 1 to 4"):
        cut(chunked(4, 2), 5, COSTS)


@pytest.mark.parametrize("sizes", [[4, 5], [8], [4, 2, 2], [8, 0], [9, -1], [3, 4], []])
def test_a_partition_that_does_not_place_every_block_once_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="parallel.partition is") as caught:
        cut(chunked(8, 2), 2, COSTS, sizes)
    assert str(sizes) in str(caught.value) and "add up to 8" in str(caught.value)


# ------------------------------------------------------------------------------------------------------- for people


def test_costs_of_a_model() -> None:
    costs = model_costs(1000, hidden_size=8, vocab_size=100, sequence_length=16, head=HeadOptions())
    assert costs.block_flops == 2000 + 2 * 16 * 8
    assert costs.head_flops == costs.auxiliary_flops == 2 * 8 * 100


def test_the_table_for_people() -> None:
    costs = ModelCosts(block_flops=1e6, head_flops=2e6, auxiliary_flops=1e6)
    rows = stage_rows(cut(chunked(4, 2), 2, costs, [3, 1]), costs, "private", 16)
    assert [(row["stage"], row["pipeline rank"], row["blocks"]) for row in rows] == [
        (0, 0, "0-1"),
        (1, 0, "2-2"),
        (2, 1, "3-3"),
    ]
    assert [row["head"] for row in rows] == ["private", "none", "the model's own"]
    assert [row["MFLOP/token"] for row in rows] == [3.0, 1.0, 3.0]
    assert [row["share"] for row in rows] == ["42.9%", "14.3%", "42.9%"]


def test_the_table_shows_what_is_not_trained() -> None:
    rows = stage_rows(cut(build(4, "last", trained_blocks=1), 2, COSTS, [2, 2]), COSTS, "private", 16)
    assert [row["head"] for row in rows] == ["none, not trained", "none, not trained", "the model's own"]


@pytest.mark.parametrize(("chunks", "blocks"), [(2, 0), (2, 3), (3, 3), (4, 5), (1, 2)])
def test_chunks_with_fitted_heads_are_balanced(chunks: int, blocks: int) -> None:
    """Against all ways to cut, with heads whose blocks are fewer near the top."""
    num_blocks, head = 9, FittedOptions(kind="fitted", blocks=blocks, train_blocks=blocks > 0)
    costs = model_costs(1000, 8, 300, 16, head, num_blocks=num_blocks)

    def costliest(sizes: tuple[int, ...]) -> float:
        lasts = [sum(sizes[: number + 1]) - 1 for number in range(len(sizes))]
        heads = [costs.after(last).head_training_flops(last == num_blocks - 1) for last in lasts]
        return max(3 * size * costs.block_flops + head for size, head in zip(sizes, heads, strict=True))

    ways = [way for way in itertools.product(range(1, num_blocks + 1), repeat=chunks) if sum(way) == num_blocks]
    found = balanced_chunks(num_blocks, chunks, costs)
    assert sum(found) == num_blocks and costliest(tuple(found)) == min(map(costliest, ways))
    if blocks == 3:
        fewer = model_costs(1000, 8, 300, 16, FittedOptions(kind="fitted", blocks=2, train_blocks=True))
        assert costs.after(num_blocks - 3).auxiliary_flops == fewer.auxiliary_flops < costs.after(0).auxiliary_flops
