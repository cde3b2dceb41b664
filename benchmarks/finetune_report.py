"""The page of the study of fine-tuning, docs/benchmarks/finetune.md and its picture, from the records of its runs.

Losses are compared window by window: the difference of a recipe to backprop of the same text, tokens and seed, each at
the rate of its own that does best on the text to choose by, is a mean over windows with its standard error; of several
seeds a mean over them. Differences of losses d are shown as differences of perplexity, exp(d) - 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lptransformer.figures import new_figure, save
from lptransformer.study import markdown_tables
from lptransformer.study.comparison import Estimate
from lptransformer.study.markdown_tables import ResultTable
from lptransformer.study.plots import COLOURS, label_points

Record = dict[str, Any]
NOVEL = "moby-dick"  # that of the recipes
BEFORE, BACKPROP, COPIED = "before", "backprop", "copied-heads"
SETS = ("choose", "report", "old")
MIB = 2**20
PIPELINED = 4  # micro-batches of an update for which memory is predicted beside one
AIMS = ((2, 1.0, 0.7), (4, 3.0, 0.5))  # chunks, percent of perplexity, share of backprop's serial FLOPs


def to_json(record: Record) -> str:
    """A line for every key, so that the numbers of a set stand on one."""
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(folder: Path) -> list[Record]:
    """The records of a folder, in the order of their names."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


# ---- numbers


def loss(record: Record, name: str = "report") -> float:
    """Nats per token of a set."""
    return fmean(record["nll"][name])


def difference(record: Record, base: Record, name: str = "report") -> Estimate:
    """Of the losses on a set, nats per token, paired by window."""
    pairs = zip(record["nll"][name], base["nll"][name], strict=True)
    return mean([own - other for own, other in pairs])


def mean(values: Sequence[float]) -> Estimate:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Estimate(fmean(values), error)


def percent(nats: Estimate) -> Estimate:
    """A difference of losses as one of perplexities."""
    ratio = math.exp(nats.mean)
    return Estimate(100 * (ratio - 1), None if nats.error is None else 100 * ratio * nats.error)


def chosen(records: Sequence[Record], **of: Any) -> Record | None:
    """Of the records with these values the one whose rate is the best on the text to choose by."""
    found = [one for one in records if all(one[key] == value for key, value in of.items())]
    return min(found, key=lambda one: loss(one, "choose"), default=None)


def serial(record: Record) -> float:
    """The share of backprop's serial FLOPs."""
    flops: dict[str, float] = record["flops"]
    return flops["serial"] / flops["backprop_serial"]


def crosses(record: Record) -> bool:
    """Whether a gradient crosses a border, where the model is cut."""
    return len(record["chunks"]) == 1 or any(one["gradient_bytes"] > 0 for one in record["ranks"])


def activations(record: Record, ranks: int, micro_batches: int = 1) -> float | None:
    """MiB of the process that has most, on so many pipeline ranks."""
    for one in record["ranks"]:
        if one["ranks"] == ranks and one["activations"] is not None:
            return max(one["activations"][str(micro_batches)]) / MIB
    return None


# ---- tables


