"""Run records: what a run was and its results, in a few kilobytes, enough for every table and plot without the run.

A record is a plain dictionary, made from the run folder by study/collect.py:

    format, name, method, overrides, score {set, exit_block}     its identity: from a sweep, else from the configuration
    config          every resolved value but paths               environment   versions, cores, threads
    model           blocks, hidden_size, vocab_size, weights of a block
    texts           {"train" and "valid": {name: {tokens, bytes, words}}}
    updates, steps  done and planned; `complete` when they are equal
    tokens_per_update  positions that the FLOPs count; seconds, tokens_per_second (median, without the start)
    flops           forward of a block, forward and backward of heads, per token
    stages          [{stage, blocks, pipeline_rank, idle_share (nan: not measured), memory_bytes, and per update what it
                      sends: hidden_states_bytes up, gradients_bytes down, mean over phases, were each stage a rank}]
    evaluations     {set: {"columns": [update, tokens, seconds, total_flops, serial_flops, pipeline_flops,
                      blocks with a head...], "rows": [...]}}  nll per token; the rest follows from it and the texts
                    (a resume may change the objective: exits are those of the newest, FLOPs then nan)
    training        {"columns": [update, seconds, blocks with a head...], "rows": [...]}  mean losses, 200 rows at most
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lptransformer import files
from lptransformer.config.schema import renamed, translated
from lptransformer.errors import RunError
from lptransformer.run_folder.metrics import Perplexity, TextCounts, perplexity

Record = dict[str, Any]
FORMAT = 3
READABLE = (2, FORMAT)  # 2: keys of the configuration had other names
RECORD, RECORDS = "record.json", "records.json"
IDENTITY = ("name", "method", "overrides", "score", "processes_at_once")


def exit_blocks(table: Mapping[str, Any]) -> list[int]:
    """The blocks with a head in a table of evaluations."""
    return [column for column in table["columns"] if isinstance(column, int)]


def write(path: Path, records: Record | Sequence[Record]) -> None:
    """One record, or a list of them, as JSON: the same bytes for the same records, a row of a table on one line."""
    text = _text(records) if isinstance(records, dict) else "[\n" + ",\n".join(map(_text, records)) + "\n]"
    files.write_text(path, text + "\n")


def _text(record: Record) -> str:
    """Every key on a line; of what holds rows, every row. Null for what is not finite in rows and stages."""
    stages = [
        {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in stage.items()}
        for stage in record["stages"]
    ]

    def value(content: Any) -> str:
        if isinstance(content, dict) and "rows" in content:
            rows = ",\n  ".join(f"[{','.join(map(_number, row))}]" for row in content["rows"])
            return f'{{"columns": {json.dumps(content["columns"])}, "rows": [\n  {rows}]}}'
        if isinstance(content, dict) and any(isinstance(one, dict) for one in content.values()):
            lines = ",\n ".join(f"{json.dumps(key)}: {value(one)}" for key, one in content.items())
            return f"{{\n {lines}}}"
        return json.dumps(content, allow_nan=False)

    lines = ",\n".join(f"{json.dumps(key)}: {value(content)}" for key, content in {**record, "stages": stages}.items())
    return f"{{\n{lines}\n}}"


def _number(number: float) -> str:
    """Whole numbers as they are, others in six digits; null for what is not finite."""
    if isinstance(number, int):
        return str(number)
    return f"{number:.6g}" if math.isfinite(number) else "null"


def read(path: Path) -> list[Record]:
    """The records in a file. Raises RunError where it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    records = content if isinstance(content, list) else [content]
    for record in records:
        if not isinstance(record, dict) or record.get("format") not in READABLE:
            raise RunError(f"{path} holds no run records of format {FORMAT}; `report RUN` writes {RECORD} into a run")
        try:
            record["config"] = translated(record["config"])
            # Once written for chunks alone; without it equal settings would not be equal.
            record["config"].setdefault("border", {}).setdefault("codec", "none")
            if "overrides" in record:
                record["overrides"] = dict(renamed(key, value) for key, value in record["overrides"].items())
            record["format"] = FORMAT
            record["stages"] = [
                {key: math.nan if one is None else one for key, one in stage.items()} for stage in record["stages"]
            ]
            for table in (record["training"], *record["evaluations"].values()):
                table["rows"] = [[math.nan if number is None else number for number in row] for row in table["rows"]]
        except (KeyError, TypeError, AttributeError):
            raise RunError(f"{path} holds an incomplete record: regenerate it with `report RUN`") from None
    return records


def final_loss(record: Record, name: str, exit_block: int | None = None, update: int | None = None) -> float:
    """The nll per token of the last evaluation (or that at `update`) of a set, at an exit; nan where there is none."""
    table = record["evaluations"].get(name, {"columns": [], "rows": []})
    rows = [row for row in table["rows"] if update is None or row[0] == update]
    if not rows:
        return math.nan
    if exit_block is None:
        return rows[-1][-1]
    return rows[-1][table["columns"].index(exit_block)] if exit_block in table["columns"] else math.nan


def in_all_units(record: Record, name: str, nll_per_token: float) -> Perplexity:
    """A loss on a validation set as perplexity, bits per byte and word perplexity."""
    counts = TextCounts(**record["texts"]["valid"][name])
    return perplexity(nll_per_token * counts.tokens, counts.tokens, counts)
