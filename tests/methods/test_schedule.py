"""Schedules as data: complete, free of deadlock, readable both ways; and errors planted in them are found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from check_schedule import check_schedules, to_text
from hypothesis import given, settings
from hypothesis import strategies as st
from objective_cases import COSTS, any_spans, every_objective, every_placement, objectives, placements
from torch.distributed.pipelining.schedules import _Action, _ComputationType

from lptransformer.methods.gradient_flow import clip_groups, crossing, duties, flows
from lptransformer.methods.objectives import Objective, build
from lptransformer.methods.schedule import RECV_B, RECV_F, SEND_B, SEND_F, Action, Pattern, one_update, parse
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan, cut

Schedules = list[list[Action]]
Case = tuple[Objective, list[StagePlan]]
MICRO_BATCHES = st.integers(1, 6)
IN_FLIGHT = st.integers(1, 3)
OPS = {RECV_F, "F", SEND_F, "I", RECV_B, "B", SEND_B, "U"}


def ranks(stages: Sequence[StagePlan]) -> range:
    return range(stages[-1].pipeline_rank + 1)


def patterns(objective: Objective, phase: Phase, stages: list[StagePlan], micro_batches: int) -> list[Pattern]:
    return [one_update(stages, phase, rank, micro_batches, objective.delayed) for rank in ranks(stages)]


def alone(objective: Objective, phase: Phase, stages: list[StagePlan], micro_batches: int) -> Schedules:
    return [pattern.alone for pattern in patterns(objective, phase, stages, micro_batches)]


def make(
    blocks: int, pipeline: int, micro_batches: int, name: str = "chunked", **options: Any
) -> tuple[Schedules, list[StagePlan], Phase]:
    """Schedules of the usual phase, with as many blocks on every pipeline rank."""
    objective = build(blocks, name, **options)
    stages = cut(objective, pipeline, COSTS, [blocks // pipeline] * pipeline)
    return alone(objective, objective.usual, stages, micro_batches), stages, objective.usual


def small() -> Iterator[tuple[Objective, list[StagePlan], Phase, int]]:
    """All objectives over up to 3 blocks, placed in all ways, with 1 and 3 micro-batches."""
    for num_blocks in range(1, 4):
        for objective in every_objective(num_blocks):
            for stages in every_placement(objective):
                for phase in objective.phases:
                    for micro_batches in (1, 3):
                        yield objective, stages, phase, micro_batches


# ------------------------------------------------------------------------------------- complete, without deadlock


def wanted_actions(stages: Sequence[StagePlan], phase: Phase, rank: int, micro_batches: int) -> Counter[Action]:
    """All that a rank has to do in an update: whatever each stage computes, and what crosses its borders."""
    of_stages, of_phase = duties(phase, stages), flows(phase, stages)
    local = [stage for stage in stages if stage.pipeline_rank == rank]
    bottom, top = local[0], local[-1]
    wanted: list[Action] = [Action(stage.index, "U") for stage in local if stage.trained]
    for i in range(micro_batches):
        wanted += [Action(stage.index, "F", i) for stage in local]
        wanted += [Action(stage.index, "B", i) for stage in local if stage.trained]
        wanted += [Action(stage.index, "I", i, flow) for stage in local for flow in of_stages[stage.index].pulls]
        if bottom.index > 0:
            wanted.append(Action(bottom.index, "RECV_F", i))
            wanted += [Action(bottom.index, "SEND_B", i, flow) for flow in crossing(of_phase, bottom.index)]
        if top.index < len(stages) - 1:
            wanted.append(Action(top.index, "SEND_F", i))
            wanted += [Action(top.index, "RECV_B", i, flow) for flow in crossing(of_phase, top.index + 1)]
    return Counter(wanted)


def check(objective: Objective, stages: list[StagePlan], phase: Phase, micro_batches: int) -> Schedules:
    schedules = alone(objective, phase, stages, micro_batches)
    for rank, schedule in enumerate(schedules):
        assert Counter(schedule) == wanted_actions(stages, phase, rank, micro_batches)
        assert parse(to_text(schedule)) == schedule
        for stage in stages:
            order = [a.micro_batch for a in schedule if (a.stage, a.op) == (stage.index, "B")]
            # Sums depend on their order, so this is part of bit equality.
            assert order == sorted(order, key=lambda i: i or 0), "gradients are added in the order of the micro-batches"
    return schedules


def test_all_small_schedules_are_complete_and_free_of_deadlock() -> None:
    for objective, stages, phase, micro_batches in small():
        schedules = check(objective, stages, phase, micro_batches)
        assert 0 <= check_schedules(schedules, stages, phase, in_flight=1) <= 2


@settings(deadline=None, max_examples=200)  # a busy machine is no error
@given(placements(objectives() | any_spans()), MICRO_BATCHES, IN_FLIGHT)
def test_schedules_are_complete_and_free_of_deadlock(case: Case, micro_batches: int, in_flight: int) -> None:
    objective, stages = case
    for phase in objective.phases:
        schedules = check(objective, stages, phase, micro_batches)
        assert check_schedules(schedules, stages, phase, in_flight) <= in_flight + 1


def numbered_on(actions: Sequence[Action], by: int) -> list[Action]:
    return [
        replace(action, micro_batch=action.micro_batch + by) for action in actions if action.micro_batch is not None
    ]


@settings(deadline=None, max_examples=100)
@given(placements(objectives() | any_spans()), MICRO_BATCHES, IN_FLIGHT)
def test_two_updates_in_a_row_are_free_of_deadlock_too(case: Case, micro_batches: int, in_flight: int) -> None:
    """Rank 0 begins an update while the others are in the one before: message by message the order still fits."""
    objective, stages = case
    for phase in objective.phases:
        twice: Schedules = []
        for one in patterns(objective, phase, stages, micro_batches):
            follows = numbered_on([*one.body, *one.drains], micro_batches)
            twice.append([*one.fill, *one.body, *one.goes_on, *follows, *one.updates])
        for rank, schedule in enumerate(twice):
            assert Counter(schedule) == wanted_actions(stages, phase, rank, 2 * micro_batches)
        check_schedules(twice, stages, phase, in_flight)


def run_engine(
    objective: Objective,
    stages: list[StagePlan],
    micro_batches: int,
    phase_of_update: Sequence[int],
    in_flight: int,
    drained: Sequence[bool] = (),
) -> None:
    """What processes wait for in a run: messages in channels that all phases share, and the norms of clip groups.

    A channel of gradients belongs to a border and a place among the flows that cross it. A group's stages update when
    all of them have come to it. `drained` says after which updates nothing is under way, for an evaluation; the last is
    always one of them.
    """
    todo: list[list[tuple[int, Action]]] = [[] for _ in ranks(stages)]
    pauses = [*drained, *[False] * len(phase_of_update)][: len(phase_of_update) - 1] + [True]
    for update, number in enumerate(phase_of_update):
        for rank, one in enumerate(patterns(objective, objective.phases[number], stages, micro_batches)):
            begin = one.fill if update == 0 or pauses[update - 1] else ()
            end = one.drains if pauses[update] else one.goes_on
            todo[rank] += [(update, action) for action in (*begin, *one.body, *end, *one.updates)]

    def slot(update: int, action: Action, border: int) -> tuple[int, str, int]:
        """The channel of an action, by the stage above its border."""
        if action.flow is None:
            return border, "hidden states", 0
        crosses = crossing(flows(objective.phases[phase_of_update[update]], stages), border)
        return border, "gradients", crosses.index(action.flow)

    channels: dict[tuple[int, str, int], list[tuple[int, str]]] = {}
    arrived: dict[tuple[int, int], set[int]] = {}  # (update, group): the pipeline ranks that are there

    def step(rank: int, update: int, action: Action) -> bool:
        if action.micro_batch is not None:
            message = update * micro_batches + action.micro_batch, str(action.flow)
        if action.op in ("SEND_F", "SEND_B"):
            channel = slot(update, action, action.stage + (action.op == "SEND_F"))
            if len(channels.setdefault(channel, [])) > in_flight:
                return False
            channels[channel].append(message)
        elif action.op in ("RECV_F", "RECV_B"):
            waiting = channels.get(slot(update, action, action.stage + (action.op == "RECV_B")))
            if not waiting:
                return False
            assert waiting.pop(0) == message, "each message is taken in its turn"
        elif action.op == "U":
            groups = clip_groups(objective.phases[phase_of_update[update]], stages)
            number = next(number for number, group in enumerate(groups) if action.stage in group)
            arrived.setdefault((update, number), set()).add(rank)
            return arrived[update, number] == {stages[index].pipeline_rank for index in groups[number]}
        return True

    while any(todo):
        moved = False
        for rank, actions in enumerate(todo):
            while actions and step(rank, *actions[0]):
                actions.pop(0)
                moved = True
        assert moved, f"deadlock: {[(update, str(action)) for update, action in (one[0] for one in todo if one)]}"
    assert not any(channels.values())


@settings(deadline=None, max_examples=100)
@given(
    placements(objectives() | any_spans()),
    MICRO_BATCHES,
    IN_FLIGHT,
    st.lists(st.integers(0, 1), min_size=1, max_size=4),
)
def test_updates_of_changing_phases_never_wait_for_each_other_in_a_circle(
    case: Case, micro_batches: int, in_flight: int, phase_of_update: list[int]
) -> None:
    objective, stages = case
    numbers = [min(number, len(objective.phases) - 1) for number in phase_of_update]
    run_engine(objective, stages, micro_batches, numbers, in_flight)


@settings(deadline=None, max_examples=100)
@given(placements(objectives(names=("delayed",))), MICRO_BATCHES, IN_FLIGHT, st.lists(st.booleans(), max_size=2))
def test_delayed_updates_follow_each_other(case: Case, micro_batches: int, in_flight: int, drained: list[bool]) -> None:
    """An update ends with its own backward passes, all of them and no others; what goes on is forward alone."""
    objective, stages = case
    run_engine(objective, stages, micro_batches, [0, 0, 0], in_flight, drained)
    own = range(micro_batches)
    for rank, one in enumerate(patterns(objective, objective.usual, stages, micro_batches)):
        top = [stage.index for stage in stages if stage.pipeline_rank == rank][-1]

        def numbers(op: str, *parts: Sequence[Action], of: int = top) -> list[int | None]:
            return [a.micro_batch for part in parts for a in part if (a.stage, a.op) == (of, op)]

        assert numbers("F", one.fill, one.body) == list(own), "the last message, with what follows it, is seen in time"
        assert numbers("B", one.fill) == [] and numbers("B", one.body, one.goes_on) == list(own)
        ahead = numbers("F", one.fill)
        assert numbers("F", one.goes_on) == [i + micro_batches for i in own[: len(ahead)]]
        assert numbers("B", one.drains) == numbers("B", one.goes_on) and numbers("F", one.drains) == []
        assert len(ahead) == min(ranks(stages)[-1] - rank, micro_batches - 1), "as many as in 1F1B"
        steady = [a.op for a in one.body + one.goes_on if a.stage == top and a.op in "FB"]
        assert steady == ["F", "B"] * micro_batches, "no bubble"


# ----------------------------------------------------------------------------------------------------- the order


def most_held(schedule: Sequence[Action], stage: int) -> int:
    """The most micro-batches that a stage holds at once: after forward, before backward."""
    held = most = 0
    for action in schedule:
        if action.stage == stage:
            held += (action.op == "F") - (action.op == "B")
            most = max(most, held)
    return most


@pytest.mark.parametrize("micro_batches", [1, 3, 8])
@pytest.mark.parametrize("name", ["backprop", "deep_supervision", "delayed"])
def test_a_gradient_through_all_ranks_runs_1f1b(name: str, micro_batches: int) -> None:
    """A stage holds one micro-batch for each pipeline rank above its own, and one."""
    objective = build(6, name, chunks=3)
    for stages in every_placement(objective):
        for rank, one in enumerate(patterns(objective, objective.usual, stages, micro_batches)):
            wanted = min(ranks(stages)[-1] - rank + 1, micro_batches)
            follows = numbered_on([*one.body, *one.drains], micro_batches)
            two_updates = [*one.fill, *one.body, *one.goes_on, *follows]
            for stage in (stage for stage in stages if stage.pipeline_rank == rank):
                assert most_held(one.alone, stage.index) == most_held(two_updates, stage.index) == wanted


@settings(deadline=None, max_examples=100)
@given(placements(objectives()), MICRO_BATCHES)
def test_what_is_held_where_no_gradient_crosses_and_sending_comes_first(case: Case, micro_batches: int) -> None:
    """One micro-batch where a rank waits for no gradient, and one more for each rank that a gradient comes from."""
    objective, stages = case
    for phase in objective.phases:
        of_phase = flows(phase, stages)
        for rank, schedule in enumerate(alone(objective, phase, stages, micro_batches)):
            local = [stage for stage in stages if stage.pipeline_rank == rank]
            coming = [flow for flow in of_phase if flow.bottom <= local[-1].index < flow.top]
            lag = max((stages[flow.top].pipeline_rank - rank for flow in coming), default=0)
            for stage in (stage for stage in local if stage.trained):
                assert most_held(schedule, stage.index) <= min(lag + 1, micro_batches)
            for before, action in zip(schedule, schedule[1:], strict=False):
                if action.op == "SEND_F":
                    assert before == Action(action.stage, "F", action.micro_batch), "before the local backward"


@settings(deadline=None, max_examples=200)
@given(placements(objectives(names=("overlapping",))), MICRO_BATCHES)
def test_a_stage_pulls_its_own_loss_as_soon_as_it_can(case: Case, micro_batches: int) -> None:
    """Forward, send, pull, send down: nothing else comes between, so the stage below does not wait for a backward."""
    objective, stages = case
    of_stages = duties(objective.usual, stages)
    for schedule in alone(objective, objective.usual, stages, micro_batches):
        for place, action in enumerate(schedule):
            if action.op == "I" and action.flow == of_stages[action.stage].own:
                begin = schedule.index(Action(action.stage, "F", action.micro_batch))
                between = {other.op for other in schedule[begin + 1 : place]}
                assert between <= {"SEND_F", "I", "SEND_B"}
            if action.op == "SEND_B":
                made = [Action(action.stage, "I", action.micro_batch, action.flow)]
                made.append(Action(action.stage, "B", action.micro_batch))
                assert schedule[place - 1] in made, "what is there is sent at once"


@settings(deadline=None, max_examples=100)
@given(placements(objectives(names=("overlapping",))), MICRO_BATCHES)
def test_forward_passes_go_on_while_a_gradient_is_under_way(case: Case, micro_batches: int) -> None:
    """A gradient from `lag` ranks above is waited for after as many more forward passes, if there are any left."""
    objective, stages = case
    of_phase = flows(objective.usual, stages)
    for rank, schedule in enumerate(alone(objective, objective.usual, stages, micro_batches)):
        for place, action in enumerate(schedule):
            if action.op == "RECV_B":
                assert action.flow is not None and action.micro_batch is not None
                lag = stages[of_phase[action.flow].top].pipeline_rank - rank
                forward = [
                    other.micro_batch for other in schedule[:place] if (other.stage, other.op) == (action.stage, "F")
                ]
                assert forward[-1] == min(action.micro_batch + lag, micro_batches - 1)


OVERLAPPING = {"name": "overlapping", "chunks": 3, "overlap": 1, "own_weight": 0.5, "first_head": False}
TEXTS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"blocks": 2, "pipeline": 2, "micro_batches": 2, "chunks": 2},
        ["0F0 0SEND_F0 0B0 0F1 0SEND_F1 0B1 0U", "1RECV_F0 1F0 1B0 1RECV_F1 1F1 1B1 1U"],
    ),
    (
        {"blocks": 2, "pipeline": 2, "micro_batches": 3, "name": "backprop"},
        [
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0.0 0B0 0F2 0SEND_F2 0RECV_B1.0 0B1 0RECV_B2.0 0B2 0U",
            "1RECV_F0 1F0 1B0 1SEND_B0.0 1RECV_F1 1F1 1B1 1SEND_B1.0 1RECV_F2 1F2 1B2 1SEND_B2.0 1U",
        ],
    ),
    (
        {"blocks": 3, "pipeline": 3, "micro_batches": 2, **OVERLAPPING},
        [
            "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0.0 0B0 0RECV_B1.0 0B1 0U",
            "1RECV_F0 1F0 1SEND_F0 1I0.0 1SEND_B0.0 1RECV_F1 1F1 1SEND_F1 1I1.0 1SEND_B1.0 "
            "1RECV_B0.1 1B0 1RECV_B1.1 1B1 1U",
            "2RECV_F0 2F0 2B0 2SEND_B0.1 2RECV_F1 2F1 2B1 2SEND_B1.1 2U",
        ],
    ),
    (  # all on one rank: each stage can go back when the one above it has its loss
        {"blocks": 3, "pipeline": 1, "micro_batches": 1, **OVERLAPPING},
        ["0F0 1F0 1I0.0 0B0 2F0 2B0 1B0 0U 1U 2U"],
    ),
    (  # by 2: the last loss passes stage 1 by a pull on its way to stage 0, beside that of stage 1
        {"blocks": 3, "pipeline": 3, "micro_batches": 1, **OVERLAPPING, "overlap": 2, "first_head": True},
        [
            "0F0 0SEND_F0 0RECV_B0.0 0RECV_B0.1 0B0 0U",
            "1RECV_F0 1F0 1SEND_F0 1I0.0 1SEND_B0.0 1RECV_B0.1 1I0.1 1SEND_B0.1 1B0 1U",
            "2RECV_F0 2F0 2B0 2SEND_B0.1 2U",
        ],
    ),
    (  # what is below stays as it was initialised
        {"blocks": 2, "pipeline": 2, "micro_batches": 2, "name": "last", "trained_blocks": 1},
        ["0F0 0SEND_F0 0F1 0SEND_F1", "1RECV_F0 1F0 1B0 1RECV_F1 1F1 1B1 1U"],
    ),
]


@pytest.mark.parametrize(("sizes", "texts"), TEXTS)
def test_the_text_of_a_schedule(sizes: dict[str, Any], texts: list[str]) -> None:
    schedules, _, _ = make(**sizes)
    assert [to_text(schedule) for schedule in schedules] == texts
    assert [parse(text) for text in texts] == schedules


def test_the_text_of_a_delayed_schedule() -> None:
    objective = build(2, "delayed", chunks=2)
    below, above = patterns(objective, objective.usual, cut(objective, 2, COSTS), 2)
    assert (to_text(below.fill), to_text(below.body)) == ("0F0 0SEND_F0", "0F1 0SEND_F1 0RECV_B0.0 0B0")
    assert (to_text(below.goes_on), to_text(below.drains)) == ("0F2 0SEND_F2 0RECV_B1.0 0B1", "0RECV_B1.0 0B1")
    assert to_text(above.body) == "1RECV_F0 1F0 1B0 1SEND_B0.0 1RECV_F1 1F1 1B1 1SEND_B1.0"
    assert not above.fill and not above.goes_on and not above.drains
    assert to_text(below.alone) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0.0 0B0 0RECV_B1.0 0B1 0U"


# ------------------------------------------------------------------------------------------------------ the text

NUMBERS = st.integers(0, 999)
UPDATES = st.builds(Action, NUMBERS, st.just("U"))
OF_FLOWS = st.builds(Action, NUMBERS, st.sampled_from(["I", "RECV_B", "SEND_B"]), NUMBERS, NUMBERS)
OTHERS = st.builds(Action, NUMBERS, st.sampled_from(sorted(OPS - {"U", "I", "RECV_B", "SEND_B"})), NUMBERS)


@settings(deadline=None)
@given(st.lists(UPDATES | OF_FLOWS | OTHERS))
def test_text_and_back_for_any_actions(actions: list[Action]) -> None:
    assert parse(to_text(actions)) == actions


def test_the_letters_are_those_of_torch() -> None:
    assert OPS - {"U"} < {one.value for one in _ComputationType}
    for action in (Action(2, "SEND_F", 3), Action(12, "F", 0), Action(0, "I", 7)):
        theirs = _Action.from_str(str(action))
        assert str(theirs) == str(action)
        assert (theirs.stage_index, theirs.computation_type.value) == (action.stage, action.op)


WORDS = ["F0", "0F", "0U1", "0X1", "0G1", "0f1", "0F-1", "0F1x", "x0F1", "0", "0RS1", "-1F0"]
WORDS += ["0F0.1", "0B0.1", "0I0", "0RECV_B1", "0SEND_B1", "0SEND_B1.", "0SEND_B.1", "0U.1", "0U1.1"]
WORDS += ["0RECV_B1.1.1", "0RECV_F1.0", "0R1", "0S1", "0P1.0", "0RG1.0", "0SG1.0"]


@pytest.mark.parametrize("word", WORDS)
def test_a_word_that_is_no_action_is_named(word: str) -> None:
    with pytest.raises(ValueError, match="is no action: expected <stage>U, <stage><op><micro-batch>") as caught:
        parse(f"0F0 {word} 0U")
    assert repr(word) in str(caught.value)


# ------------------------------------------------------------------------------------------------ planted errors


def edited(schedule: list[Action], old: str, new: str) -> list[Action]:
    text = to_text(schedule)
    assert old in text, "the error is really planted"
    return parse(text.replace(old, new))


LOCAL = {"blocks": 2, "pipeline": 2, "micro_batches": 2, "chunks": 2}
SPANNING = {"blocks": 2, "pipeline": 2, "micro_batches": 3, "chunks": 1}
OVERLAPPED = {"blocks": 3, "pipeline": 3, "micro_batches": 2, **OVERLAPPING}
PASSING = {"blocks": 3, "pipeline": 3, "micro_batches": 1, **OVERLAPPING, "overlap": 2, "first_head": True}
PLANTED: list[tuple[dict[str, Any], int, str, str, str]] = [
    # sizes, rank, what becomes what, what is said
    (LOCAL, 0, "0SEND_F1 ", "", r"deadlock: pipeline ranks are about to do \{1: '1RECV_F1'\}"),
    (LOCAL, 1, "1RECV_F1 ", "", r"1F1 before 1RECV_F1"),
    (LOCAL, 1, "1RECV_F1 1F1 1B1 ", "", r"messages nobody received"),
    (LOCAL, 0, "0F0 0SEND_F0", "0SEND_F0 0F0", r"0SEND_F0 before 0F0"),
    (LOCAL, 0, "0F0 0SEND_F0 0B0", "0B0 0F0 0SEND_F0", r"0B0 before .*0F0"),
    (LOCAL, 1, "1RECV_F0 1F0 1B0 1RECV_F1", "1RECV_F1 1F0 1B0 1RECV_F0", r"1RECV_F1: the message waiting is 0"),
    (LOCAL, 0, "0B0", "0B0 0B0", r"0B0 twice"),
    (LOCAL, 0, "0B1 0U", "0U 0B1", r"0U before 0B1"),
    (LOCAL, 0, "0B1 ", "", r"0U before 0B1"),
    (LOCAL, 1, "1RECV_F1 1F1 1B1 1U", "1U 1RECV_F1 1F1 1B1", r"1RECV_F1 after 1U"),
    (SPANNING, 0, "0RECV_B1.0 0B1", "0B1 0RECV_B1.0", r"0B1 before .*0RECV_B1\.0"),
    (
        SPANNING,
        0,
        "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0.0 0B0",
        "0F0 0F1 0RECV_B0.0 0B0 0SEND_F0 0SEND_F1",
        r"deadlock.*0: '0RECV_B0\.0', 1: '1RECV_F0'",
    ),
    (SPANNING, 1, "1B1 1SEND_B1.0", "1SEND_B1.0 1B1", r"1SEND_B1\.0 before 1B1"),
    (SPANNING, 1, "1SEND_B2.0 ", "", r"deadlock.*0: '0RECV_B2\.0'"),
    (SPANNING, 0, "0RECV_B1.0 0B1 0RECV_B2.0 0B2", "0RECV_B2.0 0B2 0RECV_B1.0 0B1", r"0RECV_B2\.0: the message wait"),
    (OVERLAPPED, 1, "1F0 1SEND_F0 1I0.0 1SEND_B0.0", "1I0.0 1F0 1SEND_F0 1SEND_B0.0", r"1I0\.0 before 1F0"),
    (OVERLAPPED, 1, "1I0.0 1SEND_B0.0", "1SEND_B0.0 1I0.0", r"1SEND_B0\.0 before 1I0\.0"),
    (
        OVERLAPPED,
        1,
        "1I1.0 1SEND_B1.0 1RECV_B0.1 1B0 1RECV_B1.1 1B1",
        "1RECV_B0.1 1B0 1RECV_B1.1 1B1 1I1.0 1SEND_B1.0",
        r"1B1 before 1I1\.0",
    ),
    (OVERLAPPED, 1, "1I0.0", "1I0.1", r"1I0\.1: stage 1 pulls \(0,\)"),
    (OVERLAPPED, 1, "1SEND_B0.0 ", "", r"0RECV_B0\.0: the message waiting is 1"),
    (OVERLAPPED, 1, "1RECV_B1.1 ", "", r"1B1 before 1RECV_B1\.1"),
    (OVERLAPPED, 0, "0RECV_B0.0 ", "", r"0B0 before 0RECV_B0\.0"),
    (PASSING, 1, "1RECV_B0.1 1I0.1", "1I0.1 1RECV_B0.1", r"1I0\.1 before 1RECV_B0\.1"),
    (PASSING, 1, "1I0.1 1SEND_B0.1 1B0", "1B0 1I0.1 1SEND_B0.1", r"1B0 before 1I0\.1"),
]


@pytest.mark.parametrize(("sizes", "rank", "old", "new", "said"), PLANTED)
def test_an_error_in_a_schedule_is_found(sizes: dict[str, Any], rank: int, old: str, new: str, said: str) -> None:
    schedules, stages, phase = make(**sizes)
    check_schedules(schedules, stages, phase, in_flight=2)
    schedules[rank] = edited(schedules[rank], old, new)
    with pytest.raises(AssertionError, match=said):
        check_schedules(schedules, stages, phase, in_flight=2)


def test_errors_between_stages_of_one_rank_are_found() -> None:
    """No message goes from one to the other, but the order counts."""
    schedules, stages, phase = make(blocks=2, pipeline=1, micro_batches=1, name="deep_supervision", chunks=2)
    assert to_text(schedules[0]) == "0F0 1F0 1B0 0B0 0U 1U"
    for wrong, said in [("1F0 0F0 1B0 0B0 0U 1U", "1F0 before 0F0"), ("0F0 1F0 0B0 1B0 0U 1U", "0B0 before 1B0")]:
        with pytest.raises(AssertionError, match=said):
            check_schedules([parse(wrong)], stages, phase, in_flight=1)


def test_a_schedule_may_need_more_places_than_the_channel_has() -> None:
    """Six micro-batches ahead: both channels fill up, and each rank waits for the other to take something."""
    (_, above), stages, phase = make(blocks=2, pipeline=2, micro_batches=6, chunks=1)
    below = parse(
        " ".join([*(f"0F{i} 0SEND_F{i}" for i in range(6)), *(f"0RECV_B{i}.0 0B{i}" for i in range(6)), "0U"])
    )
    with pytest.raises(AssertionError, match=r"deadlock: .*0: '0SEND_F5', 1: '1SEND_B2\.0'"):
        check_schedules([below, above], stages, phase, in_flight=1)
    assert check_schedules([below, above], stages, phase, in_flight=2) == 3


def test_how_far_a_rank_runs_ahead_is_bounded_by_the_channel() -> None:
    """Without a receiver, rank 0 sends `in_flight` + 1 messages and stands before the next."""
    schedules, stages, phase = make(blocks=2, pipeline=2, micro_batches=8, chunks=2)
    for in_flight in (1, 2, 4):
        waiting = rf"deadlock: pipeline ranks are about to do \{{0: '0SEND_F{in_flight + 1}'\}}"
        with pytest.raises(AssertionError, match=waiting):
            check_schedules([schedules[0], []], stages, phase, in_flight)
