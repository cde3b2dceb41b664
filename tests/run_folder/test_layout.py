"""What lies in a run folder, and what is removed with a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lptransformer.config.load import load
from lptransformer.errors import RunError
from lptransformer.run_folder import layout

PICTURES = ("loss.png", "loss.svg", "trace.png", "trace.svg", "diagnosis.png", "diagnosis.svg")


def test_with_a_run_all_its_pictures_go_and_nothing_else(tmp_path: Path) -> None:
    """SVG is there where it was asked for, and in folders of earlier versions."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (*PICTURES, "notes.svg"):
        (folder / name).write_text("")
    assert layout.holds_run(folder)
    layout.remove(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.svg"]


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
