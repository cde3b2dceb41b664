"""The report of a run's traced updates: where their time went, as a table, a timeline and a picture.

Beside what ran stands 1F1B of the same blocks, simulated from the measured times. The same slices give the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from lptransformer import files
from lptransformer.console import print_table
from lptransformer.evaluation import trained_model
from lptransformer.figures import new_figure, save
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.heads import blocks_like
from lptransformer.methods.objectives import Objective, backprop
from lptransformer.methods.stages import cut
from lptransformer.planning.simulate import StageSeconds, simulate
from lptransformer.run_folder import layout
from lptransformer.run_folder.trace import COPIES, HEAD, WAIT, Slice, Trace, chrome, rank_times, read_traces, slices
from lptransformer.study import collect

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIMELINE = "trace.json"
PICTURE_ACTIONS = 300  # the most that a picture shows of a process
# Okabe and Ito's colours, which most people can tell apart.
COLOURS = {
    "forward": "#0072B2",
    HEAD: "#56B4E9",
    "backward": "#009E73",
    "pull": "#E69F00",
    "update": "#D55E00",
    "message": "#555555",
    COPIES: "#CC79A7",
    WAIT: "#F0E442",
}
LABELS = {HEAD: "head and loss", "message": "send, receive", COPIES: "copies of weights"}
NUMBERED = ("forward", "backward", "pull")
HEIGHT = 0.8  # of a row


@dataclass(frozen=True)
class Panel:
    """A timeline and its title. Where a pipeline rank has no slices before its first or after its last, nothing is
    known about it."""

    title: str
    slices: Sequence[Slice]


def draw(panels: Sequence[Panel], stem: Path, svg: bool = False) -> Path:
    """STEM.png, with `svg` also STEM.svg: the panels below each other on one axis of time, first replicas only.

    Boxes have the number of their micro-batch where it fits. Every second update is lighter. Returns the PNG's path.
    """
    from matplotlib.patches import Patch

    shown = [[one for one in panel.slices if one.data_rank == 0] for panel in panels]
    ranks = max(one.pipeline_rank for one in shown[0]) + 1
    height = max(1.3, 0.45 + 0.32 * ranks)
    figure, axes = new_figure(len(panels), 1, (13, len(panels) * height + 1.1), sharex=True)
    end = max(one.end for drawn in shown for one in drawn)
    unit, scale = ("ms", 1e3) if end < 1 else ("s", 1.0)
    for place, panel, drawn in zip(axes, panels, shown, strict=True):
        _draw_panel(place, drawn, scale)
        place.set_title(panel.title, loc="left")
        place.set_xlim(0, end * scale)
        place.set_ylim(ranks - 0.5, -0.5)
        place.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
        place.tick_params(left=False, labelbottom=True)
        place.grid(False, axis="y")
    axes[-1].set_xlabel(f"time ({unit}); every second update is lighter, numbers are micro-batches")
    kinds = {_colour_of(one) for drawn in shown for one in drawn}
    handles = [Patch(color=c, label=LABELS.get(kind, kind)) for kind, c in COLOURS.items() if kind in kinds]
    if any(_unknown(slices) for slices in shown):
        handles.append(Patch(facecolor="white", edgecolor="0.75", hatch="////", label="not traced"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.draw_without_rendering()  # the layout decides how wide a second is
    for place, drawn in zip(axes, shown, strict=True):
        _number_boxes(place, drawn, scale, place.get_window_extent().width / figure.dpi / (end * scale))
    return save(figure, stem, svg)


def _colour_of(one: Slice) -> str:
    return "message" if one.kind in ("send", "receive") else one.kind


def _draw_panel(place: Axes, slices: Sequence[Slice], scale: float) -> None:
    light = {update: i % 2 == 1 for i, update in enumerate(sorted({one.update for one in slices}))}

    def group(one: Slice) -> tuple[int, str, bool]:
        return one.pipeline_rank, _colour_of(one), light[one.update] and one.kind != WAIT

    for (rank, kind, lighter), same in groupby(sorted(slices, key=group), key=group):
        spans = [(one.start * scale, one.seconds * scale) for one in same]
        colour = _lighter(COLOURS[kind]) if lighter else COLOURS[kind]
        place.broken_barh(spans, (rank - HEIGHT / 2, HEIGHT), facecolor=colour, edgecolor="white", linewidth=0.2)
    for rank, start, end in _unknown(slices):
        span = [(start * scale, (end - start) * scale)]
        place.broken_barh(span, (rank - HEIGHT / 2, HEIGHT), facecolor="white", edgecolor="0.75", hatch="////", lw=0)


def _unknown(slices: Sequence[Slice]) -> list[tuple[int, float, float]]:
    """(pipeline rank, start, end) of what lies before a rank's first slice and after its last."""
    end = max(one.end for one in slices)
    found = []
    for rank in sorted({one.pipeline_rank for one in slices}):
        own = [one for one in slices if one.pipeline_rank == rank]
        first, last = min(one.start for one in own), max(one.end for one in own)
        found += [(rank, a, b) for a, b in ((0.0, first), (last, end)) if b - a > 1e-3 * end]
    return found


