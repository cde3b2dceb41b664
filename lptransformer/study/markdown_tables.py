"""Tables as Markdown, and documents whose tables are regenerated.

What stands between `<!-- table:NAME -->` and `<!-- end -->` in a document is a table of that name; the rest is prose.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lptransformer import files
from lptransformer.errors import RunError

_SECTION = re.compile(r"<!-- table:(?P<name>\S+) -->\n.*?<!-- end -->", re.S)
_MARKER = re.compile(r"<!-- (?:table:\S+|end) -->")


@dataclass(frozen=True)
class ResultTable:
    """A table by name. Cells are text, numbers or None; the first column is set left, the others right."""

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


def markdown(table: ResultTable) -> str:
    """The table in Markdown, its title above it."""
    lines = [table.columns, ["---", *["---:"] * (len(table.columns) - 1)], *table.rows]
    cells = [["-" if cell is None else str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return f"{table.title}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in cells) + "\n"


def update(path: Path, tables: Sequence[ResultTable], prefix: str = "") -> list[str]:
    """Rewrite the tables of a document, and leave those with other names alone; a missing document is created.

    `prefix` and a slash stand before the names of tables in the document, so that it can hold several reports.
    Returns the names that were written. Raises RunError where the document has none of the tables, where it has one
    with this prefix that is not among them, and where markers do not come in pairs.
    """
    named = {f"{prefix}/{table.name}" if prefix else table.name: table for table in tables}
    if not path.exists():
        files.write_text(path, "\n".join(_section(name, table) + "\n" for name, table in named.items()))
        return list(named)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    found = [match["name"] for match in _SECTION.finditer(text)]
    pairs = sum(len(_MARKER.findall(match[0])) == 2 for match in _SECTION.finditer(text))
    if len(_MARKER.findall(text)) != 2 * pairs:
        raise RunError(f"{path}: every <!-- table:NAME --> needs an <!-- end --> of its own, on lines of their own")
    own = [name for name in found if name.startswith(f"{prefix}/" if prefix else "") and (prefix or "/" not in name)]
    unknown = [name for name in own if name not in named]
    if unknown or not own:
        what = f"has a table {unknown[0]!r}" if unknown else "has no table of this report"
        raise RunError(f"{path} {what}; a section is <!-- table:NAME --> ... <!-- end -->, NAME: {', '.join(named)}")

    def renewed(match: re.Match[str]) -> str:
        name = match["name"]
        return _section(name, named[name]) if name in named else match[0]

    files.write_text(path, _SECTION.sub(renewed, text))
    return own


def _section(name: str, table: ResultTable) -> str:
    return f"<!-- table:{name} -->\n{markdown(table)}<!-- end -->"
