"""Blocks to stages to pipeline ranks: nothing is dropped or doubled, and balanced cuts are the best there are."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lptransformer.cost import ModelCosts, model_costs
from lptransformer.errors import ConfigError
from lptransformer.objective import Span, chunked, greedy
from lptransformer.partition import StagePlan, cut, rank_sizes, table

COSTS = ModelCosts(block_flops=3.0, head_flops=5.0)


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` numbers, each 1 or more, in order."""
    cuts = itertools.combinations(range(1, total), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *c, total))) for c in cuts]


def price(sizes: tuple[int, ...] | list[int], spans: tuple[Span, ...], costs: ModelCosts) -> tuple[int, float]:
    """Borders between ranks that carry a gradient, and the cost of the costliest rank."""
    ends = {span.last for span in spans}
    lasts = [sum(sizes[: i + 1]) - 1 for i in range(len(sizes))]
    rank_costs = []
    for size, last in zip(sizes, lasts, strict=True):
        heads = len(ends & set(range(last - size + 1, last + 1)))
        rank_costs.append(size * costs.block_flops + heads * costs.head_flops)
    return len(set(lasts) - ends), max(rank_costs)


def check(stages: list[StagePlan], spans: tuple[Span, ...], pipeline: int) -> None:
    """What must hold of any partition, said from the spans alone."""
    num_blocks = spans[-1].last + 1
    assert [s.index for s in stages] == list(range(len(stages)))
    blocks = [block for s in stages for block in range(s.first_block, s.last_block + 1)]
    assert blocks == list(range(num_blocks)), "every block once, in order"
    assert [s.num_blocks for s in stages] == [s.last_block - s.first_block + 1 for s in stages]
    ranks = [s.pipeline_rank for s in stages]
    assert ranks == sorted(ranks) and set(ranks) == set(range(pipeline)), "consecutive stages, no empty rank"
    assert [s.is_first for s in stages] == [True] + [False] * (len(stages) - 1)
    assert [s.is_last for s in stages] == [False] * (len(stages) - 1) + [True]
    ends = {span.last for span in spans}
    for stage in stages:
        span = spans[stage.span]
        assert span.first <= stage.first_block and stage.last_block <= span.last, "within one span"
        assert stage.has_head == (stage.last_block in ends)
        assert stage.gradient_above == (stage.last_block not in ends)
        assert stage.gradient_below == (stage.first_block != span.first)
    for below, above in itertools.pairwise(stages):
        assert below.gradient_above == above.gradient_below
        assert below.span != above.span or below.pipeline_rank != above.pipeline_rank, "no border without a reason"


@pytest.mark.parametrize("num_blocks", range(1, 9))
def test_every_block_is_in_exactly_one_stage_for_all_chunks_and_ranks(num_blocks: int) -> None:
    for chunks in range(1, num_blocks + 1):
        spans = chunked(num_blocks, chunks)
        for pipeline in range(1, num_blocks + 1):
            check(cut(spans, pipeline, COSTS), spans, pipeline)
            for sizes in compositions(num_blocks, pipeline):
                stages = cut(spans, pipeline, COSTS, sizes)
                check(stages, spans, pipeline)
                on_rank = [sum(s.num_blocks for s in stages if s.pipeline_rank == r) for r in range(pipeline)]
                assert on_rank == list(sizes), "as the user gave them"


@pytest.mark.parametrize("head_flops", [0.0, 0.5, 3.0, 5.0, 40.0])
@pytest.mark.parametrize("num_blocks", range(1, 9))
def test_balanced_is_the_best_of_all_partitions(num_blocks: int, head_flops: float) -> None:
    costs = ModelCosts(3.0, head_flops)
    for chunks in range(1, num_blocks + 1):
        spans = chunked(num_blocks, chunks)
        for pipeline in range(1, num_blocks + 1):
            best = min(price(sizes, spans, costs) for sizes in compositions(num_blocks, pipeline))
            assert price(rank_sizes(spans, pipeline, costs), spans, costs) == best


@settings(deadline=None)  # a busy machine is no error
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    pipeline=st.integers(1, 6),
    block_flops=st.integers(1, 100),
    head_flops=st.integers(0, 1000),
)
def test_balanced_with_uneven_runs_and_any_costs(
    lengths: list[int], pipeline: int, block_flops: int, head_flops: int
) -> None:
    spans, costs = chunked(sum(lengths), lengths), ModelCosts(block_flops, head_flops)
    pipeline = min(pipeline, sum(lengths))
    check(cut(spans, pipeline, costs), spans, pipeline)
    best = min(price(sizes, spans, costs) for sizes in compositions(sum(lengths), pipeline))
    assert price(rank_sizes(spans, pipeline, costs), spans, costs) == best


