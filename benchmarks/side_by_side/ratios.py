"""From the clocks of processes to seconds per update, shares and ratios. Plain numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

Numbers = Mapping[str, float]


def steady_seconds(clocks: Sequence[Sequence[float]], lead: int, updates: int) -> float:
    """Seconds per update of the slowest process, over `updates` updates after the first `lead`.

    Each clock has the start and the end of every update of a turn. Updates behind the counted ones keep the other
    processes at work while the last ones are counted.
    """
    return max((clock[lead + updates] - clock[lead]) / updates for clock in clocks)


def whole_seconds(clocks: Sequence[Sequence[float]]) -> float:
    """From the first process's start to the last one's end."""
    return max(clock[-1] for clock in clocks) - min(clock[0] for clock in clocks)


def share(sums: Sequence[float | None], clock: Sequence[float], lead: int, updates: int) -> float | None:
    """The part of the counted time that a sum over time grew by; None where it is not known."""
    first, last = sums[lead], sums[lead + updates]
    if first is None or last is None:
        return None
    return (last - first) / (clock[lead + updates] - clock[lead])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, quartiles, least and greatest."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    low, high = min(values), max(values)
    return {"median": statistics.median(values), "lower": quartiles[0], "upper": quartiles[2], "min": low, "max": high}


def speedups(other: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast, repetition by repetition: what one repetition suffers from, both do."""
    return [theirs / ours for theirs, ours in zip(other, own, strict=True)]


def medians(measured: Sequence[Mapping[Any, Numbers]]) -> dict[Any, dict[str, float]]:
    """The median of every number over the repetitions."""
    return {
        key: {name: statistics.median(one[key][name] for one in measured) for name in measured[0][key]}
        for key in measured[0]
    }


def finite(value: float | None) -> float | None:
    """None in the place of nan and infinity, which JSON does not have."""
    return None if value is None or not math.isfinite(value) else value
