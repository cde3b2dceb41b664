"""Runs compared: the best setting of every method, means over seeds, differences to a baseline. From records alone.

Runs of a method that differ in the seed and in what changes no weight (BESIDE) are one setting. The setting with the
lowest mean loss on the set that decides is the method's; the others count in the Pareto fronts only. A run that got
less far than another of its method (it failed, was stopped, or is still training) has no loss at the end: it counts as
one that diverged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from lptransformer.config.resume import RULES, Effect
from lptransformer.errors import RunError
from lptransformer.study.records import Record, final_loss

LEARNING_RATE = "train.learning_rate"
# What changes no weight of a run that is resumed, and yet is another setting: the tokens, when training ends, how late
# the copies of heads are.
_DECIDING = ("data.bos", "train.patience", "parallel.in_flight")
# How the keys begin that runs of one setting may differ in: the seed, and what changes no weight.
_NOTHING = [key for key, (effect, _) in RULES.items() if effect is Effect.NOTHING and key not in _DECIDING]
BESIDE = tuple(f"{key}." for key in ("train.seed", *_NOTHING))


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (None: from one value, or from none)."""

    mean: float
    error: float | None = None

    def text(self, digits: int = 3, sign: str = "") -> str:
        if not math.isfinite(self.mean):
            return "-"
        error = "" if self.error is None else f" ± {self.error:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{error}"


@dataclass(frozen=True)
class Choice:
    """The best setting of a method: its runs by seed, what it says of the keys that were varied, and the updates of the
    furthest run of the method."""

    method: str
    runs: dict[int, Record]
    setting: str
    updates: int

    def estimate(self, name: str, exit_block: int | None = None) -> Estimate:
        """The loss on a validation set, nats per token, over the seeds."""
        return estimate([self.loss(seed, name, exit_block) for seed in self.runs])

    def loss(self, seed: int, name: str, exit_block: int | None = None) -> float:
        """That of one seed."""
        return _loss_at_end(self.runs[seed], self.updates, name, exit_block)


def _loss_at_end(run: Record, updates: int, name: str, exit_block: int | None) -> float:
    """The loss at the end of training; nan, as where it diverged, of a run that got less far than `updates`."""
    ended = run["updates"] >= updates or run["config"]["train"].get("patience")  # which may end a run earlier
    return final_loss(run, name, exit_block) if ended else math.nan


def estimate(values: Sequence[float]) -> Estimate:
    if not values:
        return Estimate(math.nan)
    finite = all(map(math.isfinite, values))
    return Estimate(fmean(values), stdev(values) / math.sqrt(len(values)) if finite and len(values) > 1 else None)


def deciding_set(records: Sequence[Record], choose: str | None = None) -> tuple[str, int | None]:
    """The validation set and the exit that decide: `choose`, else what the sweep said, else the first set.

    Raises RunError where a run has no evaluation of it.
    """
    said = next((record["score"] for record in records if "score" in record), None)
    first = next((name for record in records for name in record["evaluations"]), None)
    name = choose or (said["set"] if said else first)
    for record in records:
        if name not in record["evaluations"]:
            there = ", ".join(record["evaluations"]) or "none"
            raise RunError(f"run {record['name']} has no evaluation on {name}; there are those on: {there}")
    assert name is not None
    return name, said["exit_block"] if said and choose in (None, said["set"]) else None


def choices(records: Sequence[Record], choose: str | None = None) -> list[Choice]:
    """The best setting of every method, in the order in which the methods come.

    Those compete whose runs all got as far as the furthest of the method; where there are none, its setting is shown.
    """
    name, exit_block = deciding_set(records, choose)
    found = []
    for method, settings in _settings(records).items():
        runs = [run for of_setting in settings.values() for run in of_setting]
        updates = max(run["updates"] for run in runs)

        def order(of_setting: Sequence[Record], updates: int = updates) -> tuple[float, int]:
            mean = fmean(_loss_at_end(run, updates, name, exit_block) for run in of_setting)
            return mean if math.isfinite(mean) else math.inf, -max(run["updates"] for run in of_setting)

        best = min(settings.values(), key=order)
        by_seed = {run["config"]["train"]["seed"]: run for run in best}
        found.append(Choice(method, by_seed, _describe(best[0], runs), updates))
    return found


