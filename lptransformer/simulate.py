"""Replays the action lists that the engine runs, with costs: when every action begins and ends on every pipeline rank.

What is modelled: ranks compute one action after another; a message leaves when it is sent, the one before it has left
and a receive is posted for it (`in_flight` are, ahead), and takes latency + bytes / bandwidth; a stage that clips with
stages of other ranks updates when all of them are ready to. Nothing is random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lptransformer.cost import ModelCosts
from lptransformer.gradients import clip_groups
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan, cut
from lptransformer.schedule import RECEIVES, RECV_F, SEND_B, SEND_F, SENDS, Action, Pattern, one_update


@dataclass(frozen=True)
class StageSeconds:
    """What the actions of a stage take. The loss and its gradients are taken in the forward action (loss.py)."""

    forward: float
    backward: float
    pull: float = 0.0
    update: float = 0.0

    def of(self, op: str) -> float:
        return {"F": self.forward, "B": self.backward, "I": self.pull, "U": self.update}.get(op, 0.0)


@dataclass(frozen=True)
class Link:
    """Between two pipeline ranks, each direction: latency and the time of one message (hidden states) on the wire."""

    latency_seconds: float = 0.0
    message_seconds: float = 0.0


@dataclass(frozen=True)
class Event:
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

    def idle_shares(self) -> list[float]:
        """Of every rank, in the second half of its updates: the share of time in which it computes nothing."""
        half = len(self.ended[0]) // 2
        shares = []
        for rank, ends in enumerate(self.ended):
            busy = sum(e.end - e.start for e in self.events if e.pipeline_rank == rank and e.update >= half)
            shares.append(1 - busy / (ends[-1] - ends[half - 1]))
        return shares


def simulate(
    objective: Objective,
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    *,
    micro_batches: int,
    updates: int,
    in_flight: int = 2,
    link: Link | Sequence[Link] = Link(),
    clip: bool = True,
) -> Timeline:
    """Run `updates` updates of the objective; `seconds` are by stage, `micro_batches` those of a replica.

    `link` is what joins two pipeline ranks, or a link for every border from the bottom up.

    With `clip` stages that clip together wait for each other. Raises AssertionError where the schedules do not fit.
    """
    ranks = stages[-1].pipeline_rank + 1
    todo = [list(_run(objective, stages, rank, micro_batches, updates)) for rank in range(ranks)]
    groups = [_partners(objective, stages, phase) for phase in range(len(objective.phases))] if clip else []
    clock, position = [0.0] * ranks, [0] * ranks
    links = [link] * (ranks - 1) if isinstance(link, Link) else list(link)
    assert len(links) == ranks - 1, "a link for every border"
    timeline = Timeline(ended=[[] for _ in range(ranks)])
    # By (stage, op, flow) of the sender: when each message was taken, and when its transfer ended.
    taken: dict[tuple[int, str, int | None], list[float]] = {}
    arrived: dict[tuple[int, str, int | None], list[float]] = {}
    sent: dict[tuple[int, str, int | None], list[float]] = {}  # when each was handed over
    ready: dict[tuple[int, int], float] = {}  # (stage, update): when it came to its update

    def wire(channel: tuple[int, str, int | None]) -> Link:
        """What a channel runs over, by the stage and operation of its sender."""
        rank = stages[channel[0]].pipeline_rank
        return links[rank if channel[1] == SEND_F else rank - 1]

    def transfer(channel: tuple[int, str, int | None]) -> None:
        """Let messages leave whose receive is posted."""
        done, gone = arrived.setdefault(channel, []), taken.setdefault(channel, [])
        for number in range(len(done), len(sent[channel])):
            if number - in_flight >= len(gone):
                return
            posted = gone[number - in_flight] if number >= in_flight else 0.0
            leaves = max(sent[channel][number], done[-1] if done else 0.0, posted)
            done.append(leaves + wire(channel).message_seconds)

    def step(rank: int) -> bool:
        """Do the next action of a rank if what it waits for is known; whether that was so."""
        update, action = todo[rank][position[rank]]
        start = clock[rank]
        if action.op in SENDS:
            channel = (action.stage, action.op, action.flow)
            before = sent.setdefault(channel, [])
            transfer(channel)
            if len(arrived[channel]) < len(before):
                return False  # the message before this one has not left
            before.append(max(start, arrived[channel][-1] if before else 0.0))
            clock[rank] = before[-1]
            transfer(channel)
        elif action.op in RECEIVES:
            channel = (
                (action.stage - 1, SEND_F, None) if action.op == RECV_F else (action.stage + 1, SEND_B, action.flow)
            )
            if channel not in sent:
                return False
            transfer(channel)
            number = len(taken[channel])
            if number >= len(arrived[channel]):
                return False
            clock[rank] = max(start, arrived[channel][number] + wire(channel).latency_seconds)
            taken[channel].append(clock[rank])
        else:
            if action.op == "U" and clip:
                ready.setdefault((action.stage, update), start)
                members = groups[objective.phase_at(update, updates)][action.stage]
                if any((member, update) not in ready for member in members):
                    return False
                start = max(start, *(ready[member, update] for member in members))
            clock[rank] = start + seconds[action.stage].of(action.op)
            timeline.events.append(Event(rank, update, action, start, clock[rank]))
        position[rank] += 1
        if position[rank] == len(todo[rank]) or todo[rank][position[rank]][0] > update:
            timeline.ended[rank].append(clock[rank])
        return True

    while any(position[rank] < len(todo[rank]) for rank in range(ranks)):
        moved = False
        for rank in range(ranks):
            while position[rank] < len(todo[rank]) and step(rank):
                moved = True
        assert moved, f"deadlock: {[str(todo[r][position[r]][1]) for r in range(ranks) if position[r] < len(todo[r])]}"
    return timeline


def pipeline_flops(objective: Objective, costs: ModelCosts, ranks: int, micro_batches: int) -> list[float]:
    """For every phase what an update takes in steady state on `ranks` pipeline ranks, balanced, with links that cost
    nothing: in FLOPs of one rank, per token of a micro-batch. What 1F1B and local updates are compared by.
    """
    stages = cut(objective, ranks, costs)
    found = []
    for phase in objective.phases:
        seconds = []
        for stage in stages:
            forward = stage.num_blocks * costs.block_flops
            head = costs.head_training_flops(stage.is_last)
            seconds.append(StageSeconds(forward + stage.has_head * head, 2 * forward, forward))
        alone = Objective(objective.num_blocks, phase, delayed=objective.delayed)
        timeline = simulate(alone, stages, seconds, micro_batches=micro_batches, updates=16)
        found.append(timeline.steady_update_seconds())
    return found


def _run(
    objective: Objective, stages: Sequence[StagePlan], rank: int, micro_batches: int, updates: int
) -> Iterator[tuple[int, Action]]:
    """The actions of a whole run on one rank, each with the update in whose turn it is done."""
    patterns: list[Pattern] = [
        one_update(stages, phase, rank, micro_batches, objective.delayed) for phase in objective.phases
    ]
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
