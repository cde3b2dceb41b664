"""Stands in for `python -m lptransformer train` in tests of sweeps: writes what a run leaves behind, trains nothing.

Arguments: the sweep's base (not read), flags, overrides. The loss depends on the learning rate: best at 0.01. At 0.5
the run fails, at 0.25 it goes on until it is stopped.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from fake_runs import make_run

from lptransformer.methods.stages import StagePlan

PLAN = StagePlan(0, 0, 3, 0, has_head=True, is_first=True, is_last=True, trained=True)


def save(run: Path, update: int) -> None:
    stage = run / "checkpoints" / f"step-{update:08d}" / "stage-0"
    stage.mkdir(parents=True, exist_ok=True)
    (stage / "state.json").write_text(json.dumps({"plan": asdict(PLAN), "num_stages": 1}))
    (stage / "complete").touch()


def open_files() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")]


def main(arguments: list[str]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stopped.append(signum))
    options = dict(text.removeprefix("--").split("=", 1) for text in arguments if "=" in text)
    run, rate = Path(json.loads(options["run.dir"])), float(options.get("train.learning_rate", 0.01))
    overrides = [text for text in arguments if text.startswith("--") and "." in text and "run.dir" not in text]
    until = int(options.get("until", options.get("train.steps", 40)))
    print(f"training {' '.join(sys.argv[1:])}", flush=True)
    if rate == 0.5:
        print("lptransformer: stage 0 skipped 10 updates in a row", file=sys.stderr)
        raise SystemExit(1)
    saved = [int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*")]
    if bool(saved) != ("--resume" in arguments) or max(saved, default=0) > until:
        raise SystemExit(f"updates {saved} are saved, and the sweep does not know")
    if not any(os.readlink(f"/proc/self/fd/{fd}").endswith("sweep.lock") for fd in open_files()):
        raise SystemExit("the lock of the sweep was not handed on")
    end = 2.0 + abs(math.log10(rate / 0.01)) + 0.1 * int(options.get("train.seed", 0))
    if rate == 0.25 and not (run / "checkpoints").exists():
        make_run(run, overrides, lambda update, block: end, updates=7, every=1000)
        while not stopped:
            time.sleep(0.02)
        save(run, 7)
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        (run / "metrics.jsonl").write_text("".join(line for line in lines if "evaluation" not in line))
        return
    make_run(run, overrides, lambda update, block: end + 1 / update, updates=until, every=10)
    save(run, until)


if __name__ == "__main__":
    main(sys.argv[1:])
