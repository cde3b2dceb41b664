"""Results of runs: tables and pictures, from their folders or from records of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from lptransformer import files
from lptransformer.console import achieved, print_table
from lptransformer.data.token_set import TokenSet
from lptransformer.errors import RunError
from lptransformer.evaluation import ngram
from lptransformer.run_folder import history, layout
from lptransformer.run_folder.loss_plot import plot_losses
from lptransformer.run_folder.metrics import MetricsRow, perplexity, text_counts
from lptransformer.run_folder.metrics_log import read_metrics, read_updates
from lptransformer.study import collect, markdown_tables, plots, records
from lptransformer.study.comparison import choices, find
from lptransformer.study.result_tables import Question, tables

EXIT_COLUMNS = ("model", "nats/token", "perplexity", "bits/byte", "word perplexity")


def report(run: Path, baselines: bool = False, svg: bool = False) -> None:
    """Print the last evaluation of every exit, and what it was before training where that was measured (of a pretrained
    model), speed and achieved FLOP/s, and idle share and memory of every stage.

    Writes loss.png and record.json into the run folder. With `baselines`, also unigram, bigram and trigram models of
    the training text, on the same validation text. With `svg`, also loss.svg.
    Raises RunError where the folder holds no run, or one without an update.
    """
    config = layout.read_config(run)
    metrics, updates, starts = read_metrics(run), read_updates(run), history.read_starts(run)
    sets = layout.read_data(run)
    before = {row["evaluation"]: row["exits"] for row in metrics if "evaluation" in row and row["update"] == 0}
    for name, last in {row["evaluation"]: row for row in metrics if "evaluation" in row}.items():
        rows = [_row(f"exit after block {one['last_block']}", one) for one in last["exits"]]
        rows += [_row(f"before training: {one['last_block']}", one) for one in before.get(name, ())]
        if baselines:
            rows += _ngram_rows(sets, name)
        print_table(
            f"{name} after {last['update']} updates, windows of {config.data.sequence_length}", EXIT_COLUMNS, rows
        )
    record = collect.build(run)
    rows = [_stage_row(stage) for stage in record["stages"]]
    steady = updates[len(updates) // 10 :]  # without the start, where memory and caches are cold
    for line in history.what_changed(starts):
        print(line)
    speed, *of_process = (_median(steady, key) for key in ("tokens_per_second", "tflops_per_process", "mfu"))
    known = "  ".join([f"{speed:,.0f} tokens/s", *achieved(*of_process)])
    print_table(f"{known} (median)", ("stage", "idle share", "peak memory of its process"), rows)
    plot_losses(metrics, run / "loss.png", [(stage["stage"], *stage["blocks"]) for stage in record["stages"]], svg)
    records.write(run / records.RECORD, record)
    print(f"run folder: {run}   losses: {run / 'loss.png'}   record: {run / records.RECORD}")


def compare(
    paths: Sequence[Path],
    out: Path,
    question: Question,
    document: Path | None = None,
    prefix: str = "",
    svg: bool = False,
) -> None:
    """Print the tables of a comparison of run folders, sweep folders and files of records; draw its plots into `out`.

    With `svg` every plot also as SVG. With `document` its tables are rewritten (study/markdown_tables.py), under names
    that begin with `prefix`. Raises RunError where there is nothing to compare, or the question names what no run has,
    UserError where `out` or `document` cannot be written.
    """
    if document is not None and (out.exists() or document.resolve().parent != out.resolve()):  # else it is made
        files.check_output(document, "--markdown")
    everything = [record for path in paths for record in collect.collect(path)]
    found = [record for record in everything if record["evaluations"]]
    if not found:
        raise RunError(f"{', '.join(map(str, paths))}: no run there has been evaluated yet (train.eval_every)")
    for record in everything:
        if not record["evaluations"]:
            print(f"left out, because it has not been evaluated yet: {record['name']}")
    methods = list(dict.fromkeys(record["method"] for record in found))
    if question.baseline is None and "backprop" in methods:
        question = replace(question, baseline="backprop")
    results = tables(found, question)
    files.make_folder(out, "--out")
    for result in results:
        print_table(result.title, result.columns, result.rows)
        print()
    chosen, look = choices(found, question.choose), plots.looks(methods)
    base = find(chosen, question.baseline, "--baseline") if question.baseline else None
    drawn = []
    for name in dict.fromkeys(name for record in found for name in record["evaluations"]):
        drawn.append(plots.draw_losses(chosen, name, base, out, svg))
        drawn.append(plots.draw_costs(chosen, name, base, out, svg))
        drawn.append(plots.draw_curves(chosen, name, look, out, svg))
    print(f"plots{' (and .svg)' if svg else ''}: " + "  ".join(map(str, drawn)))
    if document is not None:
        print(f"{document}: {', '.join(markdown_tables.update(document, results, prefix))}")


def _median(updates: Sequence[MetricsRow], key: str) -> float | None:
    """Of the rows that have the number; those of earlier versions lack some."""
    known = [row[key] for row in updates if row.get(key) is not None]
    return median(known) if known else None


def _row(model: str, numbers: dict[str, Any]) -> tuple[str, ...]:
    keys = ("nll_per_token", "perplexity", "bits_per_byte", "word_perplexity")
    return (model, *(f"{numbers[key]:.{3 if key != 'word_perplexity' else 1}f}" for key in keys))


def _stage_row(stage: dict[str, Any]) -> tuple[str, str, str]:
    first, last = stage["blocks"]
    name = f"{stage['stage']} (blocks {first}-{last})"
    idle = f"{stage['idle_share']:.1%}" if math.isfinite(stage["idle_share"]) else "-"  # not measured
    return name, idle, f"{stage['memory_bytes'] / 2**20:,.0f} MiB"


def _ngram_rows(sets: dict[str, Any], name: str) -> list[tuple[str, ...]]:
    import numpy as np

    def ids(folder: str) -> tuple[Any, TokenSet]:
        tokens = TokenSet.open(folder)
        return np.concatenate(tokens.chunks), tokens

    train = np.concatenate([ids(folder)[0] for folder in sets["train"].values()])
    valid, token_set = ids(sets["valid"][name])
    scored = np.ones(len(valid), bool)
    if "labelled" in token_set.columns:
        scored = np.concatenate(token_set.columns["labelled"].values) == 1
    vocab, counts = token_set.manifest["vocab_size"], text_counts(token_set.manifest)
    rows = []
    for order, model in ngram.NAMES.items():
        nats = ngram.nll(train, valid, vocab, order, scored)
        assert math.isfinite(nats)
        numbers = perplexity(nats * int(scored.sum()), int(scored.sum()), counts)
        rows.append(_row(f"{model} model of the training text", vars(numbers)))
    return rows
