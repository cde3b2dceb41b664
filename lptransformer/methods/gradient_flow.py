"""Which gradients cross which borders, derived from the spans of a phase and the stages; the lag of copies of weights.

docs/design.md, "Gradients across borders", says why it is done this way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lptransformer.methods.objectives import Objective
from lptransformer.methods.spans import Phase, Span
from lptransformer.methods.stages import StagePlan


@dataclass(frozen=True)
class Flow:
    """A gradient on its way down, from the head of stage `top` to the weights of stage `bottom`.

    It crosses every border between them. The heads of `spans` add to it where they are passed. Below `bottom` nothing
    trains.
    """

    number: int
    top: int
    bottom: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Duty:
    """What one stage does with gradients in a phase.

    `loss_weight` is the weight of its own head's loss in the gradient of its blocks (None: no head), and `own` the
    flow below that this loss joins. `above` holds (flow, weight) for the flows that come down to its output. `pulls`
    are the flows that it hands down by an inputs-only backward, `down` the one that falls out of its ordinary backward.
    """

    loss_weight: float | None
    own: int | None
    above: tuple[tuple[int, float], ...]
    pulls: tuple[int, ...]
    down: int | None

    @property
    def below(self) -> tuple[int, ...]:
        """The flows that it hands down."""
        return self.pulls if self.down is None else (*self.pulls, self.down)

    @property
    def split(self) -> bool:
        """Whether its head works at a copy of the hidden states: the blocks take another gradient than the head."""
        return self.loss_weight is not None and (self.loss_weight != 1.0 or self.own in self.pulls)


def flows(phase: Phase, stages: Sequence[StagePlan]) -> list[Flow]:
    """The flows of a phase. Losses that reach down to the same block with the same weights are one flow."""
    together: dict[Span | int, list[Span]] = {}
    for span in phase.spans:
        together.setdefault(span.first if phase.own_weight is None else span, []).append(span)
    found: list[Flow] = []
    for spans in together.values():
        top = next(stage.index for stage in stages if stage.last_block == spans[-1].last)
        reached = [s.index for s in stages if s.trained and phase.weight(spans[-1], s.first_block) > 0]
        if reached and reached[0] < top:
            found.append(Flow(len(found), top, reached[0], tuple(spans)))
    return found


def duty(stage: StagePlan, phase: Phase, of_phase: Sequence[Flow]) -> Duty:
    """What `stage` does with the flows of its phase."""
    head = next((span for span in phase.spans if span.last == stage.last_block), None) if stage.has_head else None
    loss_weight = None if head is None else phase.weight(head, stage.first_block)
    below = [flow for flow in of_phase if flow.bottom < stage.index <= flow.top]
    above = tuple(
        (flow.number, phase.weight(flow.spans[-1], stage.first_block))
        for flow in of_phase
        if flow.bottom <= stage.index < flow.top
    )
    own = next((flow.number for flow in below if head in flow.spans), None)

    def in_ordinary_backward(flow: Flow) -> bool:
        """Whether the gradient for the stage's weights is this flow's gradient and nothing else."""
        return (
            stage.trained
            and loss_weight in (None, float(own == flow.number))
            and all(weight == float(number == flow.number) for number, weight in above)
        )

    down = next((flow.number for flow in below if in_ordinary_backward(flow)), None)
    return Duty(loss_weight, own, above, tuple(f.number for f in below if f.number != down), down)


def duties(phase: Phase, stages: Sequence[StagePlan]) -> list[Duty]:
    """The duty of every stage."""
    of_phase = flows(phase, stages)
    return [duty(stage, phase, of_phase) for stage in stages]


def clip_groups(phase: Phase, stages: Sequence[StagePlan]) -> list[tuple[int, ...]]:
    """The trained stages that clip and skip together, in ascending order; independent of the placement on ranks.

    Where losses are added up: all stages that spans connect. Where they are weighted: those between two cuts of the
    phase, because the stages that overlapping spans connect are all of them, and no stage should wait for all others.
    """
    if phase.own_weight is None and not phase.clip_at:
        belongs = [{s.index for s in stages if s.first_block in span} for span in phase.spans]
    else:
        cuts = {cut for span in phase.spans for cut in (span.first, span.last + 1)}
        starts = sorted({0, *cuts, *phase.clip_at})
        runs = [range(a, b) for a, b in zip(starts, starts[1:], strict=False)]
        belongs = [{s.index for s in stages if s.first_block in run} for run in runs]
    groups = [{stage.index} for stage in stages if stage.trained]
    for members in belongs:
        touched = [group for group in groups if group & members]
        groups = [group for group in groups if not group & members] + ([set().union(*touched)] if touched else [])
    return sorted(tuple(sorted(group)) for group in groups)


def crossing(of_phase: Sequence[Flow], stage: int) -> list[int]:
    """The flows that cross the border below a stage."""
    return [flow.number for flow in of_phase if flow.bottom < stage <= flow.top]


def borders_carry_gradients(objective: Objective, stages: Sequence[StagePlan]) -> bool:
    """Whether a gradient crosses from one stage to another in some phase."""
    return any(flows(phase, stages) for phase in objective.phases)


def copy_lags(stages: Sequence[StagePlan], followed: str | None, in_flight: int, rounds: int) -> dict[int, int]:
    """The stages whose auxiliary heads hold read-only copies, and their lag: the number of updates after which a
    version has always arrived, in steady state.

    `followed` is the "last" stage or the "next" one (None: there are no copies). A stage can be `in_flight` + 1
    messages ahead of the next, and `rounds` messages make an update. The hops are counted in heads, as if each were on
    a pipeline rank of its own, so that the lag (and with it the result) does not depend on the placement.
    """
    if followed is None:
        return {}
    heads = [stage.index for stage in stages if stage.has_head]
    hops = [len(heads) - 1 - number if followed == "last" else 1 for number in range(len(heads) - 1)]
    return {index: math.ceil(hop * (2 * in_flight + 1) / rounds) for index, hop in zip(heads, hops, strict=False)}
