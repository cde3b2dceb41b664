"""The schedules of others take the time that their papers say."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from side_by_side import rivals  # noqa: E402
from side_by_side.rivals import ChunkSeconds, replay  # noqa: E402

from lptransformer.methods import objectives  # noqa: E402
from lptransformer.methods.cost import ModelCosts  # noqa: E402
from lptransformer.methods.stages import cut  # noqa: E402
from lptransformer.planning.simulate import LinkSeconds, StageSeconds, simulate  # noqa: E402

RANKS = [1, 2, 3, 4, 8]
CASES = [(p, m) for p in RANKS for m in (1, 2, 5, 8, 16)]
F, I, W = 1.0, 1.25, 0.75  # noqa: E741 (the names of the tasks)


@pytest.mark.parametrize(("p", "m"), CASES)
def test_1f1b(p: int, m: int) -> None:
    times = replay(rivals.one_f_one_b(p, m), [ChunkSeconds(F, I, W)] * p)
    assert times.seconds == pytest.approx((m + p - 1) * (F + I + W))
    assert times.busy == pytest.approx([m * (F + I + W)] * p)


@pytest.mark.parametrize("v", [1, 2, 4])
@pytest.mark.parametrize(("p", "groups"), [(1, 3), (2, 1), (2, 4), (4, 1), (4, 3), (8, 2)])
def test_interleaved_divides_the_bubble(p: int, groups: int, v: int) -> None:
    m = p * groups
    of_chunk = ChunkSeconds(F / v, I / v, W / v)
    times = replay(rivals.interleaved(p, m, v), [of_chunk] * (p * v))
    assert times.seconds == pytest.approx(m * (F + I + W) + (p - 1) * (F + I + W) / v)


@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in CASES if m >= p])
def test_zero_bubble_h1(p: int, m: int) -> None:
    """A bubble of (p - 1)(f + input half - weight half)."""
    times = replay(rivals.zero_bubble_h1(p, m), [ChunkSeconds(1.0, 1.0, 1.0)] * p)
    assert times.seconds == pytest.approx(3 * m + (p - 1) * (1 + 1 - 1))
    times = replay(rivals.zero_bubble_h1(p, m), [ChunkSeconds(F, I, W)] * p)
    assert times.seconds == pytest.approx(m * (F + I + W) + (p - 1) * (F + I - W))


@pytest.mark.parametrize(("p", "m"), [(2, 4), (4, 8), (4, 20), (8, 16)])
def test_zero_bubble_v_has_hardly_any_bubble(p: int, m: int) -> None:
    """With three equal passes none but filling: p - 1 forward passes of half a rank's blocks."""
    times = replay(rivals.zero_bubble_v(p, m), [ChunkSeconds(0.5, 0.5, 0.5)] * (2 * p))
    assert times.busy == pytest.approx([3.0 * m] * p)
    assert 3 * m < times.seconds <= 3 * m + 0.5 * (p - 1) + 1e-9


@pytest.mark.parametrize(("p", "m"), CASES)
@pytest.mark.parametrize("name", ["one_f_one_b", "zero_bubble_h1", "zero_bubble_v"])
def test_every_pass_is_made_once(name: str, p: int, m: int) -> None:
    schedule = getattr(rivals, name)(p, m)
    chunks = 2 * p if name == "zero_bubble_v" else p
    ops = "FB" if name == "one_f_one_b" else "FIW"
    tasks = sorted(task for tasks in schedule for task in tasks)
    assert tasks == sorted((op, chunk, i) for op in ops for chunk in range(chunks) for i in range(m))
    replay(schedule, [ChunkSeconds(1.0, 1.0, 1.0)] * chunks)  # no deadlock


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.sampled_from(["one_f_one_b", "interleaved", "zero_bubble_h1", "zero_bubble_v"]),
    st.integers(1, 4),
    st.integers(1, 60),
    st.data(),
)
def test_many_micro_batches_are_reckoned_from_few(name: str, p: int, m: int, data: st.DataObject) -> None:
    v = {"interleaved": 2, "zero_bubble_v": 2}.get(name, 1)
    m = m - m % p + p if name == "interleaved" else m
    eighths = st.integers(1, 24).map(lambda n: n / 8)
    seconds = [ChunkSeconds(*(data.draw(eighths) for _ in range(3))) for _ in range(p * v)]
    links = [LinkSeconds(data.draw(eighths) / 16, data.draw(eighths) / 16) for _ in range(p - 1)]

    def make(count: int) -> rivals.Schedule:
        return rivals.interleaved(p, count, 2) if name == "interleaved" else getattr(rivals, name)(p, count)

    whole = replay(make(m), seconds, links)
    reckoned = rivals.replay_many(make, m, p, seconds, links)
    assert reckoned.busy == pytest.approx(whole.busy)
    assert reckoned.seconds == pytest.approx(whole.seconds, rel=0.02)


def test_1f1b_is_the_engine_s_own_where_messages_cost_nothing() -> None:
    objective = objectives.build(4, "backprop")
    stages = cut(objective, 4, ModelCosts(1.0, 0.0, 0.0))
    seconds = [StageSeconds(1.0, 2.0), StageSeconds(1.5, 2.5), StageSeconds(0.5, 3.0), StageSeconds(2.0, 2.0)]
    own = simulate(objective, stages, seconds, micro_batches=6, updates=4, in_flight=6)
    theirs = replay(rivals.one_f_one_b(4, 6), [ChunkSeconds(s.forward, 1.0, s.backward - 1.0) for s in seconds])
    assert own.steady_update_seconds() == pytest.approx(theirs.seconds)


def test_messages_follow_one_another_on_a_wire() -> None:
    """Two ranks, two micro-batches, each message 3 seconds: the second forward waits for the second message."""
    times = replay(rivals.one_f_one_b(2, 2), [ChunkSeconds(1.0, 1.0, 0.0)] * 2, [LinkSeconds(0.5, 3.0)])
    # F0 is there at 1 + 3 + 0.5, F1 at 4 + 3 + 0.5; F0 B0 F1 B1 on rank 1 ends at 9.5; B1 goes down in 3.5; B1 is 1.
    assert times.seconds == pytest.approx(9.5 + 3.5 + 1.0)
