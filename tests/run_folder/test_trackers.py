"""Trackers get what metrics.jsonl gets: read back with tensorboard's own reader and from wandb's own offline file."""

from __future__ import annotations

import re
import struct
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import small_run

from lptransformer.__main__ import parser
from lptransformer.config.schema import RunSection
from lptransformer.engine.process_groups import leave
from lptransformer.errors import RunError
from lptransformer.run_folder import trackers
from lptransformer.run_folder.metrics_log import MetricsWriter, read_metrics
from lptransformer.run_folder.trackers import TRACKERS, check_installed, scalars
from lptransformer.training.launcher import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    return small_run.stand_in(tmp_path, monkeypatch)


def train(*more: str) -> None:
    run(parser(), ["train", "c.yaml", "--train.steps=3", "--run.trackers=[tensorboard, wandb]", *more])
    leave()


def by_tensorboard(folder: Path) -> dict[tuple[str, int], float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {(tag, one.step): one.value for tag in reader.Tags()["scalars"] for one in reader.Scalars(tag)}


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: after 7 bytes a log of LevelDB, in blocks of 32 KiB."""
    data, place, record = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def by_wandb(folder: Path) -> tuple[set[str], dict[tuple[str, int], float]]:
    """The ids of the runs, and what they logged."""
    from wandb.proto import wandb_internal_pb2

    ids: set[str] = set()
    found: dict[tuple[str, int], float] = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for data in records_of(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            for key in items.keys() - {"update"}:
                if not key.startswith("_"):
                    found[key, int(items["update"])] = float(items[key])
    return ids, found


def written(folder: Path) -> dict[tuple[str, int], float]:
    return {(tag, row["update"]): value for row in read_metrics(folder) for tag, value in scalars(row).items()}


@pytest.mark.slow
def test_both_get_what_metrics_jsonl_gets_and_a_resumed_run_goes_on_in_them(folder: Path) -> None:
    train("--until=1")
    train("--resume")
    wanted = written(Path("run"))
    assert {update for _, update in wanted} == {1, 2, 3} and ("text/perplexity/stage1", 3) not in wanted
    assert by_tensorboard(Path("run")) == pytest.approx(wanted)
    ids, logged = by_wandb(Path("run"))
    assert len(ids) == 1, "one run, resumed"
    assert logged == pytest.approx(wanted)


def test_nothing_is_written_without_being_asked_for(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.csv", "metrics.jsonl"]


def test_the_options_are_the_rows() -> None:
    (of_list,) = get_args(RunSection.model_fields["trackers"].annotation)
    assert get_args(of_list) == tuple(TRACKERS)


def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r'wandb.*pip install "lptransformer\[wandb\]" \(or wandb'):
        check_installed(["wandb"])
    with pytest.raises(SystemExit) as end:
        train()
    assert end.value.code == 2 and "run.trackers has tensorboard" in capsys.readouterr().err
    assert not Path("run").exists()


def test_every_tracker_has_its_extra_and_the_quick_start_installs_none() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert all([row.package] == extras[name] for name, row in TRACKERS.items())
    assert {*TRACKERS, "eval", "lora", "8bit", "test"} == extras.keys()
    installed = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), re.M)
    optional = {re.split(r"[>=\[]", one)[0] for packages in extras.values() for one in packages} - {"lptransformer"}
    assert len(installed) > 20 and not optional & set(installed)


def test_scalars_of_rows() -> None:
    stage: dict[str, Any] = {"stage": 1, "last_block": 3, "loss": 2.5, "grad_norm": None, "skipped": True}
    assert scalars({"update": 4, "learning_rate": 0.1, "stages": [stage]}) == {
        "learning_rate": 0.1,
        "loss/stage1": 2.5,
        "skipped/stage1": 1.0,
    }
    exit_row = {"stage": 0, "last_block": 1, "perplexity": 9.0}
    assert scalars({"update": 4, "evaluation": "emma", "exits": [exit_row]}) == {"emma/perplexity/stage0": 9.0}


def test_a_tracker_that_does_not_open_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def down(folder: Path, resume_at: int | None) -> trackers.Tracker:
        raise OSError("the service is down")

    monkeypatch.setitem(TRACKERS, "wandb", trackers.TrackerRow("wandb", down))
    writer = MetricsWriter(tmp_path, trackers=["wandb"])
    writer.write({"update": 1, "learning_rate": 0.1, "stages": []})
    writer.close()
    said = capsys.readouterr().err
    assert "warning: run.trackers: wandb does not open, and gets nothing: the service is down" in said
    assert len(read_metrics(tmp_path)) == 1


def test_one_that_fails_gets_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = list[str]()

    def failing(update: int, scalars: Any) -> None:
        given.append("failing")
        raise ConnectionError("the service has died")

    def opened(one: Callable[..., Any]) -> trackers.TrackerRow:
        return trackers.TrackerRow("wandb", lambda folder, resume_at: trackers.Tracker(one, lambda: None))

    monkeypatch.setitem(TRACKERS, "wandb", opened(failing))
    monkeypatch.setitem(TRACKERS, "tensorboard", opened(lambda update, scalars: given.append("whole")))
    writer = MetricsWriter(tmp_path, trackers=["wandb", "tensorboard"])
    for update in (1, 2):
        writer.write({"update": update, "learning_rate": 0.1, "stages": []})
    writer.close()
    assert given == ["failing", "whole", "whole"] and len(read_metrics(tmp_path)) == 2
    assert capsys.readouterr().err.count("warning: run.trackers: one takes nothing, and gets no more: the service") == 1


def test_one_that_does_not_close_neither(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError("no network")

    trackers.close_trackers([trackers.Tracker(lambda update, scalars: None, fail)])
    assert "one does not close: no network" in capsys.readouterr().err
