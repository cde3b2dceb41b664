"""Which checkpoints are kept, and `lptransformer checkpoints`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from saved_runs import make_run, remark

from lptransformer.__main__ import main
from lptransformer.config.schema import CheckpointSection
from lptransformer.errors import RunError
from lptransformer.run_folder import checkpoint, lock, retention, saved_stage
from lptransformer.run_folder.saved_stage import Frozen, StageContent

ROWS = [
    {"update": update, "evaluation": "v", "exits": [{"nll_per_token": 9.0}, {"nll_per_token": loss}]}
    for update, loss in ((2, 3.0), (4, 2.0), (6, 2.0), (8, math.nan), (10, 2.5))
]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, [2, 4, 6, 8, 10, 12]),
        ({"keep_last": 1}, [12]),
        ({"keep_last": 9}, [2, 4, 6, 8, 10, 12]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 10, 12]),
        ({"keep_last": 1, "keep_best": "v"}, [4, 12]),  # of equals the first
        ({"keep_last": 1, "keep_best": "other"}, [12]),
    ],
)
def test_what_is_kept(keep: dict[str, object], kept: list[int]) -> None:
    options = CheckpointSection(**keep)
    why = retention.reasons([12, 2, 4, 6, 8, 10], options, retention.losses_of(ROWS, options.keep_best))
    assert [update for update, reason in why.items() if reason] == kept


@pytest.mark.parametrize(
    ("losses", "is_enough"),
    [([3], False), ([3, 3], False), ([3, 2, 1], False), ([3, 2, 2, 2], True), ([1, 2, 0.5], False), ([1, 2, 3], True)],
)
def test_two_evaluations_without_progress_are_enough(losses: list[float], is_enough: bool) -> None:
    assert retention.early(losses, 2) is is_enough


def test_frozen_weights_go_with_the_last_checkpoint_that_names_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, updates=(10,))
    state = saved_stage.read_state(checkpoint.stage_folder(run, 10, 0))

    def save(update: int, frozen: Frozen) -> None:
        content = StageContent(state={**state, "update": update, "num_stages": 1}, frozen=frozen)
        checkpoint.finish(run, update, saved_stage.write(run, update, 0, 0, content))

    first, second = Frozen({"body.a": torch.zeros(3)}), Frozen({"body.a": torch.ones(3)})
    for update, frozen in ((20, first), (30, first), (40, second)):
        save(update, frozen)
    names = sorted(str(frozen.file) for frozen in (first, second))
    assert sorted(path.name for path in (run / "checkpoints").glob("frozen-*")) == names
    assert retention.prune(run, CheckpointSection(keep_last=2), {}) == [10, 20]
    assert sorted(path.name for path in (run / "checkpoints").glob("frozen-*")) == names
    assert retention.prune(run, CheckpointSection(keep_last=1), {}) == [30]
    assert [path.name for path in (run / "checkpoints").glob("frozen-*")] == [second.file]
    checkpoint.check(checkpoint.folder_of(run, 40))


def test_what_was_set_aside_keeps_its_frozen_weights_and_hinders_nobody(tmp_path: Path) -> None:
    run = make_run(tmp_path, updates=(10,))
    state = {**saved_stage.read_state(checkpoint.stage_folder(run, 10, 0)), "num_stages": 1}
    for update in (20, 30):
        frozen = Frozen({"body.a": torch.full((3,), float(update))})
        content = StageContent(state={**state, "update": update}, frozen=frozen)
        checkpoint.finish(run, update, saved_stage.write(run, update, 0, 0, content))
    checkpoint.set_aside_newer(run, 20)
    (run / "checkpoints/.removed-step-00000010").mkdir()  # of a removal that was interrupted
    assert retention.prune(run, CheckpointSection(keep_last=1), {}) == [10]
    assert len(list((run / "checkpoints").glob("frozen-*"))) == 2
    assert not list((run / "checkpoints").glob(".removed-*"))


DIGITS = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("marker", "says"),
    [
        ({"files": []}, "is damaged"),
        ({"files": {}}, "it names no file"),
        ({"files": {"../../../etc/passwd": [1, DIGITS]}}, "is no file of a checkpoint"),
        ({"files": {"/dev/zero": [0, DIGITS]}}, "is no file of a checkpoint"),
        ({"files": {f"../../frozen-{DIGITS}.safetensors": [1, DIGITS]}}, "is no file of a checkpoint"),
        ({"files": {"stage-0/state.json": ["x", DIGITS]}}, "is damaged"),
        ({"format": 3}, "has format 3, and this version reads 2"),
        ({"update": 11}, "it was written after 11 updates"),
    ],
    ids=str,
)
def test_a_marker_that_is_none_is_refused(tmp_path: Path, marker: dict[str, object], says: str) -> None:
    run = make_run(tmp_path)
    path = checkpoint.folder_of(run, 10) / checkpoint.COMPLETE
    path.write_text(json.dumps({**json.loads(path.read_text()), **marker}))
    with pytest.raises(RunError, match=says):
        checkpoint.check(checkpoint.folder_of(run, 10))


@pytest.mark.parametrize("frozen", ["../../elsewhere/secret.safetensors", 5, ["x"], {}], ids=str)
def test_frozen_weights_are_of_the_run(tmp_path: Path, frozen: object) -> None:
    run = make_run(tmp_path)
    folder = checkpoint.stage_folder(run, 10, 0)
    (folder / "state.json").write_text(
        json.dumps({**json.loads((folder / "state.json").read_text()), "frozen": frozen})
    )
    remark(folder.parent)
    with pytest.raises(RunError, match="state.json is damaged .frozen is"):
        saved_stage.read_weights(folder)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["lptransformer", "checkpoints", *arguments])
    try:
        main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_command_lists_verifies_and_prunes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, updates=(10, 20, 30))
    (run / "metrics.jsonl").write_text("".join(json.dumps({**row, "update": 10}) + "\n" for row in ROWS[:1]))
    left = run / "checkpoints" / ".step-00000040.0"
    left.mkdir()
    assert call(monkeypatch, str(run)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines[-3:]] == ["10", "20", "30"] and lines[-1][-2:] == ["the", "newest"]
    assert call(monkeypatch, str(run), "--verify") == 0
    assert capsys.readouterr().out.count("good") == 3
    assert call(monkeypatch, str(run), "--prune", "--train.steps=3") == 2
    assert "only checkpoint.keep_* have a meaning here" in capsys.readouterr().err
    assert call(monkeypatch, str(run), "--prune", "--checkpoint.keep_last=1", "--checkpoint.keep_best=v") == 2
    assert "there is no such validation set" in capsys.readouterr().err
    hold = lock.begin(run)
    try:
        assert call(monkeypatch, str(run), "--prune", "--checkpoint.keep_last=1") == 2
    finally:
        hold.file.close()
    assert checkpoint.complete_updates(run) == [10, 20, 30] and left.exists(), "nothing of a run at work is touched"
    capsys.readouterr()
    assert call(monkeypatch, str(run), "--prune", "--checkpoint.keep_last=1") == 0
    assert "removed 2 checkpoints: 10, 20" in capsys.readouterr().out
    assert checkpoint.complete_updates(run) == [30] and not left.exists()
    for path in checkpoint.stage_folder(run, 30, 0).glob("*.safetensors"):
        path.write_bytes(b"")
    assert call(monkeypatch, str(run), "--prune") == 2
    assert "nothing is removed" in capsys.readouterr().err and checkpoint.complete_updates(run) == [30]
    assert call(monkeypatch, str(tmp_path)) == 2
    with pytest.raises(RunError, match="is no run folder"):
        retention.options(tmp_path, {})
