"""The tables of a comparison, from records alone: quality, exits, cost, what loss costs, and all runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from lptransformer.study import comparison
from lptransformer.study.comparison import (
    Choice,
    Estimate,
    choices,
    deciding_set,
    depth_gain_kept,
    difference,
    find,
)
from lptransformer.study.markdown_tables import ResultTable
from lptransformer.study.records import Record, exit_blocks, final_loss, in_all_units

COSTS = {
    "total_flops": "total FLOPs",
    "serial_flops": "serial FLOPs",
    "pipeline_flops": "FLOPs of one of 8 pipeline ranks",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Question:
    """What a comparison is to show: the method that others are compared with (None: no differences), backprop with all
    blocks and with few (None: no share of the depth gain), and the set that decides (None: as the sweep says)."""

    baseline: str | None = None
    deep: str | None = None
    shallow: str | None = None
    choose: str | None = None


def tables(records: Sequence[Record], question: Question) -> list[ResultTable]:
    """All tables. Raises RunError where the question names what no run has."""
    chosen = choices(records, question.choose)
    sets = list(dict.fromkeys(name for record in records for name in record["evaluations"]))
    found = []
    for name in sets:
        found += [_quality(chosen, name, question), _exits(chosen, name), *_costs(records, name, question)]
    return [*found, _cost(chosen), _runs(records, sets)]


def _quality(chosen: Sequence[Choice], name: str, question: Question) -> ResultTable:
    base = find(chosen, question.baseline, "--baseline") if question.baseline else None
    deep = find(chosen, question.deep, "--deep") if question.deep else None
    shallow = find(chosen, question.shallow, "--shallow") if question.shallow else None
    columns = ["method", "learning rate", "seeds", "tokens", "nats/token", "perplexity", "bits/byte", "word perplexity"]
    columns += [f"perplexity to {base.method}"] if base else []
    columns += ["depth gain kept"] if deep and shallow else []
    rows = []
    for choice in chosen:
        loss, run = choice.estimate(name), next(iter(choice.runs.values()))
        if not math.isfinite(loss.mean):
            rows.append((choice.method, choice.setting, str(len(choice.runs)), *["-"] * (len(columns) - 3)))
            continue
        units = in_all_units(run, name, loss.mean)
        row = [choice.method, choice.setting, str(len(choice.runs)), short(_tokens(run, name)), loss.text(4)]
        row += [f"{units.perplexity:.3f}", f"{units.bits_per_byte:.4f}", f"{units.word_perplexity:.1f}"]
        row += [_percent(difference(choice, base, name)) if choice is not base else "0"] if base else []
        row += [share(depth_gain_kept(choice, deep, shallow, name))] if deep and shallow else []
        rows.append(tuple(row))
    return ResultTable(f"quality-{name}", f"{name}: the last exit at the end of training", tuple(columns), tuple(rows))


def _percent(of: Estimate) -> str:
    """A difference of losses as one of perplexities."""
    growth = math.exp(of.mean) if math.isfinite(of.mean) else math.nan
    text = Estimate(100 * (growth - 1), None if of.error is None else 100 * growth * of.error).text(2, "+")
    return text if text == "-" else f"{text} %"


def share(of: Estimate) -> str:
    """A share with its error, in percent."""
    text = Estimate(100 * of.mean, None if of.error is None else 100 * of.error).text(0)
    return text if text == "-" else f"{text} %"


def _tokens(run: Record, name: str) -> int:
    return run["evaluations"][name]["rows"][-1][1]


def _exits(chosen: Sequence[Choice], name: str) -> ResultTable:
    """A column for every block with a head; every cell is a mean over seeds."""
    none: dict[str, list[int]] = {"columns": []}
    of_method = {choice.method: next(iter(choice.runs.values()))["evaluations"] for choice in chosen}
    blocks = {method: exit_blocks(sets.get(name, none)) for method, sets in of_method.items()}
    heads = sorted({block for of in blocks.values() for block in of})
    rows = [
        (
            choice.method,
            *(choice.estimate(name, block).text() if block in blocks[choice.method] else "" for block in heads),
        )
        for choice in chosen
    ]
    title = f"{name}: nats per token of every exit, by the block before its head"
    return ResultTable(f"exits-{name}", title, ("method", *(f"after block {block}" for block in heads)), tuple(rows))


def points(
    records: Sequence[Record], name: str, cost: str, decides: str | None = None
) -> dict[str, list[comparison.Point]]:
    """Every evaluation of every run by method: its cost, its loss on the set that `decides`, and its loss on `name`."""
    found: dict[str, list[comparison.Point]] = {}
    for record in records:
        of_method = found.setdefault(record["method"], [])
        table = record["evaluations"].get(name)
        if table is None:
            continue
        column = table["columns"].index(cost)
        for row in table["rows"]:
            loss = row[-1] if decides in (None, name) else final_loss(record, decides, update=row[0])
            of_method.append(comparison.Point(row[column], loss, row[-1]))
    return found


def _costs(records: Sequence[Record], name: str, question: Question) -> list[ResultTable]:
    """At equal cost, and to equal loss. Which run is taken is decided on the set that decides."""
    decides, _ = deciding_set(records, question.choose)
    all_points = {cost: points(records, name, cost, decides) for cost in COSTS}
    fronts = {cost: {method: comparison.front(of) for method, of in all_points[cost].items()} for cost in COSTS}
    methods = [method for method in fronts["seconds"] if all(fronts[cost][method] for cost in COSTS)]
    if not methods:
        return []
    most = {
        cost: {method: max(p.cost for p in of[method] if math.isfinite(p.cost)) for method in methods}
        for cost, of in all_points.items()
    }
    # What the baseline has spent, or else what every method has; and the best loss that every method has reached.
    base = question.baseline if question.baseline in methods else None
    budgets = {cost: most[cost][base] if base else min(most[cost].values()) for cost in COSTS}
    goal = max(fronts["seconds"][method][-1].loss for method in methods)
    at_cost, to_loss = [], []
    for method in methods:
        cells = []
        for cost in COSTS:
            best = comparison.within(fronts[cost][method], budgets[cost])
            mark = "" if most[cost][method] >= 0.99 * budgets[cost] else " (less spent)"
            cells.append(f"{best.reported:.4f} ({math.exp(min(best.reported, 700)):.2f}){mark}" if best else "-")
        at_cost.append((method, *cells))
        reached = [comparison.reaching(fronts[cost][method], goal) for cost in COSTS]
        to_loss.append((method, *(short(point.cost) if point else "-" for point in reached)))
    heads = tuple(f"{short(budgets[cost])} {what}" for cost, what in COSTS.items())
    chosen_on = "" if decides == name else f", the run chosen on {decides}"
    equal_cost = f"{name}: nats per token (perplexity) within the same cost{chosen_on}"
    equal_loss = f"the least cost of {goal:.4f} nats per token on {decides}"
    found = [ResultTable(f"equal-cost-{name}", equal_cost, ("method", *heads), tuple(at_cost))]
    if decides == name:
        found.append(ResultTable(f"equal-loss-{name}", equal_loss, ("method", *COSTS.values()), tuple(to_loss)))
    return found


def _cost(chosen: Sequence[Choice]) -> ResultTable:
    columns = ("method", "tokens/s", "peak memory", "idle", "total FLOPs", "serial FLOPs", "sent up", "sent down")
    rows = []
    for choice in chosen:
        runs = list(choice.runs.values())
        furthest = max(runs, key=lambda run: run["updates"])
        table = next((table for table in furthest["evaluations"].values() if table["rows"]), None)
        spent = [short(cost) for cost in table["rows"][-1][3:5]] if table else ["-", "-"]
        stages = [stage for run in runs for stage in run["stages"]]
        idle = [stage["idle_share"] for stage in stages if math.isfinite(stage["idle_share"])]  # where it was measured
        sent = [sum(stage[key] for stage in stages) / len(runs) for key in ("hidden_states_bytes", "gradients_bytes")]
        rows.append(
            (
                choice.method,
                f"{fmean(run['tokens_per_second'] for run in runs):,.0f}",
                f"{max(stage['memory_bytes'] for stage in stages) / 2**20:,.0f} MiB",
                f"{max(idle):.0%}" if idle else "-",
                *spent,
                *(f"{number / 2**20:,.1f} MiB" for number in sent),
            )
        )
    title = "cost of the same runs: memory of the largest process, bytes per update over all borders between stages"
    return ResultTable("cost", title, columns, tuple(rows))


def _runs(records: Sequence[Record], sets: Sequence[str]) -> ResultTable:
    columns = ("run", "method", "updates", *(f"nats/token on {name}" for name in sets), "seconds")
    rows = [
        (
            record["name"],
            record["method"],
            f"{record['updates']} of {record['steps']}",
            *(Estimate(final_loss(record, name)).text(4) for name in sets),
            f"{record['seconds']:,.0f}",
        )
        for record in records
    ]
    return ResultTable("runs", "all runs, the last exit", columns, tuple(rows))


def short(value: float) -> str:
    """A large number in three digits and a unit: 12.3M; "-" for what is not finite."""
    if not math.isfinite(value):
        return "-"
    for limit, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
