"""A run that goes on: evaluations that it owes, files that are broken, another learning rate, text that has moved."""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run
import test_killed
import yaml
from distributed import Pool
from refusals import says
from tiers import slow
from transformers import GPT2Config, GPT2LMHeadModel

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.p2p import Control
from lptransformer.engine.process_groups import leave
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import checkpoint, history, layout
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training import train as story
from lptransformer.training.launcher import run

CONFIG: dict[str, Any] = {
    **small_run.CONFIG,
    "data": {**small_run.CONFIG["data"], "valid": {"a": "valid.txt", "b": "valid.txt"}},
    "train": {**small_run.CONFIG["train"], "steps": 4, "eval_every": 2, "lr_scheduler": "cosine"},
    "checkpoint": {"every": 2},
}
Rows = dict[tuple[int, str | None], Any]
TIMES = ("seconds", "tokens_per_second", "tflops_per_process", "mfu", "idle_share", "memory_bytes")


def train(*arguments: str) -> int:
    """The command, in this process; its exit code."""
    try:
        run(parser(), ["train", "c.yaml", *arguments])
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        leave()
    return 0


def numbers(folder: Path | str = "run") -> Rows:
    """Every row without its times, by update and validation set."""
    rows = read_metrics(folder)
    for row in rows:
        for entry in (row, *row.get("stages", ())):
            for key in TIMES:
                entry.pop(key, None)
    found = {(row["update"], row.get("evaluation")): row for row in rows}
    assert len(found) == len(rows), "a row twice"
    return found


def keep_rows(wanted: Callable[[dict[str, Any]], bool]) -> None:
    path = Path("run/metrics.jsonl")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if wanted(json.loads(line))))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        small_run.stand_in(folder, patch, CONFIG)
        (folder / "valid.txt").write_text(small_run.TEXT[:400])
        assert train() == 0
    return folder


