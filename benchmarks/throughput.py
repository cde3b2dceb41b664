"""Throughput of local updates beside real peers, in one run: same model, data, global batch, dtype and threads.

    python benchmarks/throughput.py real --out docs/benchmarks/performance/real.json
    python benchmarks/throughput.py emulated --out docs/benchmarks/performance/emulated.json
    python benchmarks/throughput.py links --out docs/benchmarks/performance/links.json      # as root
    python benchmarks/throughput.py emulated_links --out docs/benchmarks/performance/emulated_links.json    # as root
    python benchmarks/throughput.py tables docs/benchmarks/performance/*.json --markdown docs/benchmarks/performance.md
    python benchmarks/throughput.py scan                                                    # writes splits.yaml

What is measured stands in throughput.yaml beside this file. All contenders of a case are started first; then, in every
repetition, each takes its turn while the others wait on a pipe without using the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    # Before torch is imported: one thread for every process, whose accelerator is the CPU.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    from side_by_side import tables

    if options.setting == "tables":
        for path in options.results:
            written = tables.write(json.loads(path.read_text()), options.markdown)
            print(f"{options.markdown}: {', '.join(written)}")
        return
    from side_by_side import cases, settings

    section = cases.section("real" if options.setting == "scan" else options.setting, options.smoke)
    for key in ("repetitions", "micro_batches"):
        if getattr(options, key, None) is not None:
            section[key] = getattr(options, key)
    with tempfile.TemporaryDirectory(prefix="throughput-") as logs:
        before = os.getloadavg()
        found: dict[str, Any] = getattr(settings, options.setting)(section, Path(logs), options.only)
    found |= {"machine": tables.machine(), "load_before": before, "load_after": os.getloadavg()}
    if options.setting == "scan":
        _write_splits(found, section, options.out)
        return
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")
    tables.show(found)


def _write_splits(found: dict[str, Any], section: dict[str, Any], out: Path | None) -> None:
    """Add to the best splits that were found before, and to what was measured."""
    from side_by_side import cases, splits

    path = out or cases.SPLITS
    best = splits.read(path)
    measured = splits.read_measured(path)
    for name, of_m in found["best"].items():
        best.setdefault(name, {}).update(of_m)
        measured.setdefault(name, {}).update(found["measured"][name])
    splits.write(path, best, measured)
    print(path.read_text())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="setting", required=True)
    helps = {
        "real": "real compute on two pipeline ranks",
        "emulated": "stages that sleep instead of computing, on 4 and 8 pipeline ranks",
        "links": "slow links between network namespaces (needs root)",
        "emulated_links": "slow links, and stages that sleep instead of computing (needs root)",
        "scan": "measure splits for every contender with `split: best`",
    }
    for name, text in helps.items():
        command = commands.add_parser(name, help=text)
        command.add_argument("--out", type=Path, help="result file" if name != "scan" else "instead of splits.yaml")
        command.add_argument("--repetitions", type=int, help="instead of those in throughput.yaml")
        command.add_argument("--only", nargs="*", default=[], help="contenders whose name contains one of these")
        command.add_argument(
            "--smoke", action="store_true", help="tiny sizes, to see that it runs: the numbers mean nothing"
        )
        if name in ("real", "scan"):
            command.add_argument("--micro-batches", type=int, nargs="+", help="micro-batches per update")
    of_tables = commands.add_parser("tables", help="result files to the tables of a document")
    of_tables.add_argument("results", type=Path, nargs="+")
    of_tables.add_argument("--markdown", type=Path, required=True)
    return parser


if __name__ == "__main__":
    main()
