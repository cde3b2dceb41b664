"""docs/config.md is what launch/config_page.py prints; docs/methods.md has every method and every option of a head."""

from __future__ import annotations

import runpy
from pathlib import Path

from lptransformer.config.schema import PLAIN, SECTIONS, fields_of
from lptransformer.methods.heads import HEADS
from lptransformer.methods.objectives import METHODS

ROOT = Path(__file__).parents[2]


def test_the_page_of_keys_is_that_of_the_schema() -> None:
    page = runpy.run_path(str(ROOT / "launch" / "config_page.py"))["page"]()
    assert (ROOT / "docs" / "config.md").read_text() == page + "\n"
    for key in [*PLAIN, *(f"{section}.{key}" for section in SECTIONS for key in fields_of(section))]:
        assert page.count(f"\n| `{key}` |") == 1, key


def test_every_method_and_every_option_of_a_head_is_explained() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    for name in METHODS:
        assert f"\n### `{name}`\n" in page, name
    for name in [*HEADS, *(key for key in fields_of("head") if key not in ("kind", "rank"))]:
        assert f"\n| `{name}` | " in page, name
