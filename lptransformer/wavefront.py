"""Replays the schedules of many pipeline ranks at once: the same times as simulate.py, a thousand times faster.

An update on a rank is a list of rounds (schedule.one_update): round s runs micro-batch s forward and sends it, and then
takes the gradient of micro-batch s - lag and runs its backward. Call the first half of round s on rank r the level
2 s + r and the second half the level 2 s + r + 1: then all that a half waits for (the message from below, the gradient
from above, a free place in a channel) is on lower levels, so a level is computed for all its ranks together, with a
handful of operations on arrays. Nothing is approximated.

What fits into rounds: one span, or chunks, over ranks (backprop, chunked, greedy, last, deep supervision), and
overlapping by one with a stage per rank. `rounds` says None of anything else (delayed gradients, several flows across
one border), which simulate.py replays action by action.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lptransformer.gradients import Flow, clip_groups, duty, flows
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan
from lptransformer.simulate import Link, StageSeconds
from lptransformer.spans import Phase

if TYPE_CHECKING:
    import numpy as np


FREE = Link()


@dataclass
class _Half:
    """The seconds of half a round: before and after sending up, and after sending a gradient down."""

    before: float = 0.0
    after_up: float = 0.0
    after_down: float = 0.0
    sends_down: bool = False


@dataclass
class RankRounds:
    """One pipeline rank: its two halves of a round, how many rounds a gradient comes later, its updates.

    `group` is the number of the clip group whose ranks wait for each other before the update (-1: nobody waits).
    """

    lag: int = 0
    forward: _Half = field(default_factory=_Half)
    backward: _Half = field(default_factory=_Half)
    update: float = 0.0
    group: int = -1


@dataclass
class Ends:
    """When every rank ended each update, [ranks][updates], and how long it computes in one, in seconds."""

    ended: np.ndarray
    busy: np.ndarray

    @property
    def total_seconds(self) -> float:
        return float(self.ended[:, -1].max())

    def steady_update_seconds(self) -> float:
        """The time of an update in the second half of the run, where the pipeline is full."""
        updates = self.ended.shape[1]
        half = updates // 2
        assert half > 0, "one update has no steady state"
        return float(((self.ended[:, -1] - self.ended[:, half - 1]) / (updates - half)).max())

    def idle_shares(self) -> list[float]:
        """Of every rank, in the second half of its updates: the share of time in which it computes nothing."""
        updates = self.ended.shape[1]
        half = updates // 2
        spans = (self.ended[:, -1] - self.ended[:, half - 1]) / (updates - half)
        return [float(share) for share in 1 - self.busy / spans]


def rounds(
    objective: Objective, stages: Sequence[StagePlan], seconds: Sequence[StageSeconds], phase: Phase, clip: bool = True
) -> list[RankRounds] | None:
    """A phase as rounds, or None where it does not fit into them."""
    if objective.delayed:
        return None
    of_phase = flows(phase, stages)
    ranks = stages[-1].pipeline_rank + 1
    local: list[list[StagePlan]] = [[] for _ in range(ranks)]
    for stage in stages:
        local[stage.pipeline_rank].append(stage)
    found = [_of_rank(own, of_phase, stages, seconds, phase) for own in local]
    if clip and not _groups(phase, stages, local, found):
        return None
    return None if any(one is None for one in found) else [one for one in found if one is not None]


def _of_rank(
    local: Sequence[StagePlan],
    of_phase: Sequence[Flow],
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    phase: Phase,
) -> RankRounds | None:
    bottom, top = local[0], local[-1]
    own = {stage.index: duty(stage, phase, of_phase) for stage in local}
    coming = [flow for flow in of_phase if flow.bottom <= top.index < flow.top]
    if len(coming) > 1 or len(own[bottom.index].below) > 1 or any(len(own[s.index].below) > 1 for s in local):
        return None
    pulling = any(own[stage.index].pulls for stage in local)
    if pulling and (len(local) > 1 or any(number in own[bottom.index].pulls for number, _ in own[top.index].above)):
        return None
    one = RankRounds(lag=stages[coming[0].top].pipeline_rank - bottom.pipeline_rank if coming else 0)
    one.update = sum(seconds[stage.index].update for stage in local if stage.trained)
    here: set[tuple[int, int]] = set()
    done: set[int] = set()
    sent = False

    def add(half: _Half, time: float) -> None:
        if half.sends_down:
            half.after_down += time
        elif sent or half is one.backward:
            half.after_up += time
        else:
            half.before += time

    def settle(stage: StagePlan, half: _Half) -> None:
        """What schedule.one_update does once for a micro-batch, in its order."""
        of_stage = own[stage.index]
        missing = [number for number, _ in of_stage.above if (stage.index, number) not in here]
        if of_stage.pulls and of_stage.pulls[0] not in missing and half is one.forward:
            add(half, seconds[stage.index].pull)
            if stage is bottom:
                half.sends_down = True
        if stage.trained and not missing and stage.index not in done:
            done.add(stage.index)
            add(half, seconds[stage.index].backward)
            if of_stage.down is not None:
                if stage is bottom:
                    half.sends_down = True
                else:
                    here.add((stage.index - 1, of_stage.down))
        if of_stage.below and stage is not bottom:
            settle(local[stage.index - 1 - bottom.index], half)

    for stage in local:
        if one.forward.sends_down:
            return None  # a gradient goes down before the hidden states have gone up
        add(one.forward, seconds[stage.index].forward)
        sent = stage is top
        settle(stage, one.forward)
    if coming:
        here.add((top.index, coming[0].number))
        settle(top, one.backward)
    return one


def _groups(
    phase: Phase,
    stages: Sequence[StagePlan],
    local: Sequence[Sequence[StagePlan]],
    found: Sequence[RankRounds | None],
) -> bool:
    """Write the clip groups over ranks into the rounds; False where a rank takes part in several."""
    for number, members in enumerate(clip_groups(phase, stages)):
        of_ranks = {stages[index].pipeline_rank for index in members}
        if len(of_ranks) == 1:
            continue
        for rank in of_ranks:
            one = found[rank]
            trained = [stage.index for stage in local[rank] if stage.trained]
            if one is None or not set(trained) <= set(members):
                return False
            one.group = number
    return True


def run(
    ranks: Sequence[RankRounds],
    *,
    micro_batches: int,
    updates: int,
    in_flight: int = 2,
    links: Link | Sequence[Link] = FREE,
) -> Ends:
    """Replay `updates` updates of `micro_batches` micro-batches of a replica; `links` is one, or one per border."""
    return _Replay(ranks, micro_batches, in_flight, links).run(updates)


@dataclass(frozen=True)
class Steady:
    """What every update takes once the pipeline is full, and the share of it in which each rank computes nothing."""

    update_seconds: float
    idle_shares: list[float]


def steady(
    ranks: Sequence[RankRounds],
    *,
    micro_batches: int,
    in_flight: int = 2,
    links: Link | Sequence[Link] = FREE,
    at_most: int = 64,
) -> Steady:
    """Replay until an update takes as long as the one before on every rank (`at_most` updates), the channels full.

    A rank that is faster than those above it works ahead until the channels are full, which can take long; in the end
    all go at the pace of the slowest, so that is what counts.
    """
    import numpy as np

    replay = _Replay(ranks, micro_batches, in_flight, links)
    ended = [replay.update()]
    last: Any = None
    while len(ended) < at_most:
        ended.append(replay.update())
        before, last = last, ended[-1] - ended[-2]
        full = len(ended) > 3 and len(ended) * micro_batches >= 8 * (in_flight + 1)
        if full and np.allclose(before, last, rtol=1e-9, atol=0):
            break
    period = float(last.max())
    return Steady(period, [max(0.0, float(share)) for share in 1 - replay.busy / period])


class _Channel:
    """The messages of all borders in one direction: when each was handed over, had arrived and was taken.

    Rows are messages (the first `past` of them those of the update before), columns the receiving ranks.
    """

    def __init__(self, ranks: int, in_flight: int, seconds: Any) -> None:
        self.past, self.in_flight, self.seconds, self.ranks = in_flight + 1, in_flight, seconds, ranks
        self.sent = self.arrived = self.taken = self._empty(self.past)

    def _empty(self, rows: int) -> Any:
        import numpy as np

        return np.full((rows, self.ranks), -np.inf)

    def begin(self, micro_batches: int) -> None:
        """Room for the messages of an update; those before it stay known as far as they matter."""
        import numpy as np

        for name in ("sent", "arrived", "taken"):
            before = getattr(self, name)[-self.past :]
            setattr(self, name, np.concatenate([before, self._empty(micro_batches)]))

    def hand_over(self, number: Any, to: Any, clock: Any) -> Any:
        """Send message `number` to ranks `to`: the sender goes on when the message before it has gone."""
        import numpy as np

        row = number + self.past
        before = np.maximum(clock, self._transfer(row - 1, to))
        self.sent[row, to] = before
        return before

    def take(self, number: Any, at: Any, clock: Any, latency: Any) -> Any:
        """Receive message `number` on ranks `at`; when the receiver has it."""
        import numpy as np

        row = number + self.past
        after = np.maximum(clock, self._transfer(row, at) + latency)
        self.taken[row, at] = after
        return after

    def _transfer(self, row: Any, at: Any) -> Any:
        """When a message has arrived: it leaves when it is sent, the one before has, and a receive is posted."""
        import numpy as np

        leaves = np.maximum(self.sent[row, at], self.arrived[row - 1, at])
        leaves = np.maximum(leaves, self.taken[row - self.in_flight, at])
        arrived = leaves + self.seconds[at]
        self.arrived[row, at] = arrived
        return arrived


class _Replay:
    def __init__(
        self, ranks: Sequence[RankRounds], micro_batches: int, in_flight: int, links: Link | Sequence[Link]
    ) -> None:
        import numpy as np

        count = len(ranks)
        self.micro_batches, self.count = micro_batches, count
        borders = [links] * (count - 1) if isinstance(links, Link) else list(links)
        assert len(borders) == count - 1, "a link for every border"
        message = np.array([link.message_seconds for link in borders])
        latency = np.array([link.latency_seconds for link in borders])
        nothing = np.zeros(1)
        self.up = _Channel(count, in_flight, np.concatenate([nothing, message]))  # by receiver
        self.down = _Channel(count, in_flight, np.concatenate([message, nothing]))
        self.up_latency = np.concatenate([nothing, latency])
        self.down_latency = np.concatenate([latency, nothing])
        self.lag = np.array([one.lag for one in ranks])
        self.halves = [_columns([one.forward for one in ranks]), _columns([one.backward for one in ranks])]
        self.updating = np.array([one.update for one in ranks])
        self.group = np.array([one.group for one in ranks])
        self.clock = np.zeros(count)
        compute = sum(half[name] for half in self.halves for name in ("before", "after_up", "after_down"))
        self.busy = micro_batches * compute + self.updating

    def run(self, updates: int) -> Ends:
        import numpy as np

        return Ends(np.stack([self.update() for _ in range(updates)], axis=1), self.busy)

    def update(self) -> Any:
        """One update of all ranks; when each has ended it."""
        import numpy as np

        m, count = self.micro_batches, self.count
        self.up.begin(m)
        self.down.begin(m)
        ranks = np.arange(count)
        for level in range(2 * (m + int(self.lag.max())) + count):
            first = ranks[level % 2 :: 2]
            step = (level - first) // 2
            on = (step >= 0) & (step < m)
            self._forward(first[on], step[on])
            second = ranks[(level + 1) % 2 :: 2]
            step = (level - 1 - second) // 2 - self.lag[second]
            on = (step >= 0) & (step < m) & (self.lag[second] > 0)
            self._backward(second[on], step[on])
        waits = self.group >= 0
        if waits.any():
            ready = np.full(int(self.group.max()) + 1, -np.inf)
            np.maximum.at(ready, self.group[waits], self.clock[waits])
            self.clock[waits] = ready[self.group[waits]]
        self.clock = self.clock + self.updating
        return self.clock.copy()

    def _forward(self, at: Any, number: Any) -> None:
        if not at.size:
            return
        half, clock = self.halves[0], self.clock[at]
        inner = at > 0
        clock[inner] = self.up.take(number[inner], at[inner], clock[inner], self.up_latency[at[inner]])
        clock += half["before"][at]
        inner = at < self.count - 1
        clock[inner] = self.up.hand_over(number[inner], at[inner] + 1, clock[inner])
        self.clock[at] = self._finish(half, at, number, clock)

    def _backward(self, at: Any, number: Any) -> None:
        if at.size:
            clock = self.down.take(number, at, self.clock[at], self.down_latency[at])
            self.clock[at] = self._finish(self.halves[1], at, number, clock)

    def _finish(self, half: dict[str, Any], at: Any, number: Any, clock: Any) -> Any:
        """What comes after sending up or receiving from above: computing, sending a gradient down, computing."""
        clock = clock + half["after_up"][at]
        sends = half["sends_down"][at]
        if sends.any():
            clock[sends] = self.down.hand_over(number[sends], at[sends] - 1, clock[sends])
            clock += half["after_down"][at]
        return clock


def _columns(halves: Sequence[_Half]) -> dict[str, Any]:
    import numpy as np

    names = ("before", "after_up", "after_down", "sends_down")
    return {name: np.array([getattr(half, name) for half in halves]) for name in names}
