"""Seconds per update and peak memory of two checkouts, in turns on the same machine.

    python benchmarks/side_by_side_commits.py ../before . --repeats 5

Measured are the quick start on its two pipeline ranks, and the two models of one_process.py in one process. A run's
seconds are the median over its updates without the first few; its memory is that of the process that takes most. The
table has the medians over the repetitions, and the range of the ratios of runs that followed one another: that is how
far to trust the ratio. The one that begins alternates.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from statistics import median

from same_bits import QUICK_START, Checkout, Failure

IN_ONE_PROCESS = ("parallel.pipeline=1", "objective.chunks=4", "train.micro_batches_per_update=1")
MEDIUM = ("model.hidden_size=256", "model.num_layers=8")
SETTINGS = {  # what is other than in the quick start
    "quick-start": ("train.steps=100",),
    "one-process-small": (*IN_ONE_PROCESS, "train.steps=100"),
    "one-process-medium": (*IN_ONE_PROCESS, *MEDIUM, "train.steps=30"),
}
WARM_UP = 5  # updates


def measure(checkout: Checkout, run: Path, flags: tuple[str, ...]) -> tuple[float, float]:
    """Seconds per update and peak MiB of one run."""
    checkout.train(checkout.folder / QUICK_START, run, ("data.valid={}", *flags))
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shutil.rmtree(run)
    ends = [row["seconds"] for row in rows if "stages" in row][WARM_UP - 1 :]
    seconds = median(after - before for before, after in zip(ends, ends[1:], strict=False))
    return seconds, max(stage["memory_bytes"] for stage in rows[-1]["stages"]) / 2**20


def table(measured: dict[str, list[list[tuple[float, float]]]]) -> str:
    """`measured` has [OLD, NEW] of every repetition of every setting."""
    lines = ["| | | OLD | NEW | NEW / OLD | range |", "|---|---|---|---|---|---|"]
    for setting, pairs in measured.items():
        for which, what, digits in ((0, "ms per update", 1e3), (1, "peak MiB", 1.0)):
            old, new = ([pair[side][which] * digits for pair in pairs] for side in (0, 1))
            ratios = [b / a for a, b in zip(old, new, strict=True)]
            cells = [setting, what, f"{median(old):.1f}", f"{median(new):.1f}", f"{median(new) / median(old):.3f}"]
            lines.append(f"| {' | '.join(cells)} | {min(ratios):.3f}-{max(ratios):.3f} |")
    return "\n".join(lines)


def main() -> None:
    about = "Speed and memory of two checkouts, measured in turns."
    parser = argparse.ArgumentParser(description=about, allow_abbrev=False)
    parser.add_argument("old", metavar="OLD", help="folder of a checkout")
    parser.add_argument("new", metavar="NEW", help="folder of another one")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of every setting (default: 5)")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS), help="which (default: all)")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats}: give 1 or more")
    measured: dict[str, list[list[tuple[float, float]]]] = {setting: [] for setting in args.settings}
    with tempfile.TemporaryDirectory(prefix="two-commits-") as work:
        try:
            sides = [Checkout(args.old, Path(work) / "old"), Checkout(args.new, Path(work) / "new")]
            for repeat in range(args.repeats):
                for setting, pairs in measured.items():
                    pair = [(0.0, 0.0), (0.0, 0.0)]
                    for which in (0, 1) if repeat % 2 == 0 else (1, 0):
                        pair[which] = measure(sides[which], Path(work) / "run", SETTINGS[setting])
                    pairs.append(pair)
                    print(f"{repeat + 1} of {args.repeats}, {setting}: {pair}", flush=True)
        except Failure as failure:
            raise SystemExit(f"side_by_side_commits: {failure}") from None
    print(table(measured))


if __name__ == "__main__":
    main()