class Groups:
    """Records of training, by what is compared."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.before = {one["corpus"]: one for one in records if one["recipe"] == BEFORE}
        self.trained = [one for one in records if one["recipe"] != BEFORE]
        of_first = [one for one in self.trained if one["corpus"] == NOVEL]
        self.updates = sorted({one["updates"] for one in of_first})

    def at(self, updates: int) -> tuple[Record | None, list[Record]]:
        """On the first corpus: backprop, and every recipe at its own best rate, in the order of the loss."""
        of = {"corpus": NOVEL, "updates": updates, "seed": 0}
        names = sorted({one["recipe"] for one in self.trained if all(one[key] == value for key, value in of.items())})
        found = [chosen(self.trained, recipe=name, **of) for name in names]
        return chosen(self.trained, recipe=BACKPROP, **of), sorted([one for one in found if one], key=loss)


def tables(records: Sequence[Record]) -> list[ResultTable]:
    groups = Groups(records)
    return [_aims(groups), _recipes(groups), _costs(groups), _rates(groups), _seeds(groups)]


def _perplexity(record: Record, name: str) -> str:
    return f"{math.exp(loss(record, name)):.2f}"


def _percent(record: Record, base: Record | None, name: str) -> str | None:
    return None if base is None else percent(difference(record, base, name)).text(2, "+")


def _recipes(groups: Groups) -> ResultTable:
    rows: list[tuple[Any, ...]] = []
    for updates in groups.updates:
        base, found = groups.at(updates)
        for one in found:
            row: tuple[Any, ...] = (one["recipe"], f"{one['tokens']:,}", f"{one['rate']:g}", _perplexity(one, "report"))
            row += (_percent(one, base, "report"), _perplexity(one, "old"), _percent(one, base, "old"))
            rows.append((*row, f"{serial(one):.2f}", "yes" if crosses(one) else "no"))
    if NOVEL in groups.before:
        one = groups.before[NOVEL]
        rows.append(
            ("before training", 0, None, _perplexity(one, "report"), None, _perplexity(one, "old"), *3 * [None])
        )
    columns: tuple[str, ...] = ("recipe", "tokens", "rate", "new text", "to backprop, %", "old text", "to backprop, %")
    columns += ("serial FLOPs", "gradient across a border")
    return ResultTable("recipes", f"Perplexity of the whole model, {NOVEL}", columns, tuple(rows))


def _costs(groups: Groups) -> ResultTable:
    rows: list[tuple[Any, ...]] = []
    base, found = groups.at(groups.updates[0]) if groups.updates else (None, [])
    for one in found:
        for on in one["ranks"]:
            row: tuple[Any, ...] = (one["recipe"], on["ranks"], "+".join(map(str, one["chunks"])))
            row += (f"{one['flops']['total'] / one['flops']['backprop_total']:.2f}", f"{serial(one):.2f}")
            row += (_activations(one, on["ranks"]), None if base is None else _activations(base, on["ranks"]))
            row += (f"{one['trained_weights'] / 1e6:.1f}", f"{one['optimizer_bytes'] / MIB:,.0f}")
            row += tuple(f"{on[key] / MIB:.2f}" for key in ("up_bytes", "gradient_bytes", "target_bytes"))
            rows.append(row)
    columns: tuple[str, ...] = (
        "recipe",
        "pipeline ranks",
        "chunks",
        "total FLOPs",
        "serial FLOPs",
        "activations, MiB",
        "of backprop",
    )
    columns += ("weights that train, M", "optimizer, MiB", "up, MiB", "gradients down, MiB", "targets down, MiB")
    return ResultTable(
        "costs", "FLOPs over those of backprop, heads counted; an update of one window", columns, tuple(rows)
    )


def _activations(record: Record, ranks: int) -> str | None:
    sizes = [activations(record, ranks, many) for many in (1, PIPELINED)]
    return " / ".join(f"{size:,.0f}" for size in sizes if size is not None) or None


def _rates(groups: Groups) -> ResultTable:
    rows: list[tuple[Any, ...]] = []
    for updates in groups.updates:
        of_updates = [o for o in groups.trained if (o["corpus"], o["updates"], o["seed"]) == (NOVEL, updates, 0)]
        for recipe in sorted({one["recipe"] for one in of_updates}):
            of_recipe = sorted((one for one in of_updates if one["recipe"] == recipe), key=lambda one: one["rate"])
            for one in of_recipe if len(of_recipe) > 1 else []:
                best = "yes" if one is chosen(of_recipe) else "no"
                numbers = [_perplexity(one, name) for name in SETS]
                rows.append((recipe, f"{one['tokens']:,}", f"{one['rate']:g}", *numbers, best))
    columns = ("recipe", "tokens", "rate", "to choose by", "new text", "old text", "chosen")
    return ResultTable("rates", f"Perplexity by learning rate, {NOVEL}", columns, tuple(rows))


def _seeds(groups: Groups) -> ResultTable:
    rows: list[tuple[Any, ...]] = []
    for corpus in sorted({one["corpus"] for one in groups.trained} - {NOVEL}):
        of_corpus = [one for one in groups.trained if one["corpus"] == corpus]
        for recipe, updates, rate in sorted({(one["recipe"], one["updates"], one["rate"]) for one in of_corpus}):
            found = [
                one for one in of_corpus if (one["recipe"], one["updates"], one["rate"]) == (recipe, updates, rate)
            ]
            row: tuple[Any, ...] = (corpus, recipe, f"{found[0]['tokens']:,}", f"{found[0]['rate']:g}", len(found))
            for name in ("report", "old"):
                losses, lost = [loss(one, name) for one in found], []
                for one in found:
                    base = chosen(of_corpus, recipe=BACKPROP, updates=one["updates"], seed=one["seed"])
                    lost += [] if base is None else [difference(one, base, name).mean]
                row += (f"{math.exp(fmean(losses)):.2f}", percent(mean(lost)).text(2, "+") if lost else None)
            rows.append(row)
        if corpus in groups.before:
            one = groups.before[corpus]
            before = (_perplexity(one, "report"), None, _perplexity(one, "old"), None)
            rows.append((corpus, "before training", 0, None, None, *before))
    columns = ("text", "recipe", "tokens", "rate", "seeds", "new text", "to backprop, %", "old text", "to backprop, %")
    return ResultTable("seeds", "Means over seeds, with their standard error", columns, tuple(rows))


def _aims(groups: Groups) -> ResultTable:
    """Of every number of tokens, for the recipe without a gradient across a border that is best on new text among those
    with no more serial FLOPs than the aim."""
    rows: list[tuple[Any, ...]] = []
    for updates in groups.updates:
        base, found = groups.at(updates)
        for chunks, most, share in AIMS:
            local = [o for o in found if not crosses(o) and len(o["chunks"]) == chunks]
            within = [one for one in local if serial(one) <= share]
            if base is None or not local:
                continue
            one = min(within or local, key=lambda record: loss(record, "choose"))
            start = (f"{one['tokens']:,}", chunks)
            new, old = (percent(difference(one, base, name)) for name in ("report", "old"))
            flops = serial(one)
            told = f"{new.text(2, '+')} % at {flops:.2f}"
            hit = new.mean <= most and flops <= share
            rows.append(
                (*start, f"new text within {most:g} % at {share:g} serial FLOPs", one["recipe"], told, _word(hit))
            )
            rows.append((*start, "old text better", one["recipe"], f"{old.text(2, '+')} %", _word(old.mean < 0)))
            own, beside = activations(one, chunks), activations(base, chunks)
            if own is not None and beside is not None:
                told = f"{own:,.0f} MiB, {beside:,.0f} of backprop"
                rows.append((*start, "less activation memory", one["recipe"], told, _word(own < beside)))
            extra = (one["optimizer_bytes"] - base["optimizer_bytes"]) / MIB
            rows.append((*start, "optimizer's extra bytes said", one["recipe"], f"{extra:+,.0f} MiB", "said"))
    columns = ("tokens", "chunks", "aim", "recipe", "measured", "")
    return ResultTable("aims", f"Aims beside backprop at equal tokens, {NOVEL}", columns, tuple(rows))


def _word(hit: bool) -> str:
    return "hit" if hit else "missed"


# ---- the picture


def draw(records: Sequence[Record], path: Path) -> Path:
    """Perplexity of new text over serial FLOPs, with the front of what hands no gradient across a border."""
    groups = Groups(records)
    base, found = groups.at(groups.updates[0]) if groups.updates else (None, [])
    most = 1.15 * math.exp(loss(base)) if base else math.inf
    shown = [one for one in found if math.exp(loss(one)) <= most]
    figure, (axes,) = new_figure(1, 1, (8.5, 5.2))
    points = []
    for one in shown:
        perplexity = math.exp(loss(one))
        error = None if base is None or one is base else perplexity * (difference(one, base).error or 0.0)
        colour = COLOURS[0] if one is base else COLOURS[2] if crosses(one) else COLOURS[1]
        whiskers: dict[str, Any] = {"elinewidth": 0.8, "capsize": 2, "ecolor": "0.7"}
        axes.errorbar(serial(one), perplexity, yerr=error, fmt="o", color=colour, markersize=5, **whiskers)
        points.append((serial(one), Estimate(perplexity, error), one["recipe"]))
    front = _front([(serial(one), math.exp(loss(one))) for one in shown if not crosses(one) and one is not base])
    if front:
        axes.step(*zip(*front, strict=True), where="post", color=COLOURS[1], linewidth=0.8, alpha=0.5)
    if base is not None:
        axes.axhline(math.exp(loss(base)), color="0.75", linewidth=0.8, zorder=1)
    above = [f"{one['recipe']} ({math.exp(loss(one)):.1f})" for one in found if one not in shown]
    if above:
        axes.set_title(f"above the axis: {', '.join(above)}", loc="left", fontsize=8, color="0.3")
    axes.margins(0.15, 0.1)
    axes.set_xlabel("serial FLOPs over those of backprop (blue: no gradient across a border, orange: some)")
    axes.set_ylabel(f"perplexity of new text, {NOVEL} (± of the difference to backprop)")
    figure.draw_without_rendering()
    label_points(axes, points)
    return save(figure, path)


def _front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point is below and left of, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def write(folder: Path) -> None:
    """The tables of FOLDER/finetune.md and the picture beside the records in FOLDER/finetune."""
    records = read(folder / "finetune")
    markdown_tables.update(folder / "finetune.md", tables(records))
    draw(records, folder / "finetune" / "front")