def find(of: Sequence[Choice], method: str, flag: str) -> Choice:
    """Raises RunError when no run is of the method that `flag` names."""
    for choice in of:
        if choice.method == method:
            return choice
    raise RunError(f"{flag} {method}: no run has this method; there are {', '.join(choice.method for choice in of)}")


def difference(choice: Choice, baseline: Choice, name: str) -> Estimate:
    """Loss minus the baseline's on a set, nats per token, paired by seed; nan where they share none."""
    seeds = [seed for seed in choice.runs if seed in baseline.runs]
    return estimate([choice.loss(seed, name) - baseline.loss(seed, name) for seed in seeds])


def depth_gain_kept(choice: Choice, deep: Choice, shallow: Choice, name: str) -> Estimate:
    """(shallow - method) / (shallow - deep) of the losses on a set: the share of what depth gains that is kept.

    Of the means over the seeds that all three have; the standard error is the jackknife's.
    """
    seeds = [seed for seed in choice.runs if seed in deep.runs and seed in shallow.runs]
    rows = [[one.loss(seed, name) for one in (choice, deep, shallow)] for seed in seeds]

    def share(rows: Sequence[Sequence[float]]) -> float:
        method, deep, shallow = (fmean(column) for column in zip(*rows, strict=True))
        return (shallow - method) / (shallow - deep) if shallow != deep else math.nan

    if not rows:
        return Estimate(math.nan)
    if len(rows) == 1:
        return Estimate(share(rows))
    left_out = [share(rows[:i] + rows[i + 1 :]) for i in range(len(rows))]
    mean = fmean(left_out)
    factor = (len(rows) - 1) / len(rows)
    return Estimate(share(rows), math.sqrt(factor * sum((one - mean) ** 2 for one in left_out)))


def _is_beside(key: str) -> bool:
    return f"{key}.".startswith(BESIDE)


def _settings(records: Sequence[Record]) -> dict[str, dict[str, list[Record]]]:
    """Runs by method and setting, in the order in which they come."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        values = {key: value for key, value in flat(record["config"]).items() if not _is_beside(key)}
        key = json.dumps(values, sort_keys=True)
        found.setdefault(record["method"], {}).setdefault(key, []).append(record)
    return found


def _describe(best: Record, runs: Sequence[Record]) -> str:
    """The learning rate, and all else that differs between the runs of a method; "lowest" where a lower was not tried.

    An optimum at the end of what was tried may be no optimum.
    """
    tables = [flat(run["config"]) for run in runs]
    own = flat(best["config"])
    varied = [key for key in own if not _is_beside(key) and len({json.dumps(t.get(key)) for t in tables}) > 1]
    words = []
    for key in dict.fromkeys((LEARNING_RATE, *varied)):
        value = own[key]
        word = f"{value:g}" if isinstance(value, float) else str(value)
        tried = {table[key] for table in tables if isinstance(table.get(key), int | float)}
        if len(tried) > 1 and value in (min(tried), max(tried)):
            word += " (lowest tried)" if value == min(tried) else " (highest tried)"
        words.append(word if key == LEARNING_RATE else f"{key.rpartition('.')[2]} {word}")
    return ", ".join(words)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"seed": 0}} as {"train.seed": 0}."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@dataclass(frozen=True)
class Point:
    """An evaluation: what had been spent, the loss that decides, and the loss that is reported (another text's, or the
    same)."""

    cost: float
    loss: float
    reported: float


def front(points: Iterable[Point]) -> list[Point]:
    """The points that no other point beats in cost and loss, by rising cost and falling loss.

    What is not finite is left out; of equal points one stays.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda one: (one.cost, one.loss)):
        if math.isfinite(point.cost + point.loss) and (not best or point.loss < best[-1].loss):
            best.append(point)
    return best


def within(of_front: Sequence[Point], budget: float) -> Point | None:
    """The best point of a front that costs no more than `budget`; None where there is none."""
    affordable = [point for point in of_front if point.cost <= budget]
    return affordable[-1] if affordable else None


def reaching(of_front: Sequence[Point], loss: float) -> Point | None:
    """The cheapest point of a front with a loss of `loss` or less; None where there is none."""
    return next((point for point in of_front if point.loss <= loss), None)
