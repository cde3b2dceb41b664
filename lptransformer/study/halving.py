"""Successive halving: which runs of a method go on, from their scores alone. Nothing here knows folders or processes.

Runs that differ in the seed only are one setting: its score is the mean over the seeds, and they go on together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Halving:
    """`updates` are the rungs, the last one the end of a run; `keep` is the share of settings that goes on."""

    updates: tuple[int, ...]
    keep: float = 0.5

    def kept(self, settings: int) -> int:
        """How many of `settings` settings go on to the next rung: rounded to the nearest, a half up; at least one."""
        return max(1, math.floor(settings * self.keep + 0.5))


def targets(
    settings: Mapping[str, Sequence[str]],
    halving: Halving,
    score: Callable[[str, int], float | None],
    failed: frozenset[str] | set[str] = frozenset(),
) -> dict[str, int]:
    """How many updates every run of a method is to have, as far as that is known now.

    `settings` holds the runs of each setting, `score(run, update)` is None until the run has got there; lower is
    better, what is not finite counts as worst, and so does a run that has failed. A rung is decided when every run
    on it has a score or has failed.
    """
    alive = dict(settings)
    target: dict[str, int] = {}
    for update in halving.updates:
        runs = [run for members in alive.values() for run in members]
        target |= dict.fromkeys(runs, update)
        if any(run not in failed and score(run, update) is None for run in runs):
            break

        def mean(members: Sequence[str], update: int = update) -> float:
            scores = [math.inf if run in failed else score(run, update) for run in members]
            finite = [one for one in scores if one is not None and math.isfinite(one)]
            return fmean(finite) if len(finite) == len(scores) else math.inf

        best = sorted(alive, key=lambda setting: mean(alive[setting]))[: halving.kept(len(alive))]
        alive = {setting: alive[setting] for setting in alive if setting in best}
    return target


def planned_updates(settings: Mapping[str, Sequence[str]], halving: Halving) -> int:
    """The updates of all runs of a method together, when as many go on at every rung as is planned."""
    sizes = [len(members) for members in settings.values()]
    total, before, alive = 0.0, 0, len(sizes)
    for update in halving.updates:
        total += (update - before) * alive * fmean(sizes)
        before, alive = update, halving.kept(alive)
    return round(total)
