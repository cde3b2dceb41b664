"""The simulated time of schedules equals what can be worked out by hand."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lptransformer.methods import objectives
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.stages import cut
from lptransformer.planning.simulate import LinkSeconds, StageSeconds, Timeline, simulate, steady

COSTS = ModelCosts(1.0, 0.0, 0.0)


def run(
    name: str, ranks: int, micro_batches: int, updates: int = 8, seconds: StageSeconds | None = None, **more: object
) -> Timeline:
    options = {key: more.pop(key) for key in list(more) if key in ("chunks", "overlap", "own_weight", "first_head")}
    objective = objectives.build(ranks, name, **options)
    stages = cut(objective, ranks, COSTS)
    of_all = [seconds or StageSeconds(1.0, 2.0, 1.0)] * len(stages)
    return simulate(objective, stages, of_all, micro_batches=micro_batches, updates=updates, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4, 9])
def test_1f1b_has_its_bubble(ranks: int, micro_batches: int) -> None:
    """(m + p - 1) forward and backward passes per update: the next one begins when all ranks have updated."""
    assert run("backprop", ranks, micro_batches).steady_update_seconds() == pytest.approx(
        (micro_batches + ranks - 1) * 3
    )


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_local_updates_fill_once_and_have_no_bubble(ranks: int, micro_batches: int) -> None:
    timeline = run("chunked", ranks, micro_batches, chunks=ranks)
    assert timeline.steady_update_seconds() == pytest.approx(3 * micro_batches)
    assert timeline.total_seconds == pytest.approx(8 * micro_batches * 3 + (ranks - 1) * 1), "one forward pass per rank"


@pytest.mark.parametrize(("micro_batches", "wanted"), [(1, 6), (4, 16), (8, 32)])
def test_overlapping_costs_a_pull_and_waits_for_its_neighbour_where_micro_batches_are_few(
    micro_batches: int, wanted: float
) -> None:
    """Forward, pull and backward are 4 seconds of a stage. With one micro-batch a stage waits for the forward and the
    gradient of the stage above; the last one's gradient comes with its ordinary backward: 1 + (1 + 2) + 2. With more,
    the backward of the micro-batch before fills that time."""
    timeline = run("overlapping", 4, micro_batches, updates=20, chunks=4, overlap=1, own_weight=0.5, first_head=False)
    assert timeline.steady_update_seconds() == pytest.approx(wanted)


def test_delayed_gradients_have_no_bubble_where_micro_batches_are_enough() -> None:
    for ranks, micro_batches in ((2, 2), (4, 4), (4, 8)):
        timeline = run("delayed", ranks, micro_batches, updates=20, chunks=ranks, in_flight=8)
        assert timeline.steady_update_seconds() == pytest.approx(3 * micro_batches, rel=0.01)


def test_a_slow_stage_sets_the_pace_and_bounds_how_far_others_run_ahead() -> None:
    objective = objectives.build(2, "chunked", chunks=2)
    stages = cut(objective, 2, COSTS)
    seconds = [StageSeconds(1.0, 2.0), StageSeconds(2.0, 4.0)]
    timeline = simulate(objective, stages, seconds, micro_batches=2, updates=20, in_flight=2)
    assert timeline.steady_update_seconds() == pytest.approx(12)
    assert steady(objective, stages, seconds, micro_batches=2).idle_shares == pytest.approx([0.5, 0.0])
    ahead = [ends[10] for ends in timeline.ended]
    assert ahead[1] - ahead[0] == pytest.approx(3 * 6 - 1, abs=6), "three messages: two posted, one on its way"


def test_transfers_hide_behind_compute_until_they_are_longer() -> None:
    for message_seconds, wanted in ((0.5, 6.0), (3.0, 6.0), (5.0, 10.0)):
        link = LinkSeconds(latency_seconds=0.25, message_seconds=message_seconds)
        timeline = run("chunked", 2, 2, updates=20, chunks=2, link=link)
        assert timeline.steady_update_seconds() == pytest.approx(wanted)


def test_updates_wait_for_what_clips_with_them() -> None:
    """The last rank of backprop is through with its backward at 4, the first at 6: both update then."""
    timeline = run("backprop", 2, 1, seconds=StageSeconds(1.0, 2.0, update=0.5))
    assert [ends[0] for ends in timeline.ended] == [6.5, 6.5]


def test_it_is_the_plan_of_the_whole_run() -> None:
    objective = objectives.build(2, "chunked", chunks=2, backprop_every=2)
    stages = cut(objective, 2, COSTS)
    timeline = simulate(objective, stages, [StageSeconds(1.0, 2.0)] * 2, micro_batches=1, updates=8)
    assert timeline.steady_update_seconds() == pytest.approx((3 + 6) / 2, abs=0.6), (
        "a local and a global update in turn"
    )
    assert [len(ends) for ends in timeline.ended] == [8, 8]


def steady_or_not(draw: st.DrawFn, long: bool) -> dict[str, Any]:
    blocks = draw(st.integers(1, 8))
    ranks = draw(st.integers(1, blocks))
    chunks = draw(st.integers(1, blocks))
    objective = objectives.build(
        blocks,
        draw(st.sampled_from(["backprop", "chunked", "overlapping", "last", "deep_supervision", "delayed"])),
        chunks=chunks,
        overlap=min(draw(st.sampled_from([1, 2])), chunks - 1),
        own_weight=draw(st.sampled_from([0.0, 0.25, 1.0])),
        first_head=draw(st.booleans()),
        trained_blocks=draw(st.integers(1, blocks)),
    )
    stages = cut(objective, ranks, COSTS)
    eighths = st.integers(1, 24).map(lambda n: n / 8)
    return {
        "objective": objective,
        "stages": stages,
        "seconds": [StageSeconds(*(draw(eighths) for _ in range(4))) for _ in stages],
        "link": [LinkSeconds(draw(eighths), draw(eighths)) for _ in range(ranks - 1)],
        "micro_batches": draw(st.integers(60, 150) if long else st.integers(1, 5)),
        "in_flight": draw(st.integers(1, 3)),
    }


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.composite(steady_or_not)(long=False))
def test_the_steady_state_is_that_of_a_long_replay(case: dict[str, Any]) -> None:
    """Of few micro-batches, where nothing is extrapolated over them: the second half of 60 updates."""
    assert steady(**case).update_seconds == pytest.approx(long_replay(case, 60), rel=1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.composite(steady_or_not)(long=True))
def test_many_micro_batches_are_extrapolated_from_few(case: dict[str, Any]) -> None:
    """Within 5 percent for any costs of stages and links."""
    assert steady(**case).update_seconds == pytest.approx(long_replay(case, 12), rel=0.05)


def long_replay(case: dict[str, Any], updates: int) -> float:
    """Seconds of an update in the second half of a replay, without the last one, which drains the pipeline."""
    ended = simulate(**case, updates=updates + 1).ended
    half = updates // 2
    return max((ends[updates - 1] - ends[half - 1]) / (updates - half) for ends in ended)


@pytest.mark.parametrize(("name", "passes"), [("backprop", 3), ("chunked", 3), ("overlapping", 4), ("delayed", 3)])
def test_where_ranks_are_alike_the_extrapolation_is_exact(name: str, passes: float) -> None:
    objective = objectives.build(4, name, chunks=4, overlap=1, own_weight=0.5, first_head=False)
    stages, seconds, many = cut(objective, 4, COSTS), [StageSeconds(1.0, 2.0, 1.0, 0.5)] * 4, {"micro_batches": 203}
    case: dict[str, Any] = {"objective": objective, "stages": stages, "seconds": seconds, "in_flight": 4, **many}
    found = steady(**case, link=LinkSeconds(0.25, 0.5))
    assert found.update_seconds == pytest.approx(long_replay({**case, "link": LinkSeconds(0.25, 0.5)}, 12))
    assert found.idle_shares[1] == pytest.approx(1 - (203 * passes + 0.5) / found.update_seconds)


def test_an_update_that_costs_much_does_not_hide_who_is_slower_per_micro_batch() -> None:
    """Rank 0 sets the pace of few micro-batches, by its update, and rank 1 that of many."""
    objective = objectives.build(2, "chunked", chunks=2)
    stages, seconds = cut(objective, 2, COSTS), [StageSeconds(1.0, 2.0, update=60.0), StageSeconds(1.1, 2.2)]
    for micro_batches in (2, 1000):
        wanted = max(3 * micro_batches + 60, 3.3 * micro_batches)
        assert steady(objective, stages, seconds, micro_batches=micro_batches).update_seconds == pytest.approx(wanted)


@pytest.mark.parametrize(("name", "bubble"), [("backprop", 63), ("chunked", 0)])
def test_65_536_micro_batches_on_64_ranks(name: str, bubble: int) -> None:
    started = time.process_time()
    objective = objectives.build(64, name, chunks=64)
    seconds = [StageSeconds(1.0, 2.0, update=0.5)] * 64
    found = steady(objective, cut(objective, 64, COSTS, [1] * 64), seconds, micro_batches=65_536)
    assert found.update_seconds == pytest.approx(3 * (65_536 + bubble) + 0.5)
    assert time.process_time() - started < 10


def test_the_steady_state_of_a_hybrid_is_the_mean_over_its_updates() -> None:
    objective = objectives.build(2, "chunked", chunks=2, backprop_every=4)
    stages, seconds = cut(objective, 2, COSTS), [StageSeconds(1.0, 2.0)] * 2
    found = steady(objective, stages, seconds, micro_batches=1, steps=8)
    assert found.update_seconds == pytest.approx((3 * 3 + 6) / 4)
    assert found.idle_shares == pytest.approx([1 - 3 / 3.75] * 2)
