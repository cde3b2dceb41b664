"""The simulated time of schedules equals what can be worked out by hand."""

from __future__ import annotations

import pytest

from lptransformer import objective as objectives
from lptransformer.cost import ModelCosts
from lptransformer.partition import cut
from lptransformer.simulate import Link, StageSeconds, Timeline, simulate

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
    assert timeline.idle_shares() == pytest.approx([0.0] * ranks)


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
    assert timeline.idle_shares() == pytest.approx([0.5, 0.0])
    ahead = [ends[10] for ends in timeline.ended]
    assert ahead[1] - ahead[0] == pytest.approx(3 * 6 - 1, abs=6), "three messages: two posted, one on its way"


def test_transfers_hide_behind_compute_until_they_are_longer() -> None:
    for message_seconds, wanted in ((0.5, 6.0), (3.0, 6.0), (5.0, 10.0)):
        link = Link(latency_seconds=0.25, message_seconds=message_seconds)
        timeline = run("chunked", 2, 2, updates=20, chunks=2, link=link)
        assert timeline.steady_update_seconds() == pytest.approx(wanted)


def test_updates_wait_for_what_clips_with_them() -> None:
    assert run("backprop", 2, 2, clip=False).steady_update_seconds() <= run("backprop", 2, 2).steady_update_seconds()


def test_it_is_the_plan_of_the_whole_run() -> None:
    objective = objectives.build(2, "chunked", chunks=2, backprop_every=2)
    stages = cut(objective, 2, COSTS)
    timeline = simulate(objective, stages, [StageSeconds(1.0, 2.0)] * 2, micro_batches=1, updates=8)
    assert timeline.steady_update_seconds() == pytest.approx((3 + 6) / 2, abs=0.6), (
        "a local and a global update in turn"
    )
    assert [len(ends) for ends in timeline.ended] == [8, 8]
