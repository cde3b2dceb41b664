"""benchmarks/generation.py: its numbers from given ones, and that it runs and goes on where it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import generation  # noqa: E402


def test_the_tables_come_from_the_numbers() -> None:
    def prompt(same: bool, ordinary: float, drafted: float) -> dict[str, Any]:
        row = {"tokens": 12, "same": same, "passes": 6, "drafted": 24, "accepted": 6}
        return row | {"ordinary tokens/s": ordinary, "drafted tokens/s": drafted}

    seconds = {"token": 0.1, "verify": 0.2, "draft": 0.05}
    prompts = [prompt(True, 10, 12), prompt(True, 8, 10), prompt(False, 9, 9)]
    case = {"drafter": "logit lens", "block": 3, "blocks": 8, "prompts": prompts, "pass_seconds": seconds}
    found = {"model": "m", "machine": "of some kind", "settings": generation.FULL, "cases": {"one": case}}
    speed, limits = generation.tables(found)
    assert speed.rows == (("logit lens", "3 of 8", "25.0%", "2.00", "9.00", "10.00", "1.20", "2 of 3"),)
    assert limits.rows == (("logit lens", "3 of 8", "0.50", "2.00", "2.00", "0.50", "1.20", "1.25"),)


@pytest.mark.slow
def test_it_measures_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft changes no token; a case that is taken out of the JSON is measured again, and no other."""
    monkeypatch.setattr(generation, "PASSES", 2)
    flags = ["--tiny", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    generation.main(flags)
    numbers = tmp_path / "generation.json"
    found = json.loads(numbers.read_text())
    drafters = {case["drafter"] for case in found["cases"].values()}
    assert drafters == {"logit lens", "fitted lens", "private heads, trained"} and len(found["cases"]) == 9
    assert all(prompt["same"] for case in found["cases"].values() for prompt in case["prompts"])
    again = found["cases"].pop("fitted lens, block 3")
    numbers.write_text(json.dumps(found))
    generation.main(flags)
    after = json.loads(numbers.read_text())["cases"]
    assert after.pop("fitted lens, block 3") != again and after == found["cases"]
    page = (tmp_path / "generation.md").read_text()
    assert page.count("| fitted lens |") == 6 and "2 of 2" in page
    (tmp_path / "generation.md").unlink()
    generation.main(["--tables", *flags[3:]])
    assert (tmp_path / "generation.md").read_text() == page
