"""`train.epochs`: the updates that it comes to, who may not need the number yet, and the run folder that keeps it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import refusals
import small_run
import yaml
from refusals import says
from transformers import LlamaConfig

from lptransformer.__main__ import parser
from lptransformer.config.epochs import steps, with_steps
from lptransformer.config.load import load, to_yaml
from lptransformer.engine.process_groups import leave
from lptransformer.errors import ConfigError
from lptransformer.run_folder import checkpoint, layout
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.launcher import run

DATA = {"data": {"train": "t.txt"}}
TRAIN = {name: value for name, value in small_run.CONFIG["train"].items() if name != "steps"}
# An update has 4 windows, the text 227.
CONFIG: dict[str, Any] = small_run.CONFIG | {"train": TRAIN | {"epochs": 0.05, "lr_scheduler": "cosine"}}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch, CONFIG)


@pytest.mark.parametrize(
    ("epochs", "rows", "windows", "updates"),
    [(1, 12, 4, 3), (1, 13, 4, 4), (2, 13, 4, 7), (1.5, 12, 4, 5), (0.1, 3, 4, 1), (1.1, 10, 1, 11), (3, 70, 1, 210)],
)
def test_every_window_is_seen_as_often_as_asked(epochs: float, rows: int, windows: int, updates: int) -> None:
    train = {"epochs": epochs, "micro_batch_size": 1, "micro_batches_per_update": windows}
    counted = with_steps(load({**DATA, "train": train}), rows)
    assert counted.train.steps == steps(counted) == updates and counted.train.epochs is None
    assert (updates - 1) * windows < epochs * rows <= updates * windows + 1e-9
    says(counted.at("train.steps"), f"train.steps = {updates} (from train.epochs: {epochs:g} epochs of {rows} windows")


def test_the_number_is_not_taken_before_it_is_known() -> None:
    config = load({**DATA, "train": {"epochs": 2}})
    assert config.train.steps is None
    with pytest.raises(ConfigError, match=r"train\.epochs = 2\.0 \(in the given mapping\).*--train\.steps=1000"):
        steps(config)
    again = load(yaml.safe_load(to_yaml(config)))
    assert (again.train.steps, again.train.epochs) == (None, 2.0)
    assert load(DATA).train.steps == 1000 and with_steps(load(DATA), None).train.steps == 1000


def test_a_warm_up_that_nobody_gave_is_no_longer_than_the_run(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=4, hidden_size=8, num_attention_heads=2).save_pretrained(tmp_path)
    raw: dict[str, Any] = {**DATA, "model": {"pretrained": str(tmp_path)}, "train": {"epochs": 1}}
    sizes = ["--train.micro_batch_size=1", "--train.micro_batches_per_update=4"]
    assert with_steps(load(raw, sizes), 12).train.warmup_steps == 3
    with pytest.raises(ConfigError, match="train.warmup_steps = 4"):
        with_steps(load(raw, [*sizes, "--train.warmup_steps=4"]), 12)


def test_the_two_keys_exclude_each_other() -> None:
    both = {**DATA, "train": {"steps": 5, "epochs": 2}}
    says(refusals.message(both), "train.steps = 5", "no meaning with train.epochs = 2.0", "how long the run is")
    says(refusals.message(DATA, "--train.steps=5", "--train.epochs=2"), "train.steps = 5", "train.epochs = 2.0")
    says(refusals.message({**DATA, "train": {"epochs": 0}}), "train.epochs = 0", "a number above 0")
    says(refusals.message({**DATA, "train": {"num_epochs": 1}}), "unknown key train.num_epochs", "train.epochs")


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"train": {"warmup_steps": 20}}, ("train.warmup_steps = 20", "train.steps = 3 (from train.epochs: 1 epochs")),
        ({"run": {"trace": [3, 4]}}, ("run.trace = [3, 4]", "train.steps = 3")),
        ({"objective": {"backprop_share": 0.1}}, ("objective.backprop_share = 0.1", "train.steps = 3", "no update")),
    ],
)
def test_other_keys_are_checked_when_it_is_known(sections: dict[str, Any], parts: tuple[str, ...]) -> None:
    train = {"epochs": 1, "micro_batch_size": 1, "micro_batches_per_update": 4} | sections.get("train", {})
    config = load({**DATA, **sections, "train": train})
    with pytest.raises(ConfigError) as caught:
        with_steps(config, 12)
    says(str(caught.value), *parts)
    assert with_steps(config, 1200).train.steps == 300


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(parser(), arguments)
    assert end.value.code == 2
    leave()
    return capsys.readouterr().err


def test_commands_that_do_not_count(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(refused(capsys, "plan", "c.yaml", "--gpu=h100"), "train.epochs = 0.05 (in c.yaml)", "--train.steps=1000")
    halving = "halving: {updates: [1, 3]}"
    (folder / "s.yaml").write_text(f"base: c.yaml\ngrid: {{train.seed: [0, 1]}}\n{halving}\n")
    says(refused(capsys, "sweep", "s.yaml"), "halving counts updates", "train.epochs = 0.05", "give train.steps")
    run(parser(), ["train", "c.yaml", "--dry-run"])
    says(capsys.readouterr().out, "an update: 64 tokens; train.epochs = 0.05", "counted when the run starts", "peak")
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "s.yaml", "text.txt"]


def test_a_sweep_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "s.yaml").write_text("base: c.yaml\ngrid: {train.epochs: [0.05, 0.1]}\n")
    run(parser(), ["sweep", "s.yaml", "--dry-run"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-1] for row in rows if row[0].startswith("runs/epochs")] == ["3", "6"]


@pytest.mark.slow
def test_a_run_keeps_the_number_and_is_the_run_of_that_number(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(refused(capsys, "train", "c.yaml", "--until=4"), "--until=4", "from 1 to train.steps = 3")
    for arguments in (["--until=1"], ["--resume"], ["--train.steps=3", "--run.dir=by-hand"]):
        run(parser(), ["train", "c.yaml", *arguments])
        leave()
    assert "train.steps = 3 (from train.epochs: 0.05 epochs of 227 windows, 4 in an update)" in capsys.readouterr().out
    written = yaml.safe_load((folder / "run" / layout.CONFIG).read_text())["train"]
    assert (written["steps"], written["epochs"]) == (3, None)
    weights = [checkpoint.stage_folder(folder / run, 3, 0) / "weights.safetensors" for run in ("run", "by-hand")]
    assert weights[0].read_bytes() == weights[1].read_bytes()  # so is the cosine of the learning rates
    text = refused(capsys, "train", "c.yaml", "--resume")
    says(text, "is complete: 3 updates of train.steps = 3")
    text = refused(capsys, "train", "c.yaml", "--resume", "--train.epochs=0.03")
    says(text, "train.steps = 2 (from train.epochs", "already has 3 updates")


def test_label_tokens_go_on_where_they_were(folder: Path) -> None:
    """Of completions windows have unlike numbers of labels."""
    rows = [json.dumps({"prompt": "a", "completion": "b" * number}) for number in range(1, 15)]
    (folder / "pairs.jsonl").write_text("\n".join(rows))
    pairs = ["train", "c.yaml", "--data.train=pairs.jsonl", "--data.valid=null", "--train.epochs=1"]
    for more in (["--until=1"], ["--resume"], ["--run.dir=whole"]):
        run(parser(), [*pairs, *more])
        leave()
    resumed, whole = ([row["tokens"] for row in read_metrics(folder / name)] for name in ("run", "whole"))
    assert resumed == whole and len(set(whole)) == len(whole) > 1


def test_nothing_is_started_where_the_number_contradicts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "train", "c.yaml", "--train.warmup_steps=20")
    says(text, "train.warmup_steps = 20", "train.steps = 3")
    assert not (folder / "run").exists()
