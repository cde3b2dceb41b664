"""Forty kills at random moments, over two runs: the bits of a run that nobody has killed, and every row once."""

from __future__ import annotations

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
import yaml
from test_killed import folder, processes, start  # noqa: F401 - a fixture

from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import read_metrics

pytestmark = [pytest.mark.full]
KILLS = 20  # of each run
TIMES = ("seconds", "tokens_per_second", "tflops_per_process", "mfu")
RUNS: dict[str, dict[str, Any]] = {
    "two pipeline ranks, shared head": {
        "parallel": {"pipeline": 2, "timeout_seconds": 30},
        "objective": {"chunks": 2},
        "head": {"kind": "shared"},
    },
    "two replicas, bf16, ZeRO 2": {
        "parallel": {"data": 2, "timeout_seconds": 30},
        "objective": {"chunks": 2},
        "deepspeed": {"zero_optimization": {"stage": 2}},
    },
}


def rows(run: Path) -> list[dict[str, Any]]:
    """Of the metrics, without what the clock says."""
    found = []
    for row in read_metrics(run):
        kept = {key: value for key, value in row.items() if key not in TIMES}
        for entry in kept.get("stages", []):
            del entry["idle_share"], entry["memory_bytes"]
        found.append(kept)
    return sorted(found, key=lambda row: (row["update"], "evaluation" in row))


@pytest.mark.parametrize("case", RUNS)
def test_a_run_that_is_killed_twenty_times_is_the_run(folder: Path, case: str) -> None:  # noqa: F811
    train = {**small_run.CONFIG["train"], "steps": 400, "eval_every": 20, "lr_scheduler": "cosine"}
    train |= {"dtype": "bf16"} if "bf16" in case else {}
    config = {**small_run.CONFIG, **RUNS[case], "train": train, "checkpoint": {"every": 7, "keep_last": 3}}
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    assert start(folder, "command", "--run.dir=whole").wait(600) == 0, (folder / "log.txt").read_text()[-3000:]
    chance, run, kills = random.Random(case), folder / "run", 0
    while kills < KILLS:
        started = start(folder, "command", *(["--resume"] if (run / "config.yaml").is_file() else []))
        begun = time.monotonic()
        newest = max(checkpoint.complete_updates(run), default=0)
        while max(checkpoint.complete_updates(run), default=0) <= newest and started.poll() is None:
            time.sleep(0.01)  # each start gets on, or the end never comes
            assert time.monotonic() < begun + 120, (folder / "log.txt").read_text()[-3000:]
        time.sleep(chance.random() * 0.3)
        if started.poll() is not None:
            break
        for worker in processes(str(folder))["worker"]:
            worker.send_signal(signal.SIGKILL)
        kills += 1
        started.wait(90)
    while not (run / "ended.json").is_file() or json.loads((run / "ended.json").read_text())["how"] != "finished":
        assert start(folder, "command", "--resume").wait(300) == 0, (folder / "log.txt").read_text()[-3000:]
    print(f"{kills} kills")
    assert kills == KILLS
    assert rows(run) == rows(folder / "whole")
    for one, other in zip(saved_stage.folders(run, 400), saved_stage.folders(folder / "whole", 400), strict=True):
        ours, wanted = saved_stage.SavedStage(one), saved_stage.SavedStage(other)
        assert ours.names == wanted.names
        for name in ours.names:
            assert torch.equal(ours.exact(name), wanted.exact(name)) and ours.kinds(name) == wanted.kinds(name)
            assert all(torch.equal(ours.part(kind, name), wanted.part(kind, name)) for kind in ours.kinds(name))
    checkpoint.check(checkpoint.folder_of(run, 400))
