"""Every file of a checkpoint, damaged in every way: who resumes goes back to the checkpoint before, who evaluates or
exports is told which file it is, and `checkpoints --verify` names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from distributed import Pool
from small_run import CONFIG, TEXT
from tiers import full, slow

from lptransformer.__main__ import main
from lptransformer.config.load import load
from lptransformer.errors import RunError
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import read_updates
from lptransformer.training.train import train

KEYS = ["train.steps=6", "checkpoint.every=2", "train.freeze=['*.mlp.*']", "objective.chunks=2"]
NEWEST, BEFORE = 4, 2


def train_run(folder: Path, resume: bool, until: int | None = None, step: int | None = None) -> None:
    source = {
        **CONFIG,
        "data": {**CONFIG["data"], "train": str(folder / "text.txt"), "valid": str(folder / "text.txt")},
    }
    keys = [*KEYS, f"run.dir={folder / 'run'}", f"data.cache={folder / 'cache'}"]
    train(load(source, keys), resume=resume, until=until, step=step)


@pytest.fixture(scope="module")
def made(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed: a run that has stopped after update 4 of 6, and in `whole` the same that has not."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.txt").write_text(TEXT)
    pool.run(1, train_run, folder, False)
    shutil.move(folder / "run", folder / "whole")
    pool.run(1, train_run, folder, False, NEWEST)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it, with the text where it was."""
    shutil.copytree(made / "run", tmp_path / "run")
    (tmp_path / "text.txt").symlink_to(made / "text.txt")
    (tmp_path / "cache").symlink_to(made / "cache")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    config["run"]["dir"], config["data"]["cache"] = str(tmp_path / "run"), str(tmp_path / "cache")
    for kind in ("train", "valid"):
        for source in config["data"][kind].values():
            source["files"] = str(tmp_path / "text.txt")
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def weights(run: Path, update: int) -> list[dict[str, torch.Tensor]]:
    return [saved_stage.read_weights(one) for one in saved_stage.folders(run, update)]


def flip(path: Path) -> None:
    """One bit, near the end: where the tensors are."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
}
STAGE = "stage-1"
FILES = {
    "weights": f"{STAGE}/weights.safetensors",
    "optimizer": f"{STAGE}/optimizer-0.safetensors",
    "state": f"{STAGE}/state.json",
    "frozen": "../frozen-*.safetensors",
}
READ_BY_PEOPLE = ("weights", "state", "frozen")  # evaluation needs no optimizer
QUICK = [("weights", "flipped"), ("optimizer", "truncated"), ("state", "empty"), ("frozen", "missing")]


@pytest.mark.parametrize(
    ("what", "damage"),
    [(w, d) if (w, d) == QUICK[0] else slow(w, d) if (w, d) in QUICK else full(w, d) for w in FILES for d in DAMAGES],
)
def test_a_damaged_file_is_found(
    pool: Pool, made: Path, folder: Path, capsys: pytest.CaptureFixture[str], what: str, damage: str
) -> None:
    run = folder / "run"
    step = checkpoint.folder_of(run, NEWEST)
    if what == "frozen":  # that of the newest checkpoint alone
        path = (step / f"../{saved_stage.read_state(step / STAGE)['frozen']}").resolve()
    else:
        path = step / FILES[what]
    DAMAGES[damage](path)
    says = f"{path.name} is damaged"
    if what in READ_BY_PEOPLE:
        for read in (evaluate_run, lambda run: export_run(run, folder / "out")):
            with pytest.raises(RunError, match=says) as caught:
                read(run)
            assert "\n" not in str(caught.value) and not (folder / "out").exists()
        shared = what == "frozen"  # by all checkpoints
        if not shared:
            assert evaluate_run(run, step=BEFORE)
    with pytest.raises(SystemExit) as ended:
        main_with("checkpoints", str(run), "--verify")
    said = capsys.readouterr()
    assert ended.value.code == 2 and path.name in said.err and says.split(" is ")[1] in said.out
    if what == "frozen":
        with pytest.raises(RunError, match=says):
            pool.run(1, train_run, folder, True)
        return
    pool.run(1, train_run, folder, True)
    assert [row["update"] for row in read_updates(run)] == [1, 2, 3, 4, 5, 6]
    for one, other in zip(weights(run, 6), weights(made / "whole", 6), strict=True):
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    assert [path.name for path in (run / "checkpoints/set-aside").iterdir()] == [f"step-{NEWEST:08d}.0"]


def main_with(*arguments: str) -> None:
    import sys

    before, sys.argv = sys.argv, ["lptransformer", *arguments]
    try:
        main()
    finally:
        sys.argv = before


def spoil_marker(step: Path) -> None:
    (step / "complete").write_bytes(b'{"format": 2, ')


def mix_steps(step: Path) -> None:
    """A stage of an older checkpoint inside a newer one, whole as it is."""
    older = checkpoint.folder_of(step.parent.parent, BEFORE)
    shutil.rmtree(step / STAGE)
    shutil.copytree(older / STAGE, step / STAGE)


def rename_step(step: Path) -> None:
    """An older checkpoint under a newer name."""
    shutil.rmtree(step)
    shutil.copytree(checkpoint.folder_of(step.parent.parent, BEFORE), step)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_marker, "complete cannot be read"),
        (mix_steps, f"{STAGE}/.* is damaged"),
        (rename_step, "complete is damaged .it was written after 2 updates"),
    ],
)
def test_a_checkpoint_that_is_none_is_not_taken(
    pool: Pool, folder: Path, spoil: Callable[[Path], None], says: str
) -> None:
    run = folder / "run"
    spoil(checkpoint.folder_of(run, NEWEST))
    with pytest.raises(RunError, match=says):
        evaluate_run(run)
    pool.run(1, train_run, folder, True, NEWEST)
    assert checkpoint.complete_updates(run) == [BEFORE, NEWEST]
    assert evaluate_run(run)


def test_nothing_is_left_to_go_back_to(pool: Pool, folder: Path) -> None:
    for update in (BEFORE, NEWEST):
        flip(checkpoint.folder_of(folder / "run", update) / FILES["weights"])
    with pytest.raises(RunError, match="weights.safetensors is damaged"):
        pool.run(1, train_run, folder, True)
    assert checkpoint.complete_updates(folder / "run") == [BEFORE, NEWEST], "nothing is lost"


def test_a_step_can_be_chosen(pool: Pool, folder: Path) -> None:
    run = folder / "run"
    with pytest.raises(
        RunError, match=r"no complete checkpoint after 3 updates \(--step\): there are those after 2, 4"
    ):
        pool.run(1, train_run, folder, True, None, 3)
    pool.run(1, train_run, folder, True, 3, BEFORE)
    assert checkpoint.complete_updates(run) == [2, 3]
    assert [row["update"] for row in read_updates(run)] == [1, 2, 3]
    assert [path.name for path in (run / "checkpoints/set-aside").iterdir()] == [f"step-{NEWEST:08d}.0"]
