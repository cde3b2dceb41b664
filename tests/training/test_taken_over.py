"""A run whose folder another start has taken over writes nothing more; and no update is made beyond the last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_run
from distributed import Pool

import lptransformer
from lptransformer.__main__ import parser
from lptransformer.engine.process_groups import leave
from lptransformer.errors import RunError, TakenOverError
from lptransformer.processes import command_of_run
from lptransformer.run_folder import checkpoint, history, layout, lock
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training import train as story
from lptransformer.training.launcher import exit_code, run
from lptransformer.training.progress import Progress

CONFIG = {**small_run.CONFIG, "run": {"dir": "run", "trace": [1, 2]}, "checkpoint": {"every": 2}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield small_run.stand_in(tmp_path, monkeypatch, CONFIG)
    leave()


def test_who_has_been_taken_over_writes_nothing_more(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: dict[str, str] = {}

    def after_an_update(progress: Progress, row: Any) -> None:
        (folder / "run" / layout.LOCK).unlink()
        lock.begin(folder / "run").file.close()
        taken.update(small_run.contents(folder / "run"))

    monkeypatch.setattr(Progress, "update", after_an_update)
    with pytest.raises(SystemExit) as end:
        run(parser(), ["train", "c.yaml"])
    assert end.value.code == 1 and "another start of this run has taken over" in capsys.readouterr().err
    assert taken and small_run.contents(folder / "run") == taken
    assert [row["update"] for row in read_metrics("run")] == [1] and not (folder / "run" / history.ENDED).exists()


def test_an_engine_asks_before_it_saves(folder: Path) -> None:
    def may_commit() -> None:
        raise TakenOverError("no")

    with lptransformer.initialize("c.yaml") as engine:
        engine.train_batch()
        engine.may_commit = may_commit
        with pytest.raises(TakenOverError):
            engine.save_checkpoint("run")
    assert not Path("run").exists()


def test_a_run_that_is_resumed_at_its_last_update_makes_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a run that was thought to be dead has saved the last one after the look at its folder."""
    run(parser(), ["train", "c.yaml"])
    leave()
    rows = read_metrics("run")
    monkeypatch.setattr(layout, "check", lambda *arguments: None)
    run(parser(), ["train", "c.yaml", "--resume"])
    assert read_metrics("run") == rows and checkpoint.complete_updates("run") == [2]
    assert history.read_end(Path("run")) == "finished"


def start_late(folder: Path) -> tuple[str, int]:
    """A start whose look at the folder came before another run was at work there."""
    from lptransformer.config.load import load

    look, story.lock.check_free = story.lock.check_free, lambda folder: None
    try:
        texts = [f"--data.{kind}={folder}/text.txt" for kind in ("train", "valid")]
        story.train(load(folder / "c.yaml", [f"--run.dir={folder}/run", *texts]))
    except RunError as error:
        return str(error), error.exit_code
    except SystemExit as end:
        return "", int(str(end.code))
    finally:
        story.lock.check_free = look
    raise AssertionError("it was not refused")


def test_the_end_of_another_command_s_run_is_not_that_of_this_one(tmp_path: Path) -> None:
    for command, code in ((command_of_run(), 3), (("elsewhere", 1), 1)):
        history.note_end(tmp_path, "stopped", 5, command)
        assert exit_code(tmp_path, None, code=1) == code


@pytest.mark.slow
def test_a_start_that_comes_too_late_ends_all_its_processes_with_one_message(folder: Path, pool: Pool) -> None:
    (folder / "c.yaml").write_text((folder / "c.yaml").read_text() + "parallel: {pipeline: 2}\n")
    with lock.begin(folder / "run").file:
        before = small_run.contents(folder / "run")
        (said, code), others = pool.run(2, start_late, folder)
        assert "a run is at work there" in said and code == 2 and others == ("", 2)
        assert small_run.contents(folder / "run") == before
