"""The fast replay gives the same times as the plain one, and is fast."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lptransformer import objective as objectives
from lptransformer import simulate, wavefront
from lptransformer.cost import ModelCosts
from lptransformer.partition import cut
from lptransformer.simulate import Link, StageSeconds

COSTS = ModelCosts(1.0, 0.0, 0.0)
# Sums of such numbers are exact in floating point, so equal means equal.
EIGHTHS = st.integers(0, 24).map(lambda n: n / 8)


@st.composite
def cases(draw: st.DrawFn) -> tuple[object, ...]:
    blocks = draw(st.integers(1, 9))
    ranks = draw(st.integers(1, blocks))
    name = draw(st.sampled_from(["backprop", "chunked", "greedy", "overlapping", "last", "deep_supervision"]))
    chunks = draw(st.one_of(st.just(min(ranks, blocks)), st.integers(1, blocks)))
    overlap = min(draw(st.sampled_from([1, 1, 2])), chunks - 1)
    objective = objectives.build(
        blocks,
        name,
        chunks=chunks,
        overlap=overlap,
        own_weight=draw(st.sampled_from([0.0, 0.25, 1.0])),
        first_head=draw(st.booleans()),
        trained_blocks=draw(st.integers(1, blocks)),
    )
    stages = cut(objective, ranks, COSTS)
    seconds = [StageSeconds(*(draw(EIGHTHS) for _ in range(4))) for _ in stages]
    links = [Link(draw(EIGHTHS), draw(EIGHTHS)) for _ in range(ranks - 1)]
    options = {
        "micro_batches": draw(st.integers(1, 7)),
        "updates": draw(st.integers(2, 4)),
        "in_flight": draw(st.integers(1, 3)),
    }
    return objective, stages, seconds, links, options, draw(st.booleans())


@settings(max_examples=250, deadline=None, derandomize=True)
@given(cases())
def test_it_equals_the_plain_replay(case: tuple) -> None:  # type: ignore[type-arg]
    objective, stages, seconds, links, options, clip = case
    ranks = wavefront.rounds(objective, stages, seconds, objective.usual, clip)
    if ranks is None:
        return
    plain = simulate.simulate(objective, stages, seconds, link=links, clip=clip, **options)
    fast = wavefront.run(ranks, links=links, **options)
    assert fast.ended.tolist() == plain.ended
    if min(fast.ended[:, -1] - fast.ended[:, fast.ended.shape[1] // 2 - 1]) > 0:
        assert fast.steady_update_seconds() == plain.steady_update_seconds()
        assert fast.idle_shares() == pytest.approx(plain.idle_shares(), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "chunks", "fits"),
    [("backprop", 1, True), ("chunked", 4, True), ("chunked", 2, True), ("greedy", 8, True), ("last", 1, True)]
    + [("overlapping", 4, True), ("deep_supervision", 4, True), ("overlapping", 8, False), ("delayed", 4, False)],
)
def test_what_fits_into_rounds(name: str, chunks: int, fits: bool) -> None:
    options = {"overlap": 1, "own_weight": 0.5, "first_head": False, "trained_blocks": 3}
    objective = objectives.build(8, name, chunks=chunks, **options)
    stages = cut(objective, 4, COSTS, [2, 2, 2, 2])
    found = wavefront.rounds(objective, stages, [StageSeconds(1, 2, 1)] * len(stages), objective.usual)
    assert (found is not None) is fits


@pytest.mark.parametrize("name", ["chunked", "backprop"])
def test_a_thousand_ranks_and_micro_batches(name: str) -> None:
    """1024 x 1024 in under 10 s on one slow core, the making of the rounds included."""
    started = time.process_time()
    objective = objectives.build(1024, name, chunks=1024)
    stages = cut(objective, 1024, COSTS, [1] * 1024)
    seconds = [StageSeconds(1.0, 2.0, 1.0, 0.5)] * 1024
    ranks = wavefront.rounds(objective, stages, seconds, objective.usual)
    assert ranks is not None
    ends = wavefront.run(ranks, micro_batches=1024, updates=2)
    bubble = 0 if name == "chunked" else 1023
    assert ends.steady_update_seconds() == pytest.approx((1024 + bubble) * 3 + 0.5)
    assert time.process_time() - started < 10


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cases())
def test_the_steady_state_is_that_of_a_long_run(case: tuple) -> None:  # type: ignore[type-arg]
    objective, stages, seconds, links, options, clip = case
    ranks = wavefront.rounds(objective, stages, seconds, objective.usual, clip)
    if ranks is None:
        return
    options["updates"] = 60
    long = wavefront.run(ranks, links=links, **options)
    if long.steady_update_seconds() == 0:
        return
    del options["updates"]
    steady = wavefront.steady(ranks, links=links, **options)
    assert steady.update_seconds == pytest.approx(long.steady_update_seconds(), rel=1e-6)


def test_all_go_at_the_pace_of_the_slowest() -> None:
    objective = objectives.build(4, "chunked", chunks=4)
    stages = cut(objective, 4, COSTS)
    seconds = [StageSeconds(1.0 + i, 2.0) for i in range(4)]
    ranks = wavefront.rounds(objective, stages, seconds, objective.usual)
    assert ranks is not None
    steady = wavefront.steady(ranks, micro_batches=2)
    long = simulate.simulate(objective, stages, seconds, micro_batches=2, updates=40)
    assert steady.update_seconds == pytest.approx(long.steady_update_seconds())
    assert steady.idle_shares == pytest.approx(long.idle_shares())
