"""1F1B beside a trace: how the same blocks would run by backprop, simulated from the measured times of their actions.

Same pipeline ranks, same blocks on each, same micro-batches. Backprop has one head, the last: what auxiliary heads took
is left out. Links cost nothing, and neither do the copies into messages, which is in 1F1B's favour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lptransformer.methods import objectives
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.stages import cut
from lptransformer.planning.simulate import StageSeconds, simulate
from lptransformer.run_folder.trace import HEAD, WAIT, Slice, Trace, slices


@dataclass(frozen=True)
class Measured:
    """Medians of what a stage's actions took, in seconds, without waiting. Zero where it has no such action."""

    forward: float  # of the blocks
    head: float  # forward, loss, and the loss's gradient
    backward: float
    update: float


def medians(trace: Trace) -> dict[int, Measured]:
    """By stage, over all updates and replicas of the trace."""
    found: dict[tuple[int, str], list[float]] = {}
    for one in slices(trace):
        if one.action is not None:
            found.setdefault((one.action.stage, one.kind), []).append(one.seconds)
    stages = sorted({stage for report in trace.reports for stage, _, _ in report.stages})
    kinds = ("forward", HEAD, "backward", "update")
    return {stage: Measured(*(median(found.get((stage, kind), [0.0])) for kind in kinds)) for stage in stages}


def simulated_1f1b(trace: Trace, in_flight: int, extra_blocks: float = 0.0) -> list[Slice]:
    """The slices of as many updates as the trace has, waiting among them, from an empty pipeline.

    `in_flight` as in the run. An auxiliary head of the run runs `extra_blocks` blocks backward in its stage's backward
    action (a read-only one, which has no weight gradient, counts half); they are taken off by their number. A stage
    that the run does not train gets the backward and update of the others, by the seconds of its forward pass.
    """
    blocks = {stage: (first, last) for report in trace.reports for stage, first, last in report.stages}
    rank_of = {stage: report.pipeline_rank for report in trace.reports for stage, _, _ in report.stages}
    seconds = _of_blocks(medians(trace), blocks, extra_blocks)
    ranks = sorted(set(rank_of.values()))
    own = [[stage for stage in sorted(blocks) if rank_of[stage] == rank] for rank in ranks]
    whole = objectives.build(max(last for _, last in blocks.values()) + 1, "backprop")
    sizes = [sum(blocks[stage][1] - blocks[stage][0] + 1 for stage in stages) for stages in own]
    plans = cut(whole, len(ranks), ModelCosts(1.0, 0.0, 0.0), sizes)  # the cuts are given, nothing is weighed
    of_rank = [_sum([seconds[stage] for stage in stages]) for stages in own]
    timeline = simulate(
        whole,
        plans,
        [StageSeconds(one.forward + one.head, one.backward, update=one.update) for one in of_rank],
        micro_batches=trace.reports[0].micro_batches,
        updates=len(trace.updates),
        in_flight=in_flight,
    )
    found: list[Slice] = []
    clock = dict.fromkeys(ranks, 0.0)
    names = {"F": "forward", "B": "backward", "U": "update"}
    for event in timeline.events:
        place = (event.pipeline_rank, 0, trace.updates[event.update])
        kind, head = names[event.action.op], of_rank[event.pipeline_rank].head if event.action.op == "F" else 0.0
        parts = ((WAIT, clock[event.pipeline_rank], event.start), (kind, event.start, event.end - head))
        for part, start, end in (*parts, (HEAD, event.end - head, event.end)):
            if end > start:
                found.append(Slice(*place, part, start, end, event.action))
        clock[event.pipeline_rank] = event.end
    for rank, ended in clock.items():
        if ended < timeline.total_seconds:
            found.append(Slice(rank, 0, trace.updates[-1], WAIT, ended, timeline.total_seconds))
    return found


def _of_blocks(
    measured: Mapping[int, Measured], blocks: Mapping[int, tuple[int, int]], extra_blocks: float
) -> dict[int, Measured]:
    """The stages as they would be in backprop: no auxiliary heads, all of them trained."""
    found = {}
    last_stage = max(measured)
    for stage, one in measured.items():
        number = blocks[stage][1] - blocks[stage][0] + 1
        if stage == last_stage or one.head == 0.0:
            found[stage] = one
        else:
            found[stage] = Measured(one.forward, 0.0, one.backward * number / (number + extra_blocks), one.update)
    trained = [one for one in found.values() if one.backward > 0.0]
    whole = _sum(trained)
    for stage, one in found.items():
        if one.backward == 0.0 and trained:
            ratio = one.forward / whole.forward
            found[stage] = Measured(one.forward, one.head, whole.backward * ratio, whole.update * ratio)
    return found


def _sum(parts: Sequence[Measured]) -> Measured:
    names = ("forward", "head", "backward", "update")
    return Measured(*(sum(getattr(part, name) for part in parts) for name in names))


def idle_share(timeline: Sequence[Slice], pipeline_rank: int) -> float:
    """Waiting over all time on a pipeline rank of a simulated timeline."""
    own = [one for one in timeline if one.pipeline_rank == pipeline_rank]
    return sum(one.seconds for one in own if one.kind == WAIT) / sum(one.seconds for one in own)