def _number_boxes(place: Axes, slices: Sequence[Slice], scale: float, inches_per_unit: float) -> None:
    """Numbers of micro-batches; a forward action is one box, its head included."""
    for one in slices:
        if one.action is None or one.action.micro_batch is None or one.kind not in NUMBERED:
            continue
        text = str(one.action.micro_batch)
        if one.seconds * scale * inches_per_unit > 0.065 * len(text) + 0.03:
            middle = (one.start + one.end) / 2 * scale
            place.text(middle, one.pipeline_rank, text, ha="center", va="center_baseline", color="white", fontsize=7)


def _lighter(colour: str) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = (1 - 0.6 * (1 - part) for part in to_rgb(colour))
    return red, green, blue


@dataclass(frozen=True)
class Measured:
    """Medians of what a stage's actions took, in seconds, without waiting. Zero where it has no such action."""

    forward: float  # of the blocks
    head: float  # forward, loss, and the loss's gradient
    backward: float
    update: float


def medians(trace: Trace) -> dict[int, Measured]:
    """By stage, over all updates and replicas of the trace."""
    found: dict[tuple[int, str], list[float]] = {}
    for one in slices(trace):
        if one.action is not None:
            found.setdefault((one.action.stage, one.kind), []).append(one.seconds)
    stages = sorted({stage for report in trace.reports for stage, _, _ in report.stages})
    kinds = ("forward", HEAD, "backward", "update")
    return {stage: Measured(*(median(found.get((stage, kind), [0.0])) for kind in kinds)) for stage in stages}


def simulated_1f1b(
    trace: Trace, in_flight: int, extra_blocks: Callable[[int], float] = lambda last_block: 0.0
) -> list[Slice]:
    """The slices of as many updates as the trace has, waiting among them, from an empty pipeline.

    `in_flight` as in the run. The auxiliary head after a block runs `extra_blocks` blocks backward in its stage's
    backward action (a frozen one, which has no weight gradient, counts half); they are taken off by their number. A
    stage that the run does not train gets the backward and update of the others, by the seconds of its forward pass.
    """
    blocks = {stage: (first, last) for report in trace.reports for stage, first, last in report.stages}
    rank_of = {stage: report.pipeline_rank for report in trace.reports for stage, _, _ in report.stages}
    seconds = _of_blocks(medians(trace), blocks, extra_blocks)
    ranks = sorted(set(rank_of.values()))
    own = [[stage for stage in sorted(blocks) if rank_of[stage] == rank] for rank in ranks]
    depth = max(last for _, last in blocks.values()) + 1
    whole = Objective(depth, backprop(depth))
    sizes = [sum(blocks[stage][1] - blocks[stage][0] + 1 for stage in stages) for stages in own]
    plans = cut(whole, len(ranks), ModelCosts(1.0, 0.0, 0.0), sizes)  # the cuts are given, nothing is weighed
    of_rank = [_sum([seconds[stage] for stage in stages]) for stages in own]
    timeline = simulate(
        whole,
        plans,
        [StageSeconds(one.forward + one.head, one.backward, update=one.update) for one in of_rank],
        micro_batches=trace.reports[0].micro_batches,
        updates=len(trace.updates),
        in_flight=in_flight,
    )
    found: list[Slice] = []
    clock = dict.fromkeys(ranks, 0.0)
    names = {"F": "forward", "B": "backward", "U": "update"}
    for event in timeline.events:
        place = (event.pipeline_rank, 0, trace.updates[event.update])
        kind, head = names[event.action.op], of_rank[event.pipeline_rank].head if event.action.op == "F" else 0.0
        parts = ((WAIT, clock[event.pipeline_rank], event.start), (kind, event.start, event.end - head))
        for part, start, end in (*parts, (HEAD, event.end - head, event.end)):
            if end > start:
                found.append(Slice(*place, part, start, end, event.action))
        clock[event.pipeline_rank] = event.end
    for rank, ended in clock.items():
        if ended < timeline.total_seconds:
            found.append(Slice(rank, 0, trace.updates[-1], WAIT, ended, timeline.total_seconds))
    return found


