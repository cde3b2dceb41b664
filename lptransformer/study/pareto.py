"""Pareto fronts: what loss costs. Plain arithmetic over (cost, loss) points; lower is better in both."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """An evaluation: what had been spent, the loss that decides, and the loss that is told (another text's, or it)."""

    cost: float
    loss: float
    told: float


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
