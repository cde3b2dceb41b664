"""What checkpoints cost: seconds that a save keeps from training, bytes on disk, many saves, and checking.

    OMP_NUM_THREADS=1 python benchmarks/checkpoints.py --as after     # writes docs/benchmarks/checkpoints.{json,md}

One process trains a small Llama on random tokens. Updates with and without a save take turns; what a save costs is the
median of the first (the save and the update that follows it) less the median of the second. Beside it stands a bare
copy of as many bytes into memory that is there already, which is what no save in the background can do without.
`--as before` gives the numbers of an older version another row: run it in a checkout of that version, with this file.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from random_tokens import RandomTokens

from lptransformer.config.load import load
from lptransformer.engine.process_groups import join
from lptransformer.models.blueprint import make_blueprint
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder import checkpoint
from lptransformer.study.markdown_tables import ResultTable, update
from lptransformer.training.build import build_engine

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
VOCABULARY = 2048
KINDS = {"fp32, ZeRO 0": ("fp32", 0), "fp32, ZeRO 1": ("fp32", 1), "bf16, ZeRO 1": ("bf16", 1)}


def open_engine(hidden: int, layers: int, dtype: str, zero: int) -> Any:
    raw = {
        "model": {"family": "llama", "hidden_size": hidden, "num_layers": layers, "num_heads": 8},
        "data": {"train": "unused", "sequence_length": 128},
        "objective": {"chunks": 1},
        "train": {"micro_batch_size": 8, "micro_batches_per_update": 1, "steps": 10**6, "dtype": dtype},
        "deepspeed": {"zero_optimization": {"stage": zero}},
    }
    use_fair_share_of_cores()
    config = load(raw)
    stream = RandomTokens(8, 128, VOCABULARY)
    return build_engine(config, join(1, 1, 600), make_blueprint(config, VOCABULARY, None), stream, {})


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def one_save(hidden: int, layers: int, dtype: str, zero: int, repeats: int) -> dict[str, Any]:
    """Of one kind of run: seconds of updates and saves, and bytes of each parameter. In a process of its own."""
    engine = open_engine(hidden, layers, dtype, zero)
    parameters = sum(p.numel() for stage in engine.local.values() for p in stage.parameters)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)

        def saved_update() -> None:
            engine.save_checkpoint(run)
            engine.train_batch()

        def settle() -> None:
            if hasattr(engine, "settle"):
                engine.settle()

        for _ in range(2):
            saved_update()
            settle()
        plain, saved, calls = [], [], []
        for _ in range(repeats):
            plain.append(seconds(engine.train_batch))
            calls.append(seconds(lambda: engine.save_checkpoint(run)))
            saved.append(calls[-1] + seconds(engine.train_batch))
            settle()  # what is written in the background beside two updates is not done after one of so few seconds
        engine.close()
        newest = checkpoint.stage_folder(run, checkpoint.latest(run), 0).parent
        on_disk = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
        kept = [torch.ones(on_disk // 4 // 64) for _ in range(64)]
        source = [torch.zeros_like(one) for one in kept]
        copies = [seconds(lambda: [a.copy_(b) for a, b in zip(kept, source, strict=True)]) for _ in range(repeats)]
    return {
        "parameters": parameters,
        "update_seconds": statistics.median(plain),
        "lost_seconds": statistics.median(saved) - statistics.median(plain),
        "call_seconds": statistics.median(calls),
        "copy_seconds": statistics.median(copies),
        "bytes_per_parameter": on_disk / parameters,
    }


def many_saves(saves: int) -> dict[str, float]:
    """Seconds that so many saves of a tiny run add, with all checkpoints kept, and with the newest two."""
    found: dict[str, float] = {}
    cases = {"none": [], "all": ["--checkpoint.every=1"]}
    if hasattr(checkpoint, "find"):
        cases["newest 2"] = ["--checkpoint.every=1", "--checkpoint.keep_last=2"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("who heard it once never lost it\n" * 2000)
        for name, flags in cases.items():
            keys = [
                "--data.train=text.txt",
                "--data.tokenizer=bytes",
                "--data.sequence_length=16",
                f"--train.steps={saves}",
            ]
            keys += ["--model.hidden_size=16", "--model.num_layers=2", "--model.num_heads=2", "--objective.chunks=2"]
            keys += ["--train.micro_batch_size=1", "--train.micro_batches_per_update=1", f"--run.dir={name.split()[0]}"]
            command = [sys.executable, "-m", "lptransformer", "train", *keys, *flags]
            started = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            found[name] = time.perf_counter() - started
    return found


def verifying(megabytes: int) -> float | None:
    """Seconds to compare files of so many MB with their sums, in memory that the disk has cached."""
    if not hasattr(checkpoint, "check"):
        return None
    from lptransformer.run_folder import saved_stage
    from lptransformer.run_folder.saved_stage import StageContent

    with tempfile.TemporaryDirectory() as folder:
        weights = {str(number): torch.rand(megabytes * 1000 * 1000 // 4 // 8) for number in range(8)}
        content = StageContent(state={}, weights=weights)
        checkpoint.finish(folder, 1, saved_stage.write(Path(folder), 1, 0, 0, content))
        return seconds(lambda: checkpoint.check(checkpoint.folder_of(folder, 1)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    kinds = {}
    for name, (dtype, zero) in KINDS.items():
        command = [sys.executable, __file__, "--one", dtype, "--zero", str(zero), "--repeats", str(arguments.repeats)]
        command += ["--hidden", str(arguments.hidden), "--layers", str(arguments.layers)]
        kinds[name] = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1]
        )
    return {
        "kinds": kinds,
        "saves": arguments.saves,
        "many": many_saves(arguments.saves),
        "verified_megabytes": arguments.megabytes,
        "verify_seconds": verifying(arguments.megabytes),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
    }


def tables(results: dict[str, Any]) -> list[ResultTable]:
    rows = [
        (
            f"{kind}, {when}",
            f"{one['parameters'] / 1e6:.1f} M",
            f"{one['update_seconds']:.2f}",
            f"{one['lost_seconds']:.3f}",
            f"{one['call_seconds']:.3f}",
            f"{one['copy_seconds']:.3f}",
            f"{one['bytes_per_parameter']:.1f}",
        )
        for kind in KINDS
        for when, result in results.items()
        for one in [result["kinds"][kind]]
    ]
    columns = (
        "run",
        "parameters",
        "update, s",
        "lost per save, s",
        "in the call, s",
        "bare copy, s",
        "bytes per parameter",
    )
    many = [
        (
            when,
            result["saves"],
            *(f"{t:.0f}" if (t := result["many"].get(name)) is not None else None for name in CASES),
        )
        for when, result in results.items()
    ]
    checked = [
        (
            when,
            f"{result['verified_megabytes'] / 1000:g} GB",
            None if (t := result["verify_seconds"]) is None else f"{t:.2f}",
        )
        for when, result in results.items()
    ]
    return [
        ResultTable("saves", "A save", columns, tuple(rows)),
        ResultTable(
            "many", "Many saves of a tiny run, seconds of the whole run", ("", "saves", *CASES.values()), tuple(many)
        ),
        ResultTable("checked", "Comparing files with their sums", ("", "files", "seconds"), tuple(checked)),
    ]


CASES = {"none": "no save", "all": "all kept", "newest 2": "newest 2 kept"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--as", dest="when", default="after", help="name of the row (default: after)")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of checkpoints.json and checkpoints.md")
    parser.add_argument("--repeats", type=int, default=9, help="saves of each kind (default: 9)")
    parser.add_argument("--hidden", type=int, default=512, help="width of the model (default: 512)")
    parser.add_argument("--layers", type=int, default=8, help="blocks of the model (default: 8)")
    parser.add_argument("--saves", type=int, default=1000, help="saves of the tiny run (default: 1000)")
    parser.add_argument("--megabytes", type=int, default=1000, help="of files that are checked (default: 1000)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--zero", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        found = one_save(arguments.hidden, arguments.layers, arguments.one, arguments.zero, arguments.repeats)
        print(json.dumps(found))
        return
    path = arguments.out / "checkpoints.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[arguments.when] = measure(arguments)
    path.write_text(json.dumps(results, indent=1) + "\n")
    update(arguments.out / "checkpoints.md", tables(results))


if __name__ == "__main__":
    main()
