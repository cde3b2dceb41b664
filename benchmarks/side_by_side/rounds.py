"""Interleaved repetitions: all contenders of a case are started, then each takes its turn in every repetition."""

from __future__ import annotations

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contenders.face import Spec, Work
from contenders.worker import Place, Turn

from side_by_side import cases, groups, ratios

TURN_SECONDS = 300.0
# Micro-batches that a pipeline rank of ours can be ahead of the next (in_flight + 1): what is left out of the count at
# both ends of a turn.
AHEAD = 3


@dataclass(frozen=True)
class Pace:
    """Updates of a turn: `lead` before those that count, `counted`, `tail` behind them."""

    lead: int
    counted: int
    tail: int

    @property
    def updates(self) -> int:
        return self.lead + self.counted + self.tail


def pace(spec: Spec, work: Work, counted_micro_batches: int) -> Pace:
    """Ours needs updates at both ends, because its pipeline ranks are not at the same update; others begin an update
    when all have ended the one before."""
    counted = max(1, counted_micro_batches // work.micro_batches)
    if spec.kind == "local":
        ahead = math.ceil(AHEAD / work.micro_batches)
        return Pace(ahead, counted, ahead)
    return Pace(1, counted, 0)


@dataclass
class Outcome:
    """What was measured of one contender: the turns of all its processes by repetition, or why it did not run."""

    spec: Spec
    pace: Pace
    turns: list[list[Turn]] = field(default_factory=list)
    error: str | None = None

    @property
    def ran(self) -> bool:
        return self.error is None and bool(self.turns)

    @property
    def seconds(self) -> list[float]:
        """Per update in steady state, by repetition."""
        return [
            ratios.steady_seconds([turn.clock for turn in turns], self.pace.lead, self.pace.counted)
            for turns in self.turns
        ]

    def to_dict(self, work: Work) -> dict[str, Any]:
        """For the result file."""
        config: dict[str, Any] = {"kind": self.spec.kind, "config": list(self.spec.config)}
        config |= {"partition": self.spec.partition, "schedule": self.spec.schedule, "threads": self.spec.threads}
        if not self.ran:
            return {**config, "error": self.error or "stopped before"}
        lead, counted = self.pace.lead, self.pace.counted
        processes = range(len(self.turns[0]))

        def of_all(sums: Callable[[Turn], Sequence[float | None]]) -> list[float | None]:
            shares = [[ratios.share(sums(t[p]), t[p].clock, lead, counted) for t in self.turns] for p in processes]
            return [None if None in of_one else statistics.median(of_one) for of_one in shares]  # type: ignore[type-var]

        losses = [turn.loss for turn in self.turns[-1] if turn.loss is not None]
        micro_batches = self.pace.updates * work.micro_batches
        return {
            **config,
            "updates_counted": counted,
            "seconds": self.seconds,
            **ratios.summary(self.seconds),
            "waiting_share": of_all(lambda turn: turn.waited),
            "processor_share": of_all(lambda turn: turn.processor),
            "asleep_share": of_all(lambda turn: turn.slept),
            "turn_updates": self.pace.updates,
            "turn_seconds": [ratios.whole_seconds([turn.clock for turn in turns]) for turns in self.turns],
            # Of all processes together.
            "processor_seconds_per_micro_batch": statistics.median(
                sum(t.processor[-1] - t.processor[0] for t in turns) / micro_batches for turns in self.turns
            ),
            "peak_bytes": [turn.peak_bytes for turn in self.turns[-1]],
            "loss": statistics.fmean(losses) if losses else None,
        }


def processes_of(spec: Spec, work: Work) -> int:
    return 1 if spec.kind in cases.ONE_PROCESS else work.ranks


@contextlib.contextmanager
def started(
    specs: Sequence[Spec],
    work: Work,
    logs: Path,
    placed: Callable[[int, int], list[Place]] = groups.launched,
) -> Iterator[tuple[dict[str, groups.Group], dict[str, str]]]:
    """Contenders that wait for their turn, and the errors of those that did not start, by name.

    `placed` says where processes run, from their number and a free port.
    """
    running: dict[str, groups.Group] = {}
    errors: dict[str, str] = {}
    try:
        for spec, port in zip(specs, groups.free_ports(len(specs)), strict=True):
            places = placed(processes_of(spec, work), port)
            running[spec.name] = groups.Group(spec.name, (spec, work), places, logs)
        for name in list(running):
            try:
                running[name].ready()
            except groups.GroupFailed as error:
                errors[name] = str(error)
                del running[name]
        yield running, errors
    finally:
        for group in running.values():
            group.end()


def take_turns(
    running: dict[str, groups.Group],
    outcomes: Mapping[str, Outcome],
    repetitions: int,
    between: Callable[[int], None] = lambda repetition: None,
) -> None:
    """Every contender one turn after the other, then again; the first round warms up and does not count.

    `between` is called before every repetition, from 0. A contender that fails is out, with its error.
    """
    for repetition in range(-1, repetitions):
        if repetition >= 0:
            between(repetition)
            if repetitions > 1:
                print(f"  repetition {repetition + 1} of {repetitions}", file=sys.stderr, flush=True)
        for name in list(running):
            outcome = outcomes[name]
            try:
                turns = running[name].turn(outcome.pace.updates if repetition >= 0 else 1, TURN_SECONDS)
            except groups.GroupFailed as error:
                outcome.error = str(error)
                del running[name]
                continue
            if repetition >= 0:
                outcome.turns.append(turns)
