"""Replays the action lists that the engine runs, with costs: when every action begins and ends on every pipeline rank.

What is modelled: ranks compute one action after another; a message leaves when it is sent, the one before it has left
and a receive is posted for it (`in_flight` are, ahead), and takes latency + bytes / bandwidth; a stage that clips with
stages of other ranks updates when all of them are ready to. Nothing is random.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.gradient_flow import clip_groups, duties
from lptransformer.methods.objectives import Objective
from lptransformer.methods.schedule import RECV_B, RECV_F, SEND_B, SEND_F, SENDS, Action, one_update
from lptransformer.methods.stages import StagePlan, cut

WINDOW = 2  # micro-batches per pipeline rank that are replayed before, and for, the extrapolation
MOST_MICRO_BATCHES = 768  # of a rank that are replayed where an update does not take as long as the one before


@dataclass(frozen=True)
class StageSeconds:
    """What the actions of a stage take. The loss and its gradients are taken in the forward action."""

    forward: float
    backward: float
    pull: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class LinkSeconds:
    """Of a link between two pipeline ranks, in each direction: its latency, and the time to transmit one message."""

    latency_seconds: float = 0.0
    message_seconds: float = 0.0


class Event(NamedTuple):
    pipeline_rank: int
    update: int
    action: Action
    start: float
    end: float


@dataclass
class Timeline:
    """All events with a duration, in order of every rank, and when every rank ended each update, in seconds."""

    events: list[Event] = field(default_factory=list)
    ended: list[list[float]] = field(default_factory=list)  # [pipeline rank][update]

    @property
    def total_seconds(self) -> float:
        return max(ends[-1] for ends in self.ended)

    def steady_update_seconds(self) -> float:
        """The time of an update in the second half of the run, where the pipeline is full."""
        half = len(self.ended[0]) // 2
        assert half > 0, "one update has no steady state"
        return max((ends[-1] - ends[half - 1]) / (len(ends) - half) for ends in self.ended)


class _Channel:
    """The messages from one stage to another, in order: when each was handed over, had arrived and was taken.

    A sender hands a message over when the one before it has left, so at most one is waiting to leave.
    """

    def __init__(self, link: LinkSeconds, in_flight: int) -> None:
        self.link, self.in_flight = link, in_flight
        self.sent: list[float] = []
        self.arrived: list[float] = []
        self.taken: list[float] = []

    def all_left(self) -> bool:
        """Let a message leave whose receive is posted; whether none is waiting."""
        number = len(self.arrived)
        if number == len(self.sent):
            return True
        posted = number - self.in_flight
        if posted >= len(self.taken):
            return False
        leaves = max(self.sent[number], self.arrived[-1] if number else 0.0, self.taken[posted] if posted >= 0 else 0.0)
        self.arrived.append(leaves + self.link.message_seconds)
        return True

    def send(self, clock: float) -> float | None:
        """When the sender goes on; None while that is not known."""
        if not self.all_left():
            return None
        self.sent.append(max(clock, self.arrived[-1]) if self.arrived else clock)
        return self.sent[-1]

    def receive(self, clock: float) -> float | None:
        """When the receiver has the next message; None while that is not known."""
        number = len(self.taken)
        self.all_left()
        if number >= len(self.arrived):
            return None
        self.taken.append(max(clock, self.arrived[number] + self.link.latency_seconds))
        return self.taken[-1]


def simulate(
    objective: Objective,
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    *,
    micro_batches: int,
    updates: int,
    in_flight: int = 2,
    link: LinkSeconds | Sequence[LinkSeconds] = LinkSeconds(),
) -> Timeline:
    """Run `updates` updates of the objective; `seconds` are by stage, `micro_batches` those of a replica.

    `link` is what joins two pipeline ranks, or a link for every border from the bottom up. Raises AssertionError where
    the schedules do not fit.
    """
    ranks = stages[-1].pipeline_rank + 1
    todo = [_run(objective, stages, rank, micro_batches, updates) for rank in range(ranks)]
    partners = [_partners(objective, stages, phase) for phase in range(len(objective.phases))]
    links = [link] * (ranks - 1) if isinstance(link, LinkSeconds) else list(link)
    assert len(links) == ranks - 1, "a link for every border"
    durations = [{"F": one.forward, "B": one.backward, "I": one.pull, "U": one.update} for one in seconds]
    channels: dict[tuple[int, str, int | None], _Channel] = {}  # by stage and operation of the sender, and flow
    ready: dict[tuple[int, int], float] = {}  # (stage, update): when it came to its update
    clock = [0.0] * ranks
    timeline = Timeline(ended=[[] for _ in range(ranks)])

    def channel(stage: int, op: str, flow: int | None) -> _Channel:
        key = (stage, op, flow)
        if key not in channels:
            rank = stages[stage].pipeline_rank
            channels[key] = _Channel(links[rank if op == SEND_F else rank - 1], in_flight)
        return channels[key]

    def step(rank: int, update: int, action: Action) -> bool:
        """Do an action if what it waits for is known; whether that was so."""
        op, start = action.op, clock[rank]
        if op in SENDS:
            end = channel(action.stage, op, action.flow).send(start)
        elif op == RECV_F:
            end = channel(action.stage - 1, SEND_F, None).receive(start)
        elif op == RECV_B:
            end = channel(action.stage + 1, SEND_B, action.flow).receive(start)
        else:
            if op == "U":
                ready.setdefault((action.stage, update), start)
                members = partners[objective.phase_at(update, updates)][action.stage]
                if any((member, update) not in ready for member in members):
                    return False
                start = max(start, *(ready[member, update] for member in members))
            end = start + durations[action.stage][op]
            timeline.events.append(Event(rank, update, action, start, end))
        if end is None:
            return False
        clock[rank] = end
        return True

    waiting = [next(of_rank, None) for of_rank in todo]
    while any(waiting):
        moved = False
        for rank, of_rank in enumerate(todo):
            while (now := waiting[rank]) is not None and step(rank, *now):
                moved = True
                waiting[rank] = following = next(of_rank, None)
                if following is None or following[0] > now[0]:
                    timeline.ended[rank].append(clock[rank])
        assert moved, f"deadlock: {[str(now[1]) for now in waiting if now is not None]}"
    return timeline


@dataclass(frozen=True)
class Steady:
    """What every update takes once the pipeline is full, and the share of it in which each rank computes nothing."""

    update_seconds: float
    idle_shares: list[float]


def steady(
    objective: Objective,
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    *,
    micro_batches: int,
    in_flight: int = 2,
    link: LinkSeconds | Sequence[LinkSeconds] = LinkSeconds(),
    steps: int = 1,
) -> Steady:
    """The steady state of an objective, from a replay of few updates of few micro-batches: the mean over the phases of
    a run of `steps` updates.

    Once the pipeline is full, the time of an update grows linearly with its micro-batches: what `WINDOW` more for every
    rank take is measured after about as many, and extrapolated to `micro_batches`. No less than what the busiest rank
    computes or the slowest link carries, because an update that costs much hides who is slower per micro-batch. Exact
    where ranks and links are alike; elsewhere within a few percent (tests).
    """
    ranks = stages[-1].pipeline_rank + 1
    window = WINDOW * ranks
    start = micro_batches if micro_batches <= 3 * window else window + micro_batches % window
    times = (micro_batches - start) // window  # whole windows, whatever the period of the pattern
    links = [link] * (ranks - 1) if isinstance(link, LinkSeconds) else link
    of_updates = [objective.phase_at(update, steps) for update in range(steps)] if len(objective.phases) > 1 else [0]
    total, idle = 0.0, [0.0] * ranks
    for number, phase in enumerate(objective.phases):
        alone = Objective(objective.num_blocks, phase, delayed=objective.delayed)
        period, busy = _pace(alone, stages, seconds, start, in_flight, links)
        if times:
            longer, more = _pace(alone, stages, seconds, start + window, in_flight, links)
            busy = [a + times * (b - a) for a, b in zip(busy, more, strict=True)]
            slowest = max((one.message_seconds for one in links), default=0.0)
            period = max(period + times * (longer - period), *busy, micro_batches * slowest)
        share = of_updates.count(number) / len(of_updates)
        total += share * period
        idle = [before + share * max(0.0, period - own) for before, own in zip(idle, busy, strict=True)]
    return Steady(total, [one / total if total else 0.0 for one in idle])


def _pace(
    objective: Objective,
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    micro_batches: int,
    in_flight: int,
    links: Sequence[LinkSeconds],
) -> tuple[float, list[float]]:
    """Seconds of an update of few micro-batches in steady state, and in how many of them each rank computes.

    A rank that is faster than those above it works ahead until the channels are full; in the end all go at the pace of
    the slowest, so that is what counts. Replayed are as many updates as fill the channels, and twice as many until two
    in a row take the same, or else the mean is taken.
    """
    updates, most = max(3, -(-8 * (in_flight + 1) // micro_batches)), max(6, MOST_MICRO_BATCHES // micro_batches)
    while True:
        # One more where gradients are delayed: the last update drains the pipeline.
        count = updates + objective.delayed
        timeline = simulate(
            objective, stages, seconds, micro_batches=micro_batches, updates=count, in_flight=in_flight, link=links
        )
        before, last = (max(ends[u] - ends[u - 1] for ends in timeline.ended) for u in (updates - 2, updates - 1))
        if not math.isclose(before, last, rel_tol=1e-6):
            if updates < most:
                updates = min(most, 2 * updates)
                continue
            half = updates // 2
            last = max((ends[updates - 1] - ends[half - 1]) / (updates - half) for ends in timeline.ended)
        busy = [0.0] * len(timeline.ended)
        for event in timeline.events:
            busy[event.pipeline_rank] += (event.end - event.start) * (event.update == updates - 1)
        return last, busy


def pipeline_flops(objective: Objective, costs: ModelCosts, ranks: int, micro_batches: int) -> list[float]:
    """For every phase what an update takes in steady state on `ranks` pipeline ranks, balanced, with links that cost
    nothing: in FLOPs of one rank, per token of a micro-batch. What 1F1B and local updates are compared by.
    """
    stages = cut(objective, ranks, costs)
    found = []
    for phase in objective.phases:
        seconds = []
        for stage, duty in zip(stages, duties(phase, stages), strict=True):
            forward = stage.num_blocks * costs.block_flops
            head = costs.after(stage.last_block).head_training_flops(stage.is_last)
            backward = costs.backward_flops(stage.first_block, stage.last_block, duty.down is not None)
            seconds.append(StageSeconds(forward + stage.has_head * head, backward, forward))
        alone = Objective(objective.num_blocks, phase, delayed=objective.delayed)
        timeline = simulate(alone, stages, seconds, micro_batches=micro_batches, updates=16)
        found.append(timeline.steady_update_seconds())
    return found


def _run(
    objective: Objective, stages: Sequence[StagePlan], rank: int, micro_batches: int, updates: int
) -> Iterator[tuple[int, Action]]:
    """The actions of a whole run on one rank, each with the update in whose turn it is done."""
    patterns = [one_update(stages, phase, rank, micro_batches, objective.delayed) for phase in objective.phases]
    for update in range(updates):
        pattern = patterns[objective.phase_at(update, updates)]
        actions = [*(() if update else pattern.fill), *pattern.body]
        actions += [*(pattern.goes_on if update < updates - 1 else pattern.drains), *pattern.updates]
        yield from ((update, action) for action in actions)


def _partners(objective: Objective, stages: Sequence[StagePlan], phase: int) -> dict[int, tuple[int, ...]]:
    """For every trained stage the last trained stages, on their ranks, of those that it clips with.

    A rank comes to its updates with the first of its stages that has one, so the first of each rank is enough.
    """
    partners: dict[int, tuple[int, ...]] = {}
    for members in clip_groups(objective.phases[phase], stages):
        first_on_rank = {stages[index].pipeline_rank: index for index in reversed(members)}
        partners |= dict.fromkeys(members, tuple(sorted(first_on_rank.values())))
    return partners
