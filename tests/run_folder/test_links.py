"""Links in a run folder are refused by whatever reads it; and a new run folder is on the disk when it is made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_runs import make_run

from lptransformer.errors import RunError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_adapter, export_run
from lptransformer.run_folder import layout
from lptransformer.study import report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("links"), updates=(10, 20))
    (folder / layout.PRETRAINED).mkdir()
    (folder / layout.PRETRAINED / "generation_config.json").write_text("{}")
    (folder / "wandb").mkdir()
    (folder / "wandb" / "latest-run").symlink_to("nowhere")
    return folder


def test_a_new_run_folder_outlives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.readlink(f"/proc/self/fd/{file}")), fsync(file))[1])
    folder = make_run(tmp_path, updates=())
    written = [path for path in folder.rglob("*") if path.is_file()]
    assert {folder / "config.yaml", folder / "data.json"} < set(written)
    assert [one for one in written if not {str(one), f"{one}.tmp"} & synced] == []
    assert {str(folder.parent), str(folder), str(folder / "tokenizer")} <= synced


READERS: dict[str, Callable[[Path, Path], Any]] = {
    "evaluate, generate, diagnose": lambda run, out: trained_model.find(run),
    "load": lambda run, out: trained_model.load(run, 20),
    "export": export_run,
    "export --adapter": export_adapter,
    "report": lambda run, out: report.report(run),
    "resume": lambda run, out: layout.check(run, layout.read_config(run), resume=True, overwrite=False),
}
PLACES = ["config.yaml", "model.json", "tokenizer", "tokenizer/tokenizer_config.json", "metrics.jsonl", "checkpoints"]
PLACES += ["profile", "pretrained/generation_config.json", "checkpoints/step-00000020"]
IN_CHECKPOINT = ["stage-1", "stage-1/weights.safetensors", "stage-0/state.json"]


@pytest.mark.parametrize(("place", "reader"), [(place, one) for one in READERS for place in PLACES])
def test_links_in_a_run_folder_are_refused(run: Path, tmp_path: Path, place: str, reader: str) -> None:
    path, kept = run / place, tmp_path / "kept"
    there = path.exists()
    if there:
        path.rename(kept)
    else:
        kept.touch()
    path.symlink_to(kept)
    try:
        with pytest.raises(RunError, match="is a link") as caught:
            READERS[reader](run, tmp_path / "out")
    finally:
        path.unlink()
        if there:
            kept.rename(path)
    assert str(path) in str(caught.value) and str(kept) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", IN_CHECKPOINT)
def test_links_in_the_checkpoint_that_is_read_are_refused(run: Path, tmp_path: Path, place: str) -> None:
    path = run / "checkpoints" / "step-00000020" / place
    path.rename(tmp_path / "kept")
    path.symlink_to(tmp_path / "kept")
    try:
        for name in set(READERS) - {"report"}:  # it reads no checkpoint
            with pytest.raises(RunError, match=f"{place} is a link"):
                READERS[name](run, tmp_path / "out")
        assert trained_model.find(run, step=10).update == 10
    finally:
        path.unlink()
        (tmp_path / "kept").rename(path)


def test_the_run_folder_itself_may_be_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "run").symlink_to(run)
    export_run(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file() and os.path.islink(tmp_path / "run")
