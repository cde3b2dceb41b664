"""The diagnosis of a run's checkpoint on one of its validation sets: tables, a file, a picture."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lptransformer import figures, files
from lptransformer.console import bar, print_table
from lptransformer.data.token_set import Batch, TokenSet, make_batch
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.local_gradients import diagnose
from lptransformer.evaluation.perplexity import to_json
from lptransformer.evaluation.texts import tokenizer_folder, valid_sets
from lptransformer.evaluation.trained_model import ByStage
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder import layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAME = "diagnosis"
_COLOURS = ("#0072B2", "#D55E00")


def diagnose_run(
    run: Path,
    *,
    step: int | None = None,
    batches: int = 8,
    batch_size: int = 8,
    set_name: str | None = None,
    exit_block: int | None = None,
    by_stage: ByStage = "auto",
) -> dict[str, Any]:
    """Diagnose the checkpoint after `step` updates (the newest one by default); gradients are those of the usual phase.

    On `batches` x `batch_size` full windows, or all where there are fewer, evenly spread over the validation set
    `set_name` (the first one by default). With `exit_block` the model ends at the exit after that block: the true
    gradient is that of its loss, and heads above it train nothing. `by_stage`: whether one group of blocks is in
    memory at a time (auto: where the whole model does not fit), with the same bits.

    Returns what diagnosis.json holds: {"run", "step", "set", "objective", "delayed", "exit", "window", "windows",
    "batches", "batch_size"} and the fields of local_gradients.Diagnosis. Raises UserError for what is missing, damaged,
    or has no objective.
    """
    for flag, number in (("--batches", batches), ("--batch-size", batch_size)):
        if number < 1:
            raise UserError(f"{flag} {number}: it must be 1 or more")
    last = trained_model.find(run, step, exit_block).exits[-1][0]
    target = trained_model.find(run, step)
    if target.update is None:
        raise UserError(
            f"{run} is a model folder: it does not say which loss trained which block, so there is no local gradient "
            "to diagnose; name the run, or `evaluate` the folder"
        )
    target = replace(target, exits=tuple(one for one in target.exits if one[0] <= last))
    method = layout.read_config(run).objective.name
    use_fair_share_of_cores(1)
    with tempfile.TemporaryDirectory(prefix="lptransformer-") as scratch:
        tokenizer = load_tokenizer(tokenizer_folder(target))
        sets = valid_sets(run, tokenizer, Path(scratch))
        if set_name is not None and set_name not in sets:
            raise UserError(f"--set {set_name}: {run} has no such validation set; there are: {', '.join(sets)}")
        name = set_name or next(iter(sets))
        chosen = _spread(name, sets[name], batches, batch_size)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    blueprint = trained_model.blueprint_of_target(target)
    if trained_model.goes_by_stage(target, by_stage, spare=4):  # a group's gradients, of two kinds, and their sums
        groups = trained_model.groups_on_disk(target, blueprint, device)
    else:
        groups = trained_model.load_target(target, device).groups
    objective = blueprint.objective
    phase = replace(objective.usual, spans=tuple(span for span in objective.usual.spans if span.last <= last))
    with bar("diagnosing", (2 * len(groups) - 1) * len(chosen)) as advance:
        found = diagnose(groups, blueprint, phase, chosen, device, lambda: advance(1))
    results = {"run": str(run), "step": target.update, "set": name, "objective": method, "delayed": objective.delayed}
    results |= {"exit": exit_block, "window": sets[name].sequence_length}
    results |= {"windows": sum(len(one.input_ids) for one in chosen), "batches": len(chosen), "batch_size": batch_size}
    return results | asdict(found)


def _spread(name: str, token_set: TokenSet, batches: int, batch_size: int) -> list[Batch]:
    """Full windows of a set at equal distances, in memory."""
    rows = min(batches * batch_size, token_set.full_rows)
    if rows == 0:
        raise DataError(
            f"{name}: {token_set.manifest['tokens']} tokens are too few for a window of {token_set.sequence_length}"
        )
    windows = [token_set.window(i * token_set.full_rows // rows) for i in range(rows)]
    groups = [windows[start : start + batch_size] for start in range(0, rows, batch_size)]
    return [make_batch(group, len(group), token_set.sequence_length) for group in groups]


def write_diagnosis(run: Path, results: dict[str, Any]) -> Path:
    """diagnosis.json and diagnosis.png in the run folder; returns the path of the first."""
    path = run / f"{NAME}.json"
    files.write_text(path, json.dumps(json.loads(to_json(results)), indent=1) + "\n")
    draw_diagnosis(results, run / NAME)
    return path


def print_diagnosis(results: dict[str, Any]) -> None:
    """Three tables: gradients of every block, ranks after every block, agreement of every exit."""
    stale = ", both at the same weights" if results["delayed"] else ""
    print_table(
        f"local gradient of {results['objective']} against the true one{stale} ({_where(results)})",
        ("block", "stage", "cosine", "of the sum", "norm ratio", "of the sum"),
        [[_block(row[0]), *row[1:]] for row in _rows(results["gradients"])],
    )
    print("  1 where the last head's loss is the only one; - where the objective trains nothing\n")
    print_table(
        f"hidden states after every block: {results['tokens']} tokens, {results['hidden_size']} dimensions",
        ("after block", "stage", "ends stage", "effective rank", "stable rank"),
        [[str(block), stage, "yes" if ends else "", *ranks] for block, stage, ends, *ranks in _rows(results["ranks"])],
    )
    print()
    print_table(
        "agreement of the exits with the last one (KL in nats)",
        ("stage", "exit after block", "nll per token", "same best token", "KL(last || exit)"),
        _rows(results["exits"]),
    )


def draw_diagnosis(results: dict[str, Any], stem: Path) -> Path:
    """STEM.png: cosine by block, ranks by block, agreement by exit; dotted lines are ends of stages."""
    figure, panels = figures.new_figure(1, 3, (13, 4.2))
    figure.suptitle(_where(results), fontsize=9, x=0.01, ha="left")
    _draw_gradients(panels[0], results)
    _draw_ranks(panels[1], results)
    _draw_exits(panels[2], results)
    last = results["ranks"][-1]["block"]
    for axes, first in zip(panels, (-1, 0, 0), strict=True):
        _block_axis(axes, first, last)
    for axes in panels[:2]:
        for one in results["ranks"][:-1]:
            if one["ends_stage"]:
                axes.axvline(one["block"] + 0.5, color="0.5", linewidth=0.8, linestyle=":")
    return figures.save(figure, stem)


def _draw_gradients(axes: Axes, results: dict[str, Any]) -> None:
    rows = results["gradients"]
    blocks = [-1 if one["block"] is None else one["block"] for one in rows]
    lines = (("cosine", "mean over batches"), ("cosine_of_sum", "of the sum"))
    for (key, label), colour in zip(lines, _COLOURS, strict=True):
        axes.plot(blocks, _column(rows, key), "o-", color=colour, label=label, markersize=4)
    axes.set_title(f"gradient of {results['objective']} against the true one", loc="left", fontsize=10)
    axes.set_ylabel("cosine")
    axes.set_xlabel("block")
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.04)
    axes.legend(frameon=False, fontsize=8)


def _draw_ranks(axes: Axes, results: dict[str, Any]) -> None:
    rows = results["ranks"]
    blocks = [one["block"] for one in rows]
    for key, colour in zip(("effective_rank", "stable_rank"), _COLOURS, strict=True):
        axes.plot(blocks, _column(rows, key), "o-", color=colour, label=key.replace("_", " "), markersize=4)
    most = min(results["hidden_size"], results["tokens"] - 1)
    axes.axhline(most, color="0.5", linewidth=0.8, linestyle="--")
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": "0.4"}
    axes.annotate(f"greatest possible: {most}", (0, most), xytext=(0, 3), **style)
    axes.set_yscale("log", base=2)
    axes.set_ylim(top=2.5 * most)  # room for the legend
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=2)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("rank of the hidden states", loc="left", fontsize=10)
    axes.set_xlabel("after block")


def _draw_exits(axes: Axes, results: dict[str, Any]) -> None:
    rows = results["exits"]
    blocks, shares = [one["last_block"] for one in rows], _column(rows, "agreement")
    axes.plot(blocks, shares, "o-", color=_COLOURS[0], markersize=4)
    style: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
    for block, share, kl in zip(blocks, shares, _column(rows, "kl_from_last"), strict=True):
        if math.isfinite(share):
            axes.annotate(f"{kl:.2g}", (block, share), xytext=(0, -12), **style)
    axes.set_title("agreement with the last exit (numbers: KL in nats)", loc="left", fontsize=10)
    axes.set_ylabel("same best token (share of positions)")
    axes.set_xlabel("exit after block")
    axes.set_ylim(0.0, 1.04)


def _block_axis(axes: Axes, first: int, last: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(first - 0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda place, _: "emb." if place == -1 else f"{place:g}"))


def _where(results: dict[str, Any]) -> str:
    exit_block = results["exit"]
    part = "" if exit_block is None else f" up to the exit after block {exit_block}"
    return f"{results['run']}{part} after {results['step']} updates, {results['windows']} windows of {results['set']}"


def _rows(entries: list[dict[str, Any]]) -> list[list[Any]]:
    return [list(entry.values()) for entry in entries]


def _column(rows: list[dict[str, Any]], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]


def _block(block: int | None) -> str:
    return "embedding" if block is None else str(block)
