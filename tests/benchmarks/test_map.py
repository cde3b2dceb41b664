"""benchmarks/map.py: its pictures are drawn again from the points that are there."""

from __future__ import annotations

import importlib
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_pictures_are_drawn_again_without_reckoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    drawn = importlib.import_module("map")

    def reckoned(**point: object) -> None:
        raise AssertionError(f"{point} is in map.json")

    monkeypatch.setattr(drawn, "speeds", reckoned)
    kept = ROOT / "docs/benchmarks/plan/map.json"
    shutil.copy(kept, tmp_path)
    monkeypatch.setattr(sys, "argv", ["map.py", "--again", "--out", str(tmp_path)])
    drawn.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lines.png", "map.json", "map.png"]
    assert (tmp_path / "map.json").read_text() == kept.read_text()