def _of_blocks(
    measured: Mapping[int, Measured], blocks: Mapping[int, tuple[int, int]], extra_blocks: Callable[[int], float]
) -> dict[int, Measured]:
    """The stages as they would be in backprop: no auxiliary heads, all of them trained."""
    found = {}
    last_stage = max(measured)
    for stage, one in measured.items():
        number = blocks[stage][1] - blocks[stage][0] + 1
        if stage == last_stage or one.head == 0.0:
            found[stage] = one
        else:
            share = number / (number + extra_blocks(blocks[stage][1]))
            found[stage] = Measured(one.forward, 0.0, one.backward * share, one.update)
    trained = [one for one in found.values() if one.backward > 0.0]
    whole = _sum(trained)
    for stage, one in found.items():
        if one.backward == 0.0 and trained:
            ratio = one.forward / whole.forward
            found[stage] = Measured(one.forward, one.head, whole.backward * ratio, whole.update * ratio)
    return found


def _sum(parts: Sequence[Measured]) -> Measured:
    names = ("forward", "head", "backward", "update")
    return Measured(*(sum(getattr(part, name) for part in parts) for name in names))


def idle_share(timeline: Sequence[Slice], pipeline_rank: int) -> float:
    """Waiting over all time on a pipeline rank of a simulated timeline."""
    own = [one for one in timeline if one.pipeline_rank == pipeline_rank]
    return sum(one.seconds for one in own if one.kind == WAIT) / sum(one.seconds for one in own)


def report_trace(run: Path, out: Path, svg: bool = False) -> None:
    """Print where the time of the traced updates went; write trace.json, trace.png (`svg`: and .svg) into `out`.

    The picture is of the newest start of the run that traced something, with 1F1B of the same blocks below it;
    trace.json has all. Raises RunError where the folder holds no run, or the run has no trace.
    """
    config = layout.read_config(run)
    objective, head = trained_model.blueprint_of(run).objective, config.head
    weight = 1.0 if head.trains_blocks else 0.5

    def extra_blocks(last_block: int) -> float:
        return weight * len(blocks_like(head, last_block, objective.num_blocks))

    traces = read_traces(run, config.parallel.pipeline, config.parallel.data)
    newest, method = traces[-1], collect.method_name(config)
    beside = simulated_1f1b(_picture(newest), config.parallel.in_flight, extra_blocks)
    columns = ("pipeline rank", "busy s", "of it head s", "waiting s", "other s", "idle share", "1F1B's idle share")
    rows = []
    for one in rank_times(newest):
        shares = f"{one.idle_share:.1%}", f"{idle_share(beside, one.pipeline_rank):.1%}"
        rows.append((one.pipeline_rank, one.busy, one.head, one.waiting, one.other, *shares))
    title = f"{method}, {_updates(newest)}, measured; beside it 1F1B of the same blocks, simulated"
    files.make_folder(out, "--out")
    print_table(title, columns, rows)
    files.write_text(out / TIMELINE, json.dumps(chrome(traces, str(run)), separators=(",", ":")) + "\n")
    picture = draw(_panels(_picture(newest), method, objective.is_backprop, beside), out / "trace", svg)
    also = " (and .svg)" if svg else ""
    print(f"timeline for ui.perfetto.dev or chrome://tracing: {out / TIMELINE}   picture{also}: {picture}")


def _picture(whole: Trace) -> Trace:
    """The updates of a trace that a picture has room for: the first ones, without a gap."""
    actions = max(len(report.actions) for report in whole.reports)
    room = max(1, PICTURE_ACTIONS // actions)
    following = [update for i, update in enumerate(whole.updates) if update == whole.updates[0] + i]
    return whole.only(following[:room])


def _panels(shown: Trace, method: str, is_backprop: bool, beside: Sequence[Slice]) -> list[Panel]:
    number = len(shown.updates)
    seconds = max(one.total for one in rank_times(shown)) / number
    on = "" if shown.device == "cpu" else f" on {shown.device}"
    what = "backprop by 1F1B" if is_backprop else method
    measured = f"Measured: {what}, {_updates(shown)}{on}: {_duration(seconds)} per update"
    seconds = max(one.end for one in beside) / number
    what = "the same run" if is_backprop else "backprop by 1F1B over the same blocks"
    simulated = f"Simulated: {what}, from the medians of the measured times, links that cost nothing"
    return [Panel(measured, slices(shown)), Panel(f"{simulated}: {_duration(seconds)} per update", beside)]


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.1f} ms"


def _updates(of: Trace) -> str:
    first, last = of.updates[0], of.updates[-1]
    return f"update {first}" if first == last else f"updates {first}-{last}"
