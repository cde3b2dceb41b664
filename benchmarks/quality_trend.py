"""Does the gap to backprop grow with the tokens and with the size? And what lies between the other methods?

From the records of several sweeps.

    python benchmarks/quality_trend.py docs/benchmarks/quality/quality-{750,seeds,3000,width-128}.json

Runs of the same width and the same number of updates are compared. Rewrites the tables `trend/...` in
docs/benchmarks/quality.md and draws docs/benchmarks/quality/trend.png.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from lptransformer.figures import label_ends, new_figure, save
from lptransformer.study import collect, markdown_tables
from lptransformer.study.comparison import Choice, Estimate, choices, depth_gain_kept, difference, find
from lptransformer.study.markdown_tables import ResultTable
from lptransformer.study.plots import looks
from lptransformer.study.records import Record, final_loss
from lptransformer.study.result_tables import share

ROOT = Path(__file__).parents[1]
DOCUMENT, PICTURE = ROOT / "docs/benchmarks/quality.md", ROOT / "docs/benchmarks/quality/trend"
DEEP, SHALLOW = "backprop", "backprop-2-blocks"
BESIDE = ("chunked-4", "deep-supervision-4")  # what else methods are compared with
Regime = tuple[int, int]  # width, updates


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("records", nargs="+", type=Path, help="files of records, or folders of sweeps")
    parser.add_argument("--set", default="report", help="the validation set (default: report)")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    parser.add_argument("--picture", type=Path, default=PICTURE, help="without suffix")
    flags = parser.parse_args()
    found = regimes([record for path in flags.records for record in collect.collect(path)])
    markdown_tables.update(flags.document, tables(found, flags.set), "trend")
    print(draw(found, flags.set, flags.picture))


def regimes(records: Sequence[Record]) -> dict[Regime, list[Choice]]:
    """The methods of every width and number of updates that have backprop with all blocks, smallest first."""
    grouped: dict[Regime, list[Record]] = {}
    for record in records:
        if record["complete"]:
            grouped.setdefault((record["model"]["hidden_size"], record["steps"]), []).append(record)
    chosen = {regime: choices(runs) for regime, runs in sorted(grouped.items())}
    return {regime: methods for regime, methods in chosen.items() if DEEP in [one.method for one in methods]}


def gap(choice: Choice, methods: Sequence[Choice], name: str, baseline: str = DEEP) -> Estimate:
    """What a method loses to another on a set, in percent of that one's bits per byte; below zero where it gains."""
    other = find(methods, baseline, "the baseline")
    shared = [final_loss(run, name) for seed, run in other.runs.items() if seed in choice.runs]
    lost = difference(choice, other, name)
    scale = 100 * len(shared) / sum(shared) if shared else math.nan
    return Estimate(lost.mean * scale, None if lost.error is None else lost.error * scale)


def tokens(methods: Sequence[Choice]) -> int:
    """The tokens that backprop has been trained on."""
    run = next(iter(find(methods, DEEP, "the baseline").runs.values()))
    table = next(iter(run["evaluations"].values()))
    return int(table["rows"][-1][table["columns"].index("tokens")])


def tables(found: dict[Regime, list[Choice]], name: str) -> list[ResultTable]:
    """The gaps of every method, to backprop and to others, and the share of the depth gain that it keeps.

    A row per width and tokens.
    """
    others = list(dict.fromkeys(one.method for methods in found.values() for one in methods if one.method != DEEP))
    gaps, beside, kept = [], [], []
    for (width, _), methods in found.items():
        by_name = {one.method: one for one in methods}
        deep, shallow = by_name[DEEP], by_name.get(SHALLOW)
        start = (width, f"{tokens(methods) / 1e6:.2f}M", len(deep.runs))
        cells = [gap(by_name[one], methods, name).text(2, "+") if one in by_name else None for one in others]
        gaps.append((*start, deep.estimate(name).text(4), *cells))
        for other in BESIDE:
            if other in by_name:
                lost = [gap(by_name[one], methods, name, other) if one in by_name else None for one in others]
                beside.append((other, *start[:2], *(None if one is None else one.text(2, "+") for one in lost)))
        if shallow:
            shares = [depth_gain_kept(by_name[o], deep, shallow, name) if o in by_name else None for o in others]
            kept.append((*start, *(None if one is None else share(one) for one in shares)))
    columns = ("width", "tokens", "seeds")
    return [
        ResultTable(
            "gap",
            f"{name}: bits per byte lost to backprop, percent",
            (*columns, f"{DEEP}, nats/token", *others),
            tuple(gaps),
        ),
        ResultTable(
            "beside", f"{name}: bits per byte lost to others, percent", ("to", *columns[:2], *others), tuple(beside)
        ),
        ResultTable("kept", f"{name}: depth gain kept", (*columns, *others), tuple(kept)),
    ]


def draw(found: dict[Regime, list[Choice]], name: str, path: Path) -> Path:
    """Gaps to backprop in two panels, over the tokens at the smallest width and over the width at equal updates.

    A line per method, its name at the end, standard errors over seeds. What is there once only is no trend: left out.
    """
    figure, axes = new_figure(1, 2, (10, 4.4), sharey=True)
    methods = [m for m in dict.fromkeys(one.method for all_ in found.values() for one in all_) if m != DEEP]
    look = looks([DEEP, *methods])
    width = min(width for width, _ in found)
    updates = [updates for w, updates in found if w != width] or [max(updates for _, updates in found)]
    panels = (
        {tokens(all_) / 1e6: all_ for (w, _), all_ in found.items() if w == width},
        {float(w): all_ for (w, u), all_ in found.items() if u == updates[0]},
    )
    ends: list[list[tuple[float, float, str, str]]] = [[], []]
    for place, panel, named in zip(axes, panels, ends, strict=True):
        for method in methods:
            gaps = [(x, gap(one, all_, name)) for x, all_ in panel.items() for one in all_ if one.method == method]
            if len(gaps) < 2:
                continue
            colour = look[method]["color"]
            x, y, errors = zip(*((x, one.mean, one.error or 0.0) for x, one in gaps), strict=True)
            place.errorbar(x, y, errors, color=colour, marker="o", markersize=4, capsize=3)
            named.append((x[-1], y[-1], method, colour))
        place.axhline(0, color="black", linewidth=0.8)
        place.set_xscale("log")
        place.set_xticks(sorted(panel))
        place.minorticks_off()
        place.tick_params(labelleft=True)
    axes[0].xaxis.set_major_formatter("{x:.2g}")
    axes[1].xaxis.set_major_formatter("{x:g}")
    axes[0].set_xlabel(f"training tokens (millions), width {width}")
    axes[1].set_xlabel(f"width, {tokens(next(iter(panels[1].values()))) / 1e6:.2g} million tokens")
    axes[0].set_ylabel(f"bits per byte lost to backprop on {name} (%)")
    figure.draw_without_rendering()  # the layout decides how high a line of text is
    for place, named in zip(axes, ends, strict=True):
        label_ends(place, [*named, (min(place.get_xlim()[1], max(place.get_xticks())), 0.0, DEEP, "black")])
    return save(figure, path)


if __name__ == "__main__":
    main()
