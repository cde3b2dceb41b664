"""run.profile: traces of torch's profiler of some updates, and none of the others."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from distributed import Pool
from engine_jobs import VOCAB_SIZE
from test_trace import train_run
from tiers import slow

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.process_groups import leave
from lptransformer.methods.schedule import one_update
from lptransformer.models.blueprint import make_blueprint
from lptransformer.run_folder.metrics_log import read_updates
from lptransformer.run_folder.profile import Profiler
from lptransformer.training.launcher import run

# What is stopped and resumed goes on in a schedule that decays at the end of the whole run.
TRAIN = small_run.CONFIG["train"] | {"lr_scheduler": "warmup_stable_decay", "min_learning_rate": 1e-4}
CONFIG = {**small_run.CONFIG, "objective": {"chunks": 2}, "train": TRAIN}


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def actions(path: Path) -> list[str]:
    """The texts of the schedule's actions, in the order of time."""
    named = [one for one in events(path) if one.get("cat") == "user_annotation" and one["name"][0].isdigit()]
    return [one["name"] for one in sorted(named, key=lambda one: float(one["ts"]))]


def wanted(pipeline_rank: int, *overrides: str) -> list[str]:
    blueprint = make_blueprint(load(CONFIG, overrides), VOCAB_SIZE, None)
    pattern = one_update(blueprint.stages, blueprint.objective.usual, pipeline_rank, blueprint.rounds, False)
    return [str(action) for action in pattern.alone]


def train(*more: str) -> list[list[float]]:
    run(parser(), ["train", "c.yaml", "--train.steps=4", "--train.decay_steps=3", *more])
    leave()
    return [[stage["loss"] for stage in row["stages"]] for row in read_updates("run")]


def test_the_updates_asked_for_are_profiled_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_run.stand_in(tmp_path, monkeypatch, CONFIG)
    seen: list[bool] = []
    update = LocalUpdateEngine.train_batch

    def train_batch(self: LocalUpdateEngine) -> Any:
        seen.append(torch.autograd._profiler_enabled())
        return update(self)

    monkeypatch.setattr(LocalUpdateEngine, "train_batch", train_batch)
    train("--run.profile=[2,3]")
    assert seen == [False, True, True, False] and not torch.autograd._profiler_enabled()
    (path,) = Path("run/profile").iterdir()
    assert path.name == "update-2-3-rank-0.json.gz" and actions(path) == 2 * wanted(0)
    forward = next(one for one in events(path) if one["name"] == "0F0" and one["ph"] == "X")
    inside = [
        one["name"]
        for one in events(path)
        if one.get("cat") == "cpu_op" and forward["ts"] <= one["ts"] <= forward["ts"] + forward["dur"]
    ]
    assert "aten::addmm" in inside, "operations lie in the action that they belong to"


@pytest.mark.slow
def test_a_run_that_stops_among_them_has_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on with the rest, with the same losses."""
    small_run.stand_in(tmp_path, monkeypatch, CONFIG)
    losses = train()
    train("--overwrite", "--until", "2", "--run.profile=[2,3]")
    assert train("--resume", "--run.profile=[2,3]") == losses
    assert sorted(path.name for path in Path("run/profile").iterdir()) == [
        f"update-{u}-{u}-rank-0.json.gz" for u in (2, 3)
    ]


def test_what_cannot_be_written_is_said_and_after_an_error_nothing_is(tmp_path: Path) -> None:
    problems: list[str] = []

    def profiler() -> Profiler:
        return Profiler(tmp_path, [1, 2], 0, torch.device("cpu"), lambda: None, problems.append)

    with pytest.raises(ZeroDivisionError), profiler() as one:
        with one.of(1):
            pass
        raise ZeroDivisionError
    assert not torch.autograd._profiler_enabled() and not list(tmp_path.iterdir())
    (tmp_path / "profile").touch()
    with profiler() as one:
        for update in (1, 2, 3):
            with one.of(update):
                pass
    assert len(problems) == 1 and str(tmp_path / "profile" / "update-1-2-rank-0.json.gz") in problems[0]


@pytest.mark.parametrize("engine", [slow("local"), slow("deepspeed_pipeline")])
def test_every_process_has_a_file(pool: Pool, tmp_path: Path, engine: str) -> None:
    """DeepSpeed's own pipeline has no actions of ours."""
    (tmp_path / "text.txt").write_text(small_run.TEXT)
    overrides = ["parallel.pipeline=2", f"engine={engine}", "run.profile=[2,2]", f"run.dir={tmp_path / 'run'}"]
    overrides += [f"data.train={tmp_path / 'text.txt'}", "data.valid=null", f"data.cache={tmp_path / 'cache'}"]
    overrides += ["objective.name=backprop", "objective.chunks=null"] if engine == "deepspeed_pipeline" else []
    pool.run(2, train_run, CONFIG, overrides)
    for rank in range(2):
        path = tmp_path / "run" / "profile" / f"update-2-2-rank-{rank}.json.gz"
        assert any(one["name"] == "aten::addmm" for one in events(path))
        assert actions(path) == (wanted(rank, "parallel.pipeline=2") if engine == "local" else [])
