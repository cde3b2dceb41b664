"""How the blocks of a model can be split over stages: equally, by computed cost, and by what was measured."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

Split = tuple[int, ...]
HEAD = """# Made by `python benchmarks/throughput.py scan`: blocks per stage (ours: per chunk), by contender and
# micro-batches per update; below, the median seconds per update of all splits that were looked at.
"""


def equal(blocks: int, stages: int) -> Split:
    """As equal as possible, the longer ones first."""
    return tuple(blocks // stages + (stage < blocks % stages) for stage in range(stages))


def candidates(blocks: int, rank_of_stage: Sequence[int], heads: Sequence[float], count: int) -> list[Split]:
    """The `count` splits that promise most, best first, and the equal one behind them if it is not among them.

    What counts is the costliest rank, then the costliest stage. `heads` says what the head behind each stage costs, in
    blocks.
    """
    stages, ranks = len(rank_of_stage), max(rank_of_stage) + 1

    def costs(split: Split) -> tuple[float, float, Split]:
        of_stage = [size + head for size, head in zip(split, heads, strict=True)]
        of_rank = [sum(c for c, r in zip(of_stage, rank_of_stage, strict=True) if r == rank) for rank in range(ranks)]
        return max(of_rank), max(of_stage), split

    borders = itertools.combinations(range(1, blocks), stages - 1)
    splits = [tuple(b - a for a, b in zip((0, *at), (*at, blocks), strict=True)) for at in borders]
    best = sorted(splits, key=costs)[:count]
    even = equal(blocks, stages)
    return best if even in best else [*best, even]


def fastest(measured: Mapping[Split, Sequence[float]]) -> Split:
    """The split with the least median of seconds per update."""
    return min(measured, key=lambda split: statistics.median(measured[split]))


def read(path: Path) -> dict[str, dict[int, Split]]:
    """The best splits that a scan has found: by contender, by micro-batches per update. Nothing where there is none."""
    best = yaml.safe_load(path.read_text())["best"] if path.exists() else {}
    return {name: {m: tuple(split) for m, split in of_m.items()} for name, of_m in best.items()}


def read_measured(path: Path) -> dict[str, dict[int, dict[str, float]]]:
    """All that was looked at: by contender, by micro-batches, the median seconds per update of every split."""
    return yaml.safe_load(path.read_text())["measured"] if path.exists() else {}


def best(found: Mapping[str, Mapping[int, Split]], name: str, micro_batches: int, computed: Split) -> Split:
    """What the scan found for a contender at `micro_batches`, or at the nearest number that it looked at; the
    computed one where it did not look."""
    of_name = found.get(name, {})
    return of_name[min(of_name, key=lambda m: (abs(m - micro_batches), m))] if of_name else computed


def write(
    path: Path, best: Mapping[str, Mapping[int, Split]], measured: Mapping[str, Mapping[int, Mapping[str, float]]]
) -> None:
    plain = {name: {m: list(split) for m, split in sorted(of_m.items())} for name, of_m in best.items()}
    seconds = {name: {m: dict(of_split) for m, of_split in sorted(of_m.items())} for name, of_m in measured.items()}
    text = yaml.safe_dump({"best": plain, "measured": seconds}, sort_keys=False, width=120)
    path.write_text(f"{HEAD}{text}")
