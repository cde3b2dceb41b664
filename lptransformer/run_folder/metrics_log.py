"""The metrics of a run on disk: metrics.jsonl and metrics.csv; trackers get the same (run_folder/trackers.py).

run_folder/metrics.py says what a row holds.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lptransformer import files
from lptransformer.errors import RunError
from lptransformer.run_folder.metrics import MetricsRow
from lptransformer.run_folder.trackers import close_trackers, give_trackers, open_trackers, scalars

JSONL_NAME = "metrics.jsonl"
CSV_NAME = "metrics.csv"
# Strict JSON has no such numbers, and null already says "there is none" (the loss of a stage without a head).
# Python's float() and JavaScript's Number() both read these words.
_WORDS = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_FLOATS = {word: float(word) for word in _WORDS.values()}


class MetricsWriter:
    """Appends rows to metrics.jsonl and the rows of updates to metrics.csv, and gives them to `trackers`. A row is in
    the files when `write` returns.

    metrics.jsonl is strict JSON: numbers that are not finite are the strings "NaN", "Infinity", "-Infinity". With
    `resume_at=u` the rows after update u are cut off first; a broken file is set aside, and what can be read of it
    kept. `kept` are the rows of before, `lost` says which of them are missing, if any. Raises RunError where the folder
    holds metrics and `resume_at` is not given.
    """

    def __init__(self, folder: str | Path, resume_at: int | None = None, trackers: Sequence[str] = ()) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        jsonl_path = self.folder / JSONL_NAME
        if resume_at is None and jsonl_path.exists():
            raise RunError(f"{jsonl_path} already holds the metrics of a run; resume that run or use another folder")
        rows, broken = readable(self.folder)
        self.kept = [row for row in rows if row["update"] <= (resume_at or 0)]
        missing = (resume_at or 0) - sum("stages" in row for row in self.kept)
        self.lost = f"{jsonl_path}: the rows of {missing} of {resume_at} updates are missing" if missing > 0 else ""
        if broken:
            aside = files.set_aside(jsonl_path).name
            self.lost = f"{self.lost or jsonl_path}; lines of it cannot be read, the whole is in {aside}"
        files.write_text(jsonl_path, "".join(map(_json_line, self.kept)))
        self._columns = self._rewrite_csv(self.kept)
        self._jsonl = jsonl_path.open("a", encoding="utf-8")
        self._trackers = open_trackers(trackers, self.folder, resume_at)

    def write(self, row: MetricsRow) -> None:
        self._jsonl.write(_json_line(row))
        self._jsonl.flush()
        if "stages" in row:
            cells = _flat(row)
            if set(cells) <= set(self._columns):
                with (self.folder / CSV_NAME).open("a", encoding="utf-8", newline="") as file:
                    file.write(_csv_line(cells.get(column) for column in self._columns))
            else:  # the first row, or a resumed run that has more stages than before
                self._columns = self._rewrite_csv(read_metrics(self.folder))
        give_trackers(self._trackers, row["update"], scalars(row))

    def sync(self) -> None:
        """Return when what was written is on the disk, so that a power cut leaves it."""
        self._jsonl.flush()
        os.fsync(self._jsonl.fileno())

    def close(self) -> None:
        self._jsonl.close()
        close_trackers(self._trackers)

    def _rewrite_csv(self, rows: Iterable[MetricsRow]) -> list[str]:
        """Rewrite metrics.csv from the rows of updates and return its columns."""
        flat = [_flat(row) for row in rows if "stages" in row]
        columns = list(dict.fromkeys(column for cells in flat for column in cells))
        lines = [_csv_line(columns)] if columns else []
        lines += [_csv_line(cells.get(column) for column in columns) for cells in flat]
        files.write_text(self.folder / CSV_NAME, "".join(lines))
        return columns


def read_metrics(folder: str | Path) -> list[MetricsRow]:
    """The rows of a run folder in the order they were written. A last line that was cut off in the middle (the
    process was killed) is left out. Raises RunError where the file is missing or broken elsewhere."""
    path = Path(folder) / JSONL_NAME
    if not path.is_file():
        raise RunError(f"{path} does not exist: {folder} is not the folder of a run that has trained")
    rows = []
    for number, row in _lines(path):
        if isinstance(row, ValueError):
            raise RunError(f"{path}, line {number}, is no row ({row}): the file was changed or damaged")
        rows.append(row)
    return rows


def readable(folder: str | Path) -> tuple[list[MetricsRow], bool]:
    """What can be read of the rows of a run folder, one of every update and evaluation, and whether lines cannot."""
    path = Path(folder) / JSONL_NAME
    found = [row for _, row in _lines(path)] if path.is_file() else []
    rows = {(row["update"], row.get("evaluation")): row for row in found if not isinstance(row, ValueError)}
    return list(rows.values()), any(isinstance(row, ValueError) for row in found)


def _lines(path: Path) -> Iterator[tuple[int, MetricsRow | ValueError]]:
    """The number of every line with its row, or with what is wrong with it; without a last one that was cut off."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            row = _with_floats(json.loads(line))
            if not (isinstance(row, dict) and type(row.get("update")) is int and ("stages" in row or "exits" in row)):
                raise ValueError("of an update or an evaluation")
            yield number, row
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                yield number, error


def read_updates(folder: str | Path) -> list[MetricsRow]:
    """The rows of updates among `read_metrics`. Raises RunError where there is none yet."""
    updates = [row for row in read_metrics(folder) if "stages" in row]
    if not updates:
        raise RunError(f"{folder} has no update in its metrics yet: train first")
    return updates


def _with_words(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return _WORDS[str(float(value))]
    if isinstance(value, dict):
        return {key: _with_words(item) for key, item in value.items()}
    return [_with_words(item) for item in value] if isinstance(value, list) else value


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):  # a validation set may be called "NaN"
        return {key: item if key == "evaluation" else _with_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_floats(item) for item in value]
    return _FLOATS.get(value, value) if isinstance(value, str) else value


def _json_line(row: MetricsRow) -> str:
    return json.dumps(_with_words(row), allow_nan=False, ensure_ascii=False) + "\n"


def _csv_line(cells: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(int(cell) if isinstance(cell, bool) else cell for cell in cells)
    return line.getvalue()


def _flat(row: MetricsRow) -> dict[str, Any]:
    """The row of an update as flat cells by column: `loss_stage0` for the loss of stage 0, and so on."""
    cells = {key: value for key, value in row.items() if key != "stages"}
    for entry in row["stages"]:
        cells |= {f"{key}_stage{entry['stage']}": value for key, value in entry.items() if key != "stage"}
    return cells
