"""docs/config.md is what launch/config_page.py prints."""

from __future__ import annotations

import runpy
from pathlib import Path

from lptransformer.config.schema import PLAIN, SECTIONS, fields_of

ROOT = Path(__file__).parents[2]


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    page = runpy.run_path(str(ROOT / "launch" / "config_page.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page + "\n"
    for key in [*PLAIN, *(f"{section}.{key}" for section in SECTIONS for key in fields_of(section))]:
        assert page.count(f"\n| `{key}` |") == 1, key
