"""What lies in a run folder, and what is removed with a run."""

from __future__ import annotations

from pathlib import Path

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
