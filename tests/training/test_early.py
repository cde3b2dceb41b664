"""A run that gets no better ends at an evaluation, by those before it; what is kept of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from distributed import Pool
from small_run import CONFIG, TEXT
from tiers import slow

from lptransformer.config.load import load
from lptransformer.errors import ConfigError, TrainingError
from lptransformer.run_folder import checkpoint, metrics_log
from lptransformer.run_folder.metrics_log import MetricsWriter, read_metrics
from lptransformer.training import reporter
from lptransformer.training.train import train


def train_run(folder: Path, resume: bool, until: int | None, *keys: str) -> None:
    text = str(folder / "text.txt")
    source = {**CONFIG, "data": {**CONFIG["data"], "train": text, "valid": text, "cache": str(folder / "cache")}}
    train(load(source, [f"run.dir={folder / 'run'}", *keys]), resume=resume, until=until)


@pytest.mark.parametrize("pipeline", [1, slow(2)])
def test_a_run_without_progress_ends_at_an_evaluation(pool: Pool, tmp_path: Path, pipeline: int) -> None:
    """At update 2 it is as good as ever; 4 and 6 are no better; so 8 is the last, also where it was stopped between."""
    (tmp_path / "text.txt").write_text(TEXT)
    keys = ["train.steps=40", "train.eval_every=2", "train.patience=2", "train.learning_rate=1e-30"]
    keys += ["checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_best=valid"]
    keys += [f"parallel.pipeline={pipeline}"]
    pool.run(pipeline, train_run, tmp_path, False, 5, *keys)
    pool.run(pipeline, train_run, tmp_path, True, None, *keys)
    run = tmp_path / "run"
    rows = read_metrics(run)
    assert [row["update"] for row in rows if "stages" in row] == list(range(1, 9))
    assert [row["update"] for row in rows if "evaluation" in row] == [2, 4, 5, 6, 8]
    assert json.loads((run / "ended.json").read_text())["how"] == "finished"
    assert checkpoint.complete_updates(run) == [2, 7, 8], "the newest two, and the first of equals"


def watched(folder: Path, broken: str) -> tuple[int, str]:
    """Six updates, each saved and one kept, with a picture or metrics that cannot be written: how often the metrics
    were read, and what is wrong."""
    read, lines = list[Path](), metrics_log._lines

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics_log, "_lines", lambda path: read.append(path) or lines(path))
        patch.setattr(*{"picture": (reporter, "plot_losses", fail), "metrics": (MetricsWriter, "write", fail)}[broken])
        try:
            train_run(folder, False, None, "train.steps=6", "checkpoint.every=1", "checkpoint.keep_last=1")
        except TrainingError as error:
            return len(read), str(error)
    return len(read), ""


def test_a_picture_ends_no_run_and_metrics_are_not_read_for_every_checkpoint(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ((read, wrong),) = pool.run(1, watched, tmp_path, "picture")
    run = tmp_path / "run"
    assert read <= 4 and not wrong and json.loads((run / "ended.json").read_text())["how"] == "finished"
    assert checkpoint.complete_updates(run) == [6] and not (run / "loss.png").exists()


def test_metrics_that_cannot_be_written_end_the_run_with_a_line(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    ((_, wrong),) = pool.run(1, watched, tmp_path, "metrics")
    assert wrong == f"the metrics in {tmp_path / 'run'} cannot be written: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["checkpoint.keep_every=2"], "checkpoint.keep_every.*has no meaning with checkpoint.keep_last"),
        (["checkpoint.keep_last=1", "checkpoint.keep_best=test"], "no such validation set; there are valid"),
        (["train.patience=2"], "train.patience.*has no meaning with train.eval_every"),
        (["checkpoint.keep_last=0"], "checkpoint.keep_last"),
        (["checkpoint.on_error=sing"], "go_on"),
    ],
)
def test_keys_without_a_meaning_are_refused(keys: list[str], says: str) -> None:
    source = {**CONFIG, "checkpoint": {}, "train": {**CONFIG["train"]}}
    for key in keys:
        section, _, name = key.partition("=")[0].partition(".")
        value = key.partition("=")[2]
        source[section] = {**source[section], name: int(value) if value.isdigit() else value}
    with pytest.raises(ConfigError, match=says):
        load(source)
