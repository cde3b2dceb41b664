"""What lies in a run folder, and what is removed with a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import says

from lptransformer.config.load import load
from lptransformer.errors import RunError
from lptransformer.run_folder import history, layout, lock

PICTURES = ("loss.png", "loss.svg", "trace.png", "trace.svg", "diagnosis.png", "diagnosis.svg")
STEP = "checkpoints/step-00000010"
WRITTEN = (
    *("config.yaml", "data.json", "metrics.jsonl", "ended.json", "tokenizer/tokenizer.json", "wandb/run-id"),
    *(f"{STEP}/complete", f"{STEP}/deepspeed/state/layer_00.pt", f"{STEP}/stage-0/deepspeed/state/mp_rank_00.pt"),
    *(f"{STEP}/stage-0/{name}" for name in ("weights.safetensors", "state.json", "complete", "others.safetensors")),
    "checkpoints/step-00000020/stage-1/weights.safetensors",
    *("tensorboard/events.out.tfevents.1.host", "profile/update-2-13-rank-0.json.gz"),
)
FOREIGN = (
    *("notes.svg", "checkpoints/best/model.pt", f"{STEP}/why.txt", f"{STEP}/stage-0/mine.bin"),
    *("tensorboard/other.txt", "profile/update-2-13-rank-0.json"),
)


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or path.is_file()}


def refusal(folder: Path, overwrite: bool) -> str:
    config = load({"data": {"train": "text.txt"}, "run": {"dir": str(folder)}})
    with pytest.raises(RunError) as caught:
        layout.check(folder, config, resume=False, overwrite=overwrite)
    return str(caught.value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder in which a start of this program has begun."""
    lock.begin(tmp_path / "run").file.close()
    return tmp_path / "run"


def test_with_a_run_all_its_pictures_go_and_nothing_else(run: Path) -> None:
    """SVG is there where it was asked for, and in folders of earlier versions."""
    assert not layout.holds_run(run)
    put(run, *PICTURES, "notes.svg")
    assert layout.holds_run(run)
    layout.remove(run)
    assert files_in(run) == {"notes.svg", "run.lock", "generation"}


def test_what_others_have_put_into_its_folders_stays_and_is_named(run: Path, tmp_path: Path) -> None:
    put(run, *WRITTEN, *FOREIGN)
    put(tmp_path, "far/weights.safetensors")
    (run / STEP / "stage-1").symlink_to(tmp_path / "far")
    links = {f"{STEP}/stage-1"}
    left = layout.remove(run)
    assert {path.relative_to(run).as_posix() for path in left} == {*FOREIGN, *links} - {"notes.svg"}
    assert files_in(run) == {*FOREIGN, *links, "run.lock", "generation"}
    assert files_in(tmp_path / "far") == {"weights.safetensors"}
    (run / "wandb").mkdir()
    put(run, "wandb/another/programs.log")
    assert run / "wandb" in layout.remove(run) and (run / "wandb/another/programs.log").is_file()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_another_program_is_not_replaced(tmp_path: Path, overwrite: bool) -> None:
    """A configuration of ours may lie beside one's own work: where a run has begun more stands there."""
    mine = {"config.yaml", "data.json", "checkpoints/best.pt", "wandb/run-1/log.txt"}
    put(tmp_path, *mine)
    says(refusal(tmp_path, overwrite), str(tmp_path), "config.yaml, data.json, checkpoints, wandb", "--run.dir")
    with pytest.raises(RunError):
        layout.remove(tmp_path)
    assert files_in(tmp_path) == mine


def test_a_run_of_before_there_were_locks_is_known_by_what_it_ran_with(tmp_path: Path) -> None:
    put(tmp_path, "config.yaml")
    for content in ("", "{}", '[{"versions": {"torch": "2"}}]', "[1]"):
        (tmp_path / history.ENVIRONMENT).write_text(content)
        assert not layout.is_own(tmp_path)
    (tmp_path / history.ENVIRONMENT).write_text('[{"versions": {"lptransformer": "0.3"}}]')
    assert layout.is_own(tmp_path)
    layout.remove(tmp_path)
    assert not files_in(tmp_path)


def test_a_link_in_place_of_a_folder_is_not_followed(run: Path, tmp_path: Path) -> None:
    put(tmp_path, "far/step-00000010/complete")
    put(run, "config.yaml")
    (run / "checkpoints").symlink_to(tmp_path / "far")
    says(refusal(run, overwrite=True), "checkpoints", "link")
    assert files_in(tmp_path / "far") == {"step-00000010/complete"} and (run / "config.yaml").is_file()


TWO_SETS = {"data": {"train": "t.txt", "valid": {"a": "v.txt", "b": "v.txt"}}}


@pytest.mark.parametrize(
    ("keys", "until", "updates"),
    [
        ("", None, [10]),
        ("train.eval_every=4", None, [4, 8, 10]),
        ("train.eval_every=4", 3, [3]),
        ("train.eval_every=2", 4, [2, 4]),
    ],
)
def test_when_an_evaluation_is_due(keys: str, until: int | None, updates: list[int]) -> None:
    config = load(TWO_SETS, [*keys.split(), "train.steps=10"])
    last = until or 10
    assert [update for update in range(last + 1) if layout.is_evaluated(config, update, until)] == updates
    config.model.pretrained = "m"
    assert layout.is_evaluated(config, 0, until)


def test_the_sets_that_are_owed(tmp_path: Path) -> None:
    config = load(TWO_SETS, ["train.steps=10"])
    assert layout.owed(tmp_path, config, 10) == ["a", "b"] and layout.owed(tmp_path, config, 9) == []
    (tmp_path / "metrics.jsonl").write_text('{"update": 10, "evaluation": "b", "exits": []}\n{"brok\n')
    assert layout.owed(tmp_path, config, 10) == ["a"]


def test_token_sets_are_compared_by_content(tmp_path: Path) -> None:
    """By their address, which is in them, and at the end of the name of one that has gone."""

    def token_set(name: str, address: str) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"_fingerprint": address}))
        return str(folder)

    def check(before: dict[str, str], now: dict[str, str]) -> None:
        (tmp_path / layout.DATA).write_text(json.dumps({"train": before, "valid": {}}))
        layout.check_data(tmp_path, {"train": now, "valid": {}})

    here = token_set("old/t-11", "11")
    for now in (here, token_set("new/t-11", "11"), token_set("renamed", "11")):
        check({"t": here}, {"t": now})
        check({"t": "/gone/t-11"}, {"t": now})
    for before, after in (
        ({"t": here}, {"t": token_set("new/t-12", "12")}),
        ({"t": here}, {"t": token_set("lying/t-11", "12")}),
        ({"t": here}, {"u": here}),
        ({"t": here, "u": here}, {"u": here, "t": here}),  # another order of windows
    ):
        with pytest.raises(RunError, match=r"cannot be resumed.*data\.train"):
            check(before, after)
