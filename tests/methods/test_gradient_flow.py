"""Which gradients go where: followed by name through all stages, every weight gets what the definition says.

A gradient is named by the heads whose losses are in it and how much of each. All stages do what their duties say, and
what comes out is compared with the definitions in objective_cases.py, which know no stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from objective_cases import (
    COSTS,
    Gradient,
    any_spans,
    every_objective,
    every_placement,
    objectives,
    placements,
    wanted_at_border,
    wanted_of_block,
)

from lptransformer.methods.gradient_flow import Duty, borders_carry_gradients, clip_groups, crossing, duties, flows
from lptransformer.methods.objectives import Objective, build
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan, cut


@dataclass
class Followed:
    """What all stages of a phase computed, by stage."""

    weights: list[Gradient]
    down: list[dict[int, Gradient]]  # at the stage's input, by flow


def total(*parts: tuple[float, Gradient]) -> Gradient:
    """The weighted sum of gradients."""
    heads = {head for _, gradient in parts for head in gradient}
    sums = {head: sum(weight * gradient.get(head, 0.0) for weight, gradient in parts) for head in heads}
    return {head: share for head, share in sums.items() if abs(share) > 1e-12}


def follow(of_stages: Sequence[Duty], stages: Sequence[StagePlan]) -> Followed:
    """Do what the duties say for one micro-batch, from the last stage down."""
    found = Followed([{} for _ in stages], [{} for _ in stages])
    coming: dict[int, Gradient] = {}  # at the output of the stage, by flow
    for stage in reversed(stages):
        duty = of_stages[stage.index]
        taken = [flow for flow, _ in duty.above]
        assert sorted(taken) == sorted(coming), "each flow that comes down is taken once, none is waited for in vain"
        assert len(set(duty.below)) == len(duty.below), "each flow is handed down once"
        own: Gradient = {} if duty.loss_weight is None else {stage.last_block: 1.0}
        # A head at a copy of the hidden states leaves its loss's gradient there, to be weighed or pulled. Else the
        # blocks' graph is the head's too: the backward pass takes the loss in full, and there is nothing to pull.
        at_copy = own if duty.split else {}
        share = (duty.loss_weight or 0.0) if duty.split else 1.0
        weights = total((share, own), *((weight, coming[flow]) for flow, weight in duty.above))
        down = {
            flow: total((1.0, at_copy if duty.own == flow else {}), (1.0, coming.get(flow, {}))) for flow in duty.pulls
        }
        if duty.down is not None:
            down[duty.down] = weights
        found.weights[stage.index], found.down[stage.index] = weights, down
        coming = down
    assert not coming, "nothing is handed down by the first stage"
    return found


def check(phase: Phase, stages: Sequence[StagePlan], of_stages: Sequence[Duty]) -> None:
    """All weights get what they are to get, and each border hands down the losses' own gradients and no more.

    A pull costs a pass more: there is none where the weights' own gradient is what is to be handed down.
    """
    found = follow(of_stages, stages)
    for stage in stages:
        assert (of_stages[stage.index].loss_weight is not None) == stage.has_head
        for block in range(stage.first_block, stage.last_block + 1):
            assert found.weights[stage.index] == pytest.approx(wanted_of_block(phase, block))
        down = sorted(found.down[stage.index].values(), key=sorted)
        assert down == [pytest.approx(one) for one in wanted_at_border(phase, stage.first_block)]
        duty, at_input = of_stages[stage.index], found.down[stage.index]
        as_weights = [flow for flow in duty.below if at_input[flow] == pytest.approx(found.weights[stage.index])]
        assert as_weights == ([] if duty.down is None else [duty.down])


def small() -> Iterator[tuple[Objective, list[StagePlan]]]:
    """All objectives over up to 4 blocks, placed in all ways."""
    for num_blocks in range(1, 5):
        for objective in every_objective(num_blocks):
            for stages in every_placement(objective):
                yield objective, stages


def test_every_weight_gets_its_gradient_in_all_small_cases() -> None:
    for objective, stages in small():
        for phase in objective.phases:
            check(phase, stages, duties(phase, stages))


@settings(deadline=None, max_examples=150)  # a busy machine is no error
@given(placements(objectives(most_blocks=16)))
def test_every_weight_gets_its_gradient(case: tuple[Objective, list[StagePlan]]) -> None:
    objective, stages = case
    for phase in objective.phases:
        check(phase, stages, duties(phase, stages))


@settings(deadline=None, max_examples=150)
@given(placements(any_spans()))
def test_every_weight_gets_its_gradient_from_any_spans(case: tuple[Objective, list[StagePlan]]) -> None:
    objective, stages = case
    check(objective.usual, stages, duties(objective.usual, stages))


DUTIES: dict[str, tuple[Objective, list[Duty]]] = {
    # One block per stage. What a stage does, from the definition: (weight of its loss, flow of its loss, flows from
    # above with their weights, flows it pulls, flow of its backward).
    "backprop": (build(3, "backprop"), [Duty(None, None, ((0, 1.0),), (), None), Duty(None, None, ((0, 1.0),), (), 0)]),
    "greedy": (build(2, "greedy"), [Duty(1.0, None, (), (), None)] * 2),
    "last": (build(3, "last", trained_blocks=1), [Duty(None, None, (), (), None)] * 2),
    "deep supervision": (
        build(3, "deep_supervision", chunks=3),
        [Duty(1.0, None, ((0, 1.0),), (), None), Duty(1.0, 0, ((0, 1.0),), (), 0), Duty(1.0, 0, (), (), 0)],
    ),
    "overlapping": (
        build(3, "overlapping", chunks=3, overlap=1, own_weight=0.25, first_head=True),
        [Duty(0.25, None, ((0, 0.75),), (), None), Duty(0.25, 0, ((1, 0.75),), (0,), None), Duty(1.0, 1, (), (), 1)],
    ),
    "overlapping, furthest loss": (
        build(3, "overlapping", chunks=3, overlap=1, own_weight=0.0, first_head=True),
        [Duty(0.0, None, ((0, 1.0),), (), None), Duty(0.0, 0, ((1, 1.0),), (0,), None), Duty(1.0, 1, (), (), 1)],
    ),
    "overlapping, own loss": (
        build(3, "overlapping", chunks=3, overlap=1, own_weight=1.0, first_head=True),
        [Duty(1.0, None, (), (), None)] * 3,
    ),
    "overlapping by 2, furthest loss": (  # the last loss passes the middle, where its weight is 1 too, and goes on
        build(3, "overlapping", chunks=3, overlap=2, own_weight=0.0, first_head=True),
        [Duty(0.0, None, ((0, 1.0),), (), None), Duty(0.0, None, ((0, 1.0),), (), 0), Duty(1.0, 0, (), (), 0)],
    ),
}


@pytest.mark.parametrize("name", DUTIES)
def test_duties_by_hand(name: str) -> None:
    objective, wanted = DUTIES[name]
    num_blocks = objective.num_blocks
    got = duties(objective.usual, cut(objective, num_blocks, COSTS, [1] * num_blocks))
    assert got[: len(wanted)] == wanted


def test_in_a_global_update_a_head_learns_from_a_copy_and_moves_no_block() -> None:
    objective = build(3, "greedy", backprop_every=2)
    assert objective.backprop is not None
    got = duties(objective.backprop, cut(objective, 3, COSTS))
    assert got == [Duty(0.0, None, ((0, 1.0),), (), None), Duty(0.0, None, ((0, 1.0),), (), 0), Duty(1.0, 0, (), (), 0)]
    assert [duty.split for duty in got] == [True, True, False]


WRONG: dict[str, tuple[int, Callable[[Duty], Duty]]] = {
    # what a stage of three would do wrong, in overlapping with own_weight 0.25 and a head behind every block
    "its loss not weighed": (0, lambda duty: replace(duty, loss_weight=1.0)),
    "its loss dropped": (1, lambda duty: replace(duty, loss_weight=0.0)),
    "what comes from above not weighed": (0, lambda duty: replace(duty, above=((0, 1.0),))),
    "what comes from above dropped": (1, lambda duty: replace(duty, above=())),
    "waiting for what never comes": (2, lambda duty: replace(duty, above=((1, 1.0),))),
    "the weighted gradient handed down": (1, lambda duty: replace(duty, pulls=(), down=0)),
    "another's loss handed down": (1, lambda duty: replace(duty, own=None)),
    "nothing handed down": (1, lambda duty: replace(duty, own=None, pulls=())),
    "handed down twice": (1, lambda duty: replace(duty, pulls=(0, 0))),
    "handed on to where it is not wanted": (1, lambda duty: replace(duty, pulls=(0, 1))),
    "handed down under another name": (2, lambda duty: replace(duty, own=0, down=0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_duty_is_found(name: str) -> None:
    objective = build(3, "overlapping", chunks=3, overlap=1, own_weight=0.25, first_head=True)
    stages = cut(objective, 3, COSTS)
    of_stages = duties(objective.usual, stages)
    check(objective.usual, stages, of_stages)
    index, wrong = WRONG[name]
    of_stages[index] = wrong(of_stages[index])
    with pytest.raises(AssertionError):
        check(objective.usual, stages, of_stages)


# --------------------------------------------------------------------------------------------------------- flows


@settings(deadline=None, max_examples=100)
@given(placements(objectives() | any_spans()))
def test_flows_are_what_crosses(case: tuple[Objective, list[StagePlan]]) -> None:
    """At each border those that go between the stages of both sides, each with the losses that have joined it."""
    objective, stages = case
    anything = False
    for phase in objective.phases:
        of_phase = flows(phase, stages)
        assert [flow.number for flow in of_phase] == list(range(len(of_phase)))
        found = follow(duties(phase, stages), stages)
        for stage in stages:
            down = found.down[stage.index]
            assert crossing(of_phase, stage.index) == sorted(down)
            for flow in of_phase:
                assert (flow.number in down) == (flow.bottom < stage.index <= flow.top)
                heads = {span.last for span in flow.spans if span.last >= stage.first_block}
                assert flow.number not in down or down[flow.number].keys() == heads
            anything |= bool(down)
        for flow in of_phase:
            assert stages[flow.top].last_block == max(span.last for span in flow.spans), "from the highest head"
    assert borders_carry_gradients(objective, stages) == anything


# --------------------------------------------------------------------------------------------------- clip groups


def wanted_clip_groups(objective: Objective, phase: Phase) -> list[list[int]]:
    """The trained blocks that clip together, from the definitions: where a span crosses, nothing is cut.

    In a weighted mean all ends and starts of spans cut, and in `delayed` its runs.
    """
    cuts = set(phase.clip_at)
    for block in range(objective.num_blocks):
        starts = any(block in (span.first, span.last + 1) for span in phase.spans)
        crossed = any(span.first < block <= span.last for span in phase.spans)
        if not crossed or (phase.own_weight is not None and starts):
            cuts.add(block)
    groups: list[list[int]] = []
    for block in range(objective.num_blocks):
        groups += [[]] if block in cuts else []
        groups[-1].append(block)
    return [group for group in groups if objective.trained.issuperset(group)]


def blocks_of_groups(phase: Phase, stages: Sequence[StagePlan]) -> list[list[int]]:
    plans = [[stages[index] for index in group] for group in clip_groups(phase, stages)]
    return [[block for s in group for block in range(s.first_block, s.last_block + 1)] for group in plans]


def test_the_placement_has_no_say_in_what_clips_together() -> None:
    for objective, stages in small():
        for phase in objective.phases:
            assert blocks_of_groups(phase, stages) == wanted_clip_groups(objective, phase)


@settings(deadline=None, max_examples=100)
@given(placements(objectives(most_blocks=16) | any_spans()))
def test_what_clips_together(case: tuple[Objective, list[StagePlan]]) -> None:
    objective, stages = case
    for phase in objective.phases:
        assert blocks_of_groups(phase, stages) == wanted_clip_groups(objective, phase)


GROUPS: list[tuple[Objective, list[list[int]]]] = [
    (build(4, "backprop"), [[0, 1, 2, 3]]),
    (build(4, "chunked", chunks=[1, 3]), [[0], [1, 2, 3]]),
    (build(4, "greedy"), [[0], [1], [2], [3]]),
    (build(4, "last", trained_blocks=2), [[2, 3]]),
    (build(4, "deep_supervision", chunks=4), [[0, 1, 2, 3]]),
    (build(4, "delayed", chunks=2), [[0, 1], [2, 3]]),
    (build(4, "overlapping", chunks=[1, 2, 1], overlap=1, own_weight=0.5, first_head=False), [[0], [1, 2], [3]]),
    # no span begins or ends between the first two runs
    (build(4, "overlapping", chunks=4, overlap=2, own_weight=0.5, first_head=False), [[0], [1, 2], [3]]),
    (build(4, "overlapping", chunks=4, overlap=2, own_weight=0.5, first_head=True), [[0], [1], [2], [3]]),
]


@pytest.mark.parametrize("number", range(len(GROUPS)))
def test_clip_groups_by_hand(number: int) -> None:
    objective, wanted = GROUPS[number]
    for stages in every_placement(objective):
        assert blocks_of_groups(objective.usual, stages) == wanted


def test_a_global_update_clips_the_whole_model() -> None:
    for name in ("chunked", "deep_supervision"):
        objective = build(4, name, chunks=2, backprop_every=2)
        for stages in every_placement(objective):
            assert objective.backprop is not None
            assert blocks_of_groups(objective.backprop, stages) == [[0, 1, 2, 3]]