def test_heads_count_in_the_balance() -> None:
    """Four runs on two ranks, but the last run's blocks are many: with a costly head two and two, else by blocks."""
    spans = chunked(8, [1, 1, 1, 5])
    assert rank_sizes(spans, 2, ModelCosts(1.0, 0.0)) == [3, 5]
    assert rank_sizes(spans, 2, ModelCosts(1.0, 100.0)) == [2, 6]


def test_no_border_carries_a_gradient_where_that_can_be_had() -> None:
    stages = cut(chunked(8, [1, 7]), 2, COSTS)
    assert [s.num_blocks for s in stages] == [1, 7] and not any(s.gradient_above for s in stages)


def test_a_span_over_two_ranks() -> None:
    below, above = cut(chunked(4, 1), 2, COSTS, [3, 1])
    assert (below.first_block, below.last_block, below.pipeline_rank, below.has_head) == (0, 2, 0, False)
    assert (above.first_block, above.last_block, above.pipeline_rank, above.has_head) == (3, 3, 1, True)
    assert below.gradient_above and above.gradient_below and not above.gradient_above and below.span == above.span


def test_chunked_spans() -> None:
    assert chunked(8, 3) == (Span(0, 2), Span(3, 5), Span(6, 7))  # the longer ones first
    assert chunked(8, [1, 5, 2]) == (Span(0, 0), Span(1, 5), Span(6, 7))
    assert greedy(3) == chunked(3, 3) == (Span(0, 0), Span(1, 1), Span(2, 2))
    assert chunked(3, 1) == (Span(0, 2),)


@settings(deadline=None)  # a busy machine is no error
@given(num_blocks=st.integers(1, 40), data=st.data())
def test_chunks_are_as_equal_as_possible(num_blocks: int, data: st.DataObject) -> None:
    spans = chunked(num_blocks, data.draw(st.integers(1, num_blocks)))
    assert [block for span in spans for block in range(span.first, span.last + 1)] == list(range(num_blocks))
    sizes = [span.last - span.first + 1 for span in spans]
    assert max(sizes) - min(sizes) <= 1 and sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("chunks", [0, 9, -1, [], [4, 5], [8, 0], [9, -1]])
def test_chunks_that_do_not_fit_are_refused(chunks: int | list[int]) -> None:
    with pytest.raises(ConfigError, match="objective.chunks") as caught:
        chunked(8, chunks)
    assert str(chunks) in str(caught.value) and "8" in str(caught.value)


def test_more_ranks_than_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel.pipeline is 5: a model of 4 blocks takes 1 to 4"):
        cut(chunked(4, 2), 5, COSTS)


@pytest.mark.parametrize("sizes", [[4, 5], [8], [4, 2, 2], [8, 0], [9, -1], [3, 4]])
def test_a_partition_that_does_not_place_every_block_once_is_refused(sizes: list[int]) -> None:
    with pytest.raises(ConfigError, match="parallel.partition is") as caught:
        cut(chunked(8, 2), 2, COSTS, sizes)
    assert str(sizes) in str(caught.value) and "add up to 8" in str(caught.value)


def test_costs_of_a_model() -> None:
    costs = model_costs(block_parameters=1000, hidden_size=8, vocab_size=100, sequence_length=16)
    assert costs == ModelCosts(block_flops=2000 + 2 * 16 * 8, head_flops=2 * 8 * 100)


def test_the_table_for_people() -> None:
    rows = table(cut(chunked(4, 2), 2, ModelCosts(1e6, 2e6), [3, 1]), ModelCosts(1e6, 2e6))
    assert [(row["stage"], row["pipeline rank"], row["blocks"]) for row in rows] == [
        (0, 0, "0-1"),
        (1, 0, "2-2"),
        (2, 1, "3-3"),
    ]
    assert [row["head"] for row in rows] == ["auxiliary", "none (gradient from above)", "own"]
    assert [row["MFLOP/token"] for row in rows] == [4.0, 1.0, 3.0]
    assert [row["share"] for row in rows] == ["50.0%", "12.5%", "37.5%"]
