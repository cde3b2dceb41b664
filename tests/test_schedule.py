"""Schedules as data: complete, free of deadlock, readable both ways; and errors planted in them are found."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lptransformer.cost import ModelCosts
from lptransformer.objective import chunked
from lptransformer.partition import StagePlan, cut
from lptransformer.schedule import OPS, Action, one_update, parse, replay, to_text

COSTS = ModelCosts(3.0, 5.0)
Schedules = list[list[Action]]


def schedules_of(stages: list[StagePlan], micro_batches: int) -> Schedules:
    return [one_update(stages, rank, micro_batches) for rank in range(stages[-1].pipeline_rank + 1)]


def make(blocks: int, chunks: int, pipeline: int, micro_batches: int) -> tuple[Schedules, list[StagePlan]]:
    stages = cut(chunked(blocks, chunks), pipeline, COSTS)
    return schedules_of(stages, micro_batches), stages


def small() -> Iterator[tuple[list[StagePlan], int]]:
    """All partitions of up to 5 blocks, given ones too, with 1 to 5 micro-batches."""
    for blocks in range(1, 6):
        for chunks, pipeline in itertools.product(range(1, blocks + 1), repeat=2):
            for cuts in itertools.combinations(range(1, blocks), pipeline - 1):
                sizes = [b - a for a, b in itertools.pairwise((0, *cuts, blocks))]
                stages = cut(chunked(blocks, chunks), pipeline, COSTS, sizes)
                for micro_batches in range(1, 6):
                    yield stages, micro_batches


def test_all_small_schedules_are_complete_and_free_of_deadlock() -> None:
    for stages, micro_batches in small():
        schedules = schedules_of(stages, micro_batches)
        for rank, schedule in enumerate(schedules):
            wanted = Counter()
            for stage in [stage for stage in stages if stage.pipeline_rank == rank]:
                below, above = stages[stage.index - 1], stages[min(stage.index + 1, len(stages) - 1)]
                ops = ["F", "B"]
                ops += ["R"] if not stage.is_first and below.pipeline_rank != rank else []
                ops += ["S"] if not stage.is_last and above.pipeline_rank != rank else []
                ops += ["RG"] if stage.gradient_above else []
                ops += ["SG"] if stage.gradient_below else []
                wanted.update(Action(stage.index, op, i) for op in ops for i in range(micro_batches))
                wanted[Action(stage.index, "U")] = 1
            assert Counter(schedule) == wanted, "each forward, backward and message once, one update per stage"
        for in_flight in (1, 2, 3):
            assert replay(schedules, stages, in_flight) <= in_flight + 1


def test_repeated_updates_replay_too() -> None:
    """Rank 0 begins an update while the others are in the one before: message by message the order still fits."""
    for stages, micro_batches in small():
        twice = []
        for rank in range(stages[-1].pipeline_rank + 1):
            one = one_update(stages, rank, micro_batches)
            later = [Action(a.stage, a.op, a.micro_batch + micro_batches) for a in one if a.micro_batch is not None]
            twice.append([action for action in one if action.op != "U"] + later)
        replay(twice, stages, 1)


def test_gradients_are_added_in_the_order_of_the_micro_batches() -> None:
    """Sums depend on their order, so this is part of bit equality."""
    for stages, micro_batches in small():
        for schedule in schedules_of(stages, micro_batches):
            for stage in stages:
                order = [a.micro_batch for a in schedule if a.stage == stage.index and a.op == "B"]
                assert order == sorted(order, key=lambda i: i or 0)


def test_where_no_border_carries_a_gradient_one_micro_batch_is_held_and_sending_comes_first() -> None:
    for stages, micro_batches in small():
        if any(stage.gradient_above for stage in stages):
            continue
        for schedule in schedules_of(stages, micro_batches):
            held: set[int] = set()
            for action in schedule:
                if action.op == "F":
                    assert action.stage not in held, "the backward before is done"
                    held.add(action.stage)
                elif action.op == "B":
                    held.remove(action.stage)
                elif action.op == "S":
                    assert action.stage in held, "before the local backward"


def test_a_span_over_ranks_runs_1f1b() -> None:
    """A stage holds one micro-batch for each pipeline rank above it in its span, and its own."""
    schedules, stages = make(blocks=4, chunks=1, pipeline=4, micro_batches=8)
    for rank, schedule in enumerate(schedules):
        held = most = 0
        for action in schedule:
            held += (action.op == "F") - (action.op == "B")
            most = max(most, held)
        assert most == 4 - rank
    replay(schedules, stages, in_flight=1)


def test_the_text_of_a_schedule() -> None:
    (below, above), _ = make(blocks=2, chunks=2, pipeline=2, micro_batches=2)
    assert to_text(below) == "0F0 0S0 0B0 0F1 0S1 0B1 0U"
    assert to_text(above) == "1R0 1F0 1B0 1R1 1F1 1B1 1U"
    (below, above), _ = make(blocks=2, chunks=1, pipeline=2, micro_batches=3)
    assert to_text(below) == "0F0 0S0 0F1 0S1 0RG0 0B0 0F2 0S2 0RG1 0B1 0RG2 0B2 0U"
    assert to_text(above) == "1R0 1F0 1B0 1SG0 1R1 1F1 1B1 1SG1 1R2 1F2 1B2 1SG2 1U"


def test_text_and_back_for_all_small_schedules() -> None:
    for stages, micro_batches in small():
        for schedule in schedules_of(stages, micro_batches):
            assert parse(to_text(schedule)) == schedule


ACTIONS = st.builds(Action, st.integers(0, 999), st.sampled_from([op for op in OPS if op != "U"]), st.integers(0, 999))
UPDATES = st.builds(Action, st.integers(0, 999), st.just("U"))


@settings(deadline=None)  # a busy machine is no error
@given(st.lists(ACTIONS | UPDATES))
def test_text_and_back_for_any_actions(actions: list[Action]) -> None:
    assert parse(to_text(actions)) == actions


@pytest.mark.parametrize("word", ["F0", "0F", "0U1", "0X1", "0G1", "0f1", "0F-1", "0F1x", "x0F1", "0", "0RS1", "-1F0"])
def test_a_word_that_is_no_action_is_named(word: str) -> None:
    with pytest.raises(ValueError, match="is no action: expected <stage><op><micro-batch>") as caught:
        parse(f"0F0 {word} 0U")
    assert repr(word) in str(caught.value)


def edited(schedule: list[Action], old: str, new: str) -> list[Action]:
    text = to_text(schedule)
    assert old in text, "the error is really planted"
    return parse(text.replace(old, new))


LOCAL = {"blocks": 2, "chunks": 2, "pipeline": 2, "micro_batches": 2}
SPANNING = {"blocks": 2, "chunks": 1, "pipeline": 2, "micro_batches": 3}
PLANTED = [
    # sizes, rank, what becomes what, what is said
    (LOCAL, 0, "0S1 ", "", r"deadlock: pipeline ranks are about to do \{1: '1R1'\}"),
    (LOCAL, 1, "1R1 ", "", r"1F1 before 1R1"),
    (LOCAL, 1, "1R1 1F1 1B1 ", "", r"messages nobody received"),
    (LOCAL, 0, "0F0 0S0", "0S0 0F0", r"0S0 before 0F0"),
    (LOCAL, 0, "0F0 0S0 0B0", "0B0 0F0 0S0", r"0B0 before .*0F0"),
    (LOCAL, 1, "1R0 1F0 1B0 1R1", "1R1 1F0 1B0 1R0", r"1R1: the message waiting is 0"),
    (LOCAL, 0, "0B0", "0B0 0B0", r"0B0 twice"),
    (LOCAL, 0, "0B1 0U", "0U 0B1", r"0U before 0B1"),
    (LOCAL, 0, "0B1 ", "", r"0U before 0B1"),
    (LOCAL, 1, "1R1 1F1 1B1 1U", "1U 1R1 1F1 1B1", r"1R1 after 1U"),
    (SPANNING, 0, "0RG1 0B1", "0B1 0RG1", r"0B1 before .*0RG1"),
    (SPANNING, 0, "0F0 0S0 0F1 0S1 0RG0 0B0", "0F0 0F1 0RG0 0B0 0S0 0S1", r"deadlock.*0: '0RG0', 1: '1R0'"),
    (SPANNING, 1, "1B1 1SG1", "1SG1 1B1", r"1SG1 before 1B1"),
    (SPANNING, 1, "1SG2 ", "", r"deadlock.*0: '0RG2'"),
    (SPANNING, 0, "0RG1 0B1 0RG2 0B2", "0RG2 0B2 0RG1 0B1", r"0RG2: the message waiting is 1"),
]


@pytest.mark.parametrize(("sizes", "rank", "old", "new", "said"), PLANTED)
def test_an_error_in_a_schedule_is_found(sizes: dict[str, int], rank: int, old: str, new: str, said: str) -> None:
    schedules, stages = make(**sizes)
    replay(schedules, stages, in_flight=2)
    schedules[rank] = edited(schedules[rank], old, new)
    with pytest.raises(AssertionError, match=said):
        replay(schedules, stages, in_flight=2)


def test_a_schedule_may_need_more_places_than_the_channel_has() -> None:
    """Six micro-batches ahead: both channels fill up, and each rank waits for the other to take something."""
    stages = cut(chunked(2, 1), 2, COSTS)
    below = parse(" ".join([*(f"0F{i} 0S{i}" for i in range(6)), *(f"0RG{i} 0B{i}" for i in range(6)), "0U"]))
    above = one_update(stages, 1, 6)
    with pytest.raises(AssertionError, match=r"deadlock: .*0: '0S5', 1: '1SG2'"):
        replay([below, above], stages, in_flight=1)
    assert replay([below, above], stages, in_flight=2) == 3


def test_how_far_a_rank_runs_ahead_is_bounded_by_the_channel() -> None:
    """Without a receiver, rank 0 sends `in_flight` + 1 messages and stands before the next."""
    schedules, stages = make(blocks=2, chunks=2, pipeline=2, micro_batches=8)
    for in_flight in (1, 2, 4):
        waiting = rf"deadlock: pipeline ranks are about to do \{{0: '0S{in_flight + 1}'\}}"
        with pytest.raises(AssertionError, match=waiting):
            replay([schedules[0], []], stages, in_flight)