@pytest.fixture
def whole(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Its rows; a copy of it is where the test works."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return numbers()


# ------------------------------------------------------------------------------------------- evaluations owed


@pytest.mark.parametrize("missing", ["a", "ab", ""])
def test_a_run_with_all_its_updates_is_complete_with_its_evaluation_alone(
    whole: Rows, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last save and the evaluation after it, within that, or between it and the end."""
    exported: list[str] = []
    monkeypatch.setattr(story, "export", lambda folder, out: exported.append(out) or [])
    keep_rows(lambda row: row["update"] < 4 or row.get("evaluation", "-") not in missing)
    assert len(numbers()) == len(whole) - len(missing)
    for name in (history.ENDED, "loss.png"):
        Path("run", name).unlink()
    before = checkpoint.stage_folder("run", 4, 0).stat().st_mtime_ns
    assert train("--resume", "--run.export=model") == 0
    assert numbers() == whole and checkpoint.stage_folder("run", 4, 0).stat().st_mtime_ns == before
    assert history.read_end(Path("run")) == "finished"
    assert Path("run/loss.png").is_file() and exported == ["model"]
    capsys.readouterr()
    assert train("--resume", "--run.export=other") == 2
    says(capsys.readouterr().err, "is complete: 4 updates")


def test_what_is_owed_comes_before_the_next_update(whole: Rows) -> None:
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    keep_rows(lambda row: row["update"] <= 2 and row.get("evaluation") != "b")
    assert train("--resume") == 0
    assert numbers() == whole
    assert [*numbers()] == [*whole], "in the order of a run that nobody has killed"


def test_until_an_update_that_is_saved_and_not_evaluated(whole: Rows) -> None:
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    keep_rows(lambda row: row["update"] <= 2 and "stages" in row)
    assert train("--resume", "--until=2") == 0
    assert numbers() == {key: row for key, row in whole.items() if key[0] <= 2}
    assert train("--resume", "--until=2") == 2


@pytest.mark.parametrize("at", [slow(0), 2, slow(4)])
def test_a_stop_within_an_evaluation_is_followed_by_no_update_and_made_up(
    whole: Rows, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Also before the first update of a pretrained model, and after the last one."""
    shutil.rmtree("run")
    keys = ["--checkpoint.every=0"]
    if at == 0:
        sizes = {"vocab_size": 300, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained("gpt2")
        keys += ["--model.pretrained=gpt2", "--data.tokenizer=bytes", "--train.warmup_steps=0"]
        assert train(*keys, "--run.dir=whole") == 0
        whole = numbers("whole")
    evaluate = LocalUpdateEngine.eval_batch

    def stopped(self: LocalUpdateEngine, name: str, *args: Any, **named: Any) -> Any:
        if self.update == at and name == "b":
            self.request(Control.SAVE | Control.STOP, urgent=True)
        return evaluate(self, name, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(LocalUpdateEngine, "eval_batch", stopped)
        assert train(*keys) == 3
    assert history.read_end(Path("run")) == "stopped" and checkpoint.latest("run") == at
    assert (at, "a") in numbers() and (at, "b") not in numbers()
    assert train(*keys, "--resume") == 0
    assert numbers() == whole and history.read_end(Path("run")) == "finished"


def train_run(raw: dict[str, Any], resume: bool) -> None:
    story.train(load(raw), resume)


@pytest.mark.parametrize(
    "keys",
    [
        {"head": {"kind": "shared"}},
        slow({"objective": {"name": "delayed", "chunks": 2}}),
        slow({"objective": {"name": "backprop"}, "engine": "deepspeed_pipeline"}),
    ],
    ids=str,
)
def test_every_process_makes_what_is_owed(pool: Pool, whole: Rows, tmp_path: Path, keys: dict[str, Any]) -> None:
    """The last evaluation of one set; then, from a checkpoint before, what is owed in the middle."""
    absolute = {"train": str(tmp_path / "text.txt"), "cache": str(tmp_path / "prepared")}
    data = {**CONFIG["data"], **absolute, "valid": dict.fromkeys("ab", str(tmp_path / "valid.txt"))}
    raw = {**CONFIG, "data": data, "parallel": {"pipeline": 2}, "run": {"dir": str(tmp_path / "run")}, **keys}
    shutil.rmtree("run")
    pool.run(2, train_run, raw, False)
    undisturbed = numbers()
    keep_rows(lambda row: row["update"] < 4 or row.get("evaluation") != "b")
    pool.run(2, train_run, raw, True)
    assert numbers() == undisturbed and history.read_end(Path("run")) == "finished"
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    keep_rows(lambda row: row["update"] <= 2 and "stages" in row)
    pool.run(2, train_run, raw, True)
    assert numbers() == undisturbed


@pytest.mark.slow
def test_killed_behind_its_saves_a_run_has_every_row_once(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(small_run.TEXT)
    (tmp_path / "valid.txt").write_text(small_run.TEXT * 4)  # an evaluation takes a second
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    log, folder = tmp_path / "log.txt", tmp_path / "run"
    assert test_killed.start(tmp_path, "command", "--run.dir=whole").wait(120) == 0, log.read_text()
    for kill in (2, 4):
        started = test_killed.start(tmp_path, "command", *(["--resume"] if kill > 2 else []))

        def is_saved(update: int = kill) -> bool:
            return folder.is_dir() and update in checkpoint.complete_updates(folder)

        test_killed.wait_for(f"update {kill} is not saved", tmp_path, 120, is_saved)
        started.send_signal(signal.SIGKILL)
        started.wait(60)
        assert (kill, "b") not in numbers(folder), "killed too late"
    assert test_killed.start(tmp_path, "command", "--resume").wait(120) == 0, log.read_text()
    assert numbers(folder) == numbers(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("how", ["a line", "missing"])
def test_broken_metrics_and_notes_are_no_reason_to_refuse(
    whole: Rows, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    path, notes = Path("run", "metrics.jsonl"), Path("run", history.ENVIRONMENT)
    if how == "missing":
        path.unlink()
        notes.unlink()
    else:
        first, *rest = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join([first, b'{"upd\x00\xff\n', *rest[1:]]))  # that of update 2
        notes.write_text("[{")
    Path("run/metrics.csv").write_bytes(b"\xff\x00")
    Path("run/loss.png").write_bytes(b"")
    assert train("--resume") == 0
    out = capsys.readouterr().out
    gone = {(1, None), (2, None), (2, "a"), (2, "b")} if how == "missing" else {(2, None)}
    made_up = {(2, "a"), (2, "b")} if how == "missing" else set()
    assert numbers() == {key: row for key, row in whole.items() if key not in gone - made_up}  # tokens go on too
    assert Path("run/metrics.jsonl.broken").is_file() is (how != "missing")
    assert Path("run/environment.json.broken").is_file() is (how != "missing")
    says(out, f"the rows of {2 if how == 'missing' else 1} of 2 updates are missing", "environment.json")
    assert [start["resumed_after"] for start in history.read_starts(Path("run"))] == [2]
    lines = Path("run/metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == (["3", "4"] if how == "missing" else ["1", "3", "4"])
    assert Path("run/loss.png").stat().st_size > 1000


@pytest.mark.parametrize("command", [["report", "run"], ["export", "run", "out"]])
def test_others_say_that_notes_are_broken(whole: Rows, capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    Path("run", history.ENVIRONMENT).write_text("{}")
    with pytest.raises(SystemExit) as end:
        run(parser(), command)
    assert end.value.code == 2
    says(capsys.readouterr().err, "run/environment.json cannot be read: it holds no list of starts")


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "run/config.yaml is empty"),
        (b"\x00\xff\x1f", "run/config.yaml is not UTF-8 text"),
        (b"data: {train: [", "run/config.yaml, line 1: not valid YAML"),
        (None, "run/config.yaml is not whole"),
    ],
)
def test_a_broken_configuration(
    whole: Rows, capsys: pytest.CaptureFixture[str], content: bytes | None, part: str
) -> None:
    path = Path("run", layout.CONFIG)
    text = path.read_bytes()
    path.write_bytes(text[: text.index(b"run:\n")] if content is None else content)
    assert train("--resume") == 2
    says(capsys.readouterr().err, part)


# ------------------------------------------------------------------------------------------- another way on


def test_another_learning_rate_is_noted_and_followed(whole: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    """More steps too, with a cosine that was at its end."""
    changes = ("--train.learning_rate=0.0001", "--train.steps=8", "--train.grad_clip=0.5")
    assert train("--resume", *changes, "--until=6") == 0
    changed = "train.steps 4 -> 8, train.learning_rate 0.001 -> 0.0001, train.grad_clip 1.0 -> 0.5"
    says(
        capsys.readouterr().out, f"resumed after update 4 with {changed}", "learning rate after update 4 goes from 0 to"
    )
    rates = [row["learning_rate"] for (_, name), row in numbers().items() if name is None]
    assert rates[4:] == pytest.approx([0.5e-4 * (1 + math.cos(math.pi * update / 8)) for update in (4, 5)])
    assert history.read_starts(Path("run"))[-1]["changed"]["train.learning_rate"] == [0.001, 0.0001]
    run(parser(), ["report", "run"])
    says(capsys.readouterr().out, f"resumed after update 4 with {changed}")
    assert train("--resume", *changes, "--train.steps=5") == 2
    says(capsys.readouterr().err, "train.steps = 5", "already has 6 updates; give 7 or more")


def test_text_and_cache_may_move(whole: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    Path("elsewhere").mkdir()
    Path("text.txt").rename("elsewhere/book.txt")
    Path("prepared").rename("elsewhere/cache")
    moved = ("--data.train=elsewhere/book.txt", "--data.cache=elsewhere/cache", "--data.valid.b=valid.txt")
    assert train("--resume", *moved) == 0
    assert numbers() == whole
    says(capsys.readouterr().out, "data.cache prepared -> elsewhere/cache", "['text.txt'] -> ['elsewhere/book.txt']")
    assert evaluate_run(Path("run")) is not None, "the run knows where its sets are now"


def test_text_with_other_content_is_refused(whole: Rows, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(checkpoint.stage_folder("run", 4, 0).parent)
    Path("other.txt").write_text(small_run.TEXT[1:])
    assert train("--resume", "--data.valid.b=other.txt") == 2
    says(capsys.readouterr().err, "the text of data.valid (b)", "not those that the run was started with")
