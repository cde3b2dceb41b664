"""Where local updates pay: throughput against ranks, micro-batches, link and vocabulary, predicted. No torch, minutes.

    python benchmarks/map.py --out docs/benchmarks/plan

A model of 32 blocks of width 2048 (1.6 billion weights in its blocks) on A100s, one per node: a pipeline over all of
them, or replicas on all of them. A micro-batch is 8 windows of 2048 tokens; every method may cut it into smaller ones
and has its best size. Memory is not looked at. What varies stands below each panel, what does not in its title.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from side_by_side import rivals

from lptransformer.figures import new_figure, save
from lptransformer.methods import objectives
from lptransformer.methods.cost import model_costs
from lptransformer.methods.heads import HeadOptions
from lptransformer.methods.stages import cut
from lptransformer.planning.candidates import Candidate, balanced_sizes, of_backprop
from lptransformer.planning.devices import Cluster, load_devices
from lptransformer.planning.rank_memory import ActivationBytes
from lptransformer.planning.stage_state import precision
from lptransformer.planning.step_time import Work, border_seconds
from lptransformer.study.plots import COLOURS

WIDTH, BLOCKS, LENGTH, ROWS = 2048, 32, 2048, 8
BASE = {"ranks": 8, "micro_batches": 8, "link": "100gbit", "vocabulary": 32768}
AXES: dict[str, list[int] | list[str]] = {
    "ranks": [2, 4, 8, 16, 32],
    "micro_batches": [1, 2, 4, 8, 16, 32, 64],
    "link": ["100mbit", "1gbit", "10gbit", "25gbit", "100gbit", "400gbit"],
    "vocabulary": [256, 4096, 32768, 131072, 262144],
}
LABELS = {
    "ranks": "GPUs, one per node",
    "micro_batches": "micro-batches of 8 windows per update",
    "link": "link between nodes",
    "vocabulary": "vocabulary",
}
MAP_LINKS = ("1gbit", "25gbit", "100gbit")
LOCAL = ("chunked, full heads", "chunked, heads on 1/4 of the tokens")
EXACT = ("1F1B", "interleaved", "zero bubble", "data parallel")


def work(micro_batches: int, vocabulary: int, token_fraction: float) -> Work:
    """An update of `micro_batches` micro-batches of `ROWS` windows, in bf16."""
    block = 50_331_648  # 12 x 2048 x 2048: a plain or a gated MLP alike
    costs = model_costs(
        block,
        WIDTH,
        vocabulary,
        LENGTH,
        HeadOptions(token_fraction=token_fraction),
        embedding_parameters=vocabulary * WIDTH,
        norm_parameters=WIDTH,
    )
    kept = ActivationBytes(34.0 * ROWS * LENGTH * WIDTH, 0.0, 2.0 * ROWS * LENGTH * WIDTH, 0.0, 2)
    states = precision("bf16")
    return Work(
        costs,
        BLOCKS,
        WIDTH,
        vocabulary,
        LENGTH,
        ROWS,
        micro_batches,
        "bf16",
        kept,
        0.0,
        2.0 * WIDTH,
        1024,
        states,
        30.0,
    )


# Others' pipelines: (of which the fastest counts, chunks of blocks on each rank, schedule of ranks and micro-batches).
RIVALS: tuple[tuple[str, int, Callable[[int, int], rivals.Schedule]], ...] = (
    ("1F1B", 1, rivals.one_f_one_b),
    ("interleaved", 2, lambda p, m: rivals.interleaved(p, m, 2)),
    ("interleaved", 4, lambda p, m: rivals.interleaved(p, m, 4)),
    ("zero bubble", 1, rivals.zero_bubble_h1),
    ("zero bubble", 2, rivals.zero_bubble_v),
)


def of_rival(work: Work, cluster: Cluster, chunks: int, make: Callable[[int, int], rivals.Schedule]) -> float:
    """Tokens per second of a schedule of others on one rank per device; the heaviest rank's optimizer comes after."""
    ranks, costs, tokens = cluster.size, work.costs, work.micro_batch_tokens
    sizes = balanced_sizes(BLOCKS, ranks * chunks, costs.block_flops, costs.head_flops)
    block = cluster.device.compute_seconds(tokens * costs.block_flops, work.dtype)
    head = cluster.device.compute_seconds(tokens * costs.head_flops, work.dtype)
    heads = [0.0] * (len(sizes) - 1) + [head]
    seconds = [rivals.ChunkSeconds(*(3 * (n * block + last,))) for n, last in zip(sizes, heads, strict=True)]
    links = border_seconds(cluster, 1, [work.activations.rows] * (ranks - 1))
    times = rivals.replay_many(lambda m: make(ranks, m), work.micro_batches, ranks, seconds, links)
    weights = []
    for tasks in make(ranks, ranks):
        own = {chunk for _, chunk, _ in tasks}
        ends = (0 in own) * costs.embedding_parameters + (len(sizes) - 1 in own) * costs.head_parameters
        weights.append(sum(sizes[chunk] for chunk in own) * costs.block_parameters + ends)
    return work.tokens / (times.seconds + cluster.device.update_seconds(max(weights), work.update_bytes))


def speeds(ranks: int, micro_batches: int, link: str, vocabulary: int) -> dict[str, float]:
    """Tokens per second of every method that can be."""
    cluster = Cluster(load_devices().device("a100"), ranks, 1, load_devices().link(link))
    found: dict[str, float] = {}

    def add(name: str, tokens_per_second: float) -> None:
        found[name] = max(found.get(name, 0.0), tokens_per_second)

    for rows in (8, 4, 2, 1):
        for name, fraction in zip(LOCAL, (1.0, 0.25), strict=True):
            one = work(micro_batches, vocabulary, fraction).cut_smaller(rows)
            costs = one.costs
            heads = (costs.head_training_flops(True), costs.head_training_flops(False))
            sizes = balanced_sizes(BLOCKS, ranks, 3 * costs.block_flops, *heads)
            objective = objectives.build(BLOCKS, "chunked", chunks=sizes)
            local = Candidate("chunked", objective, cut(objective, ranks, costs, sizes), one, cluster, 1, zero_stage=1)
            add(name, local.evaluate().tokens_per_second)
        one = work(micro_batches, vocabulary, 1.0).cut_smaller(rows)
        for name, chunks, make in RIVALS:
            whole_groups = name != "interleaved" or one.micro_batches % ranks == 0
            if whole_groups and ranks * chunks <= BLOCKS:
                add(name, of_rival(one, cluster, chunks, make))
        if one.micro_batches % ranks == 0:
            add("data parallel", of_backprop(one, cluster, 1, ranks, 1, 0.0).evaluate().tokens_per_second)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/plan"), metavar="DIR")
    parser.add_argument("--again", action="store_true", help="draw the points that DIR/map.json has, reckon the others")
    flags = parser.parse_args()
    out: Path = flags.out
    out.mkdir(parents=True, exist_ok=True)
    cache: dict[str, dict[str, float]] = json.loads((out / "map.json").read_text()) if flags.again else {}

    def at(**point: int | str) -> dict[str, float]:
        key = " ".join(f"{name}={value}" for name, value in point.items())
        if key not in cache:
            cache[key] = speeds(**point)  # type: ignore[arg-type]
        return cache[key]

    lines(at, out)
    maps(at, out)
    rounded = {key: {name: float(f"{value:.5g}") for name, value in found.items()} for key, found in cache.items()}
    (out / "map.json").write_text(json.dumps(rounded, indent=1) + "\n")
    print(f"{len(cache)} points: {out / 'lines.png'} {out / 'map.png'} {out / 'map.json'}")


def lines(at: Callable[..., dict[str, float]], out: Path) -> None:
    """Speed over that of 1F1B, one panel for each axis."""
    figure, axes = new_figure(2, 2, (9, 6.8), sharey=True)
    methods = (*LOCAL, "zero bubble", "interleaved", "data parallel")
    for place, (axis, values) in zip(axes, AXES.items(), strict=True):
        points = [at(**{**BASE, axis: value}) for value in values]
        for i, (colour, name) in enumerate(zip(COLOURS[1:], methods, strict=False)):
            found = [(x, point[name] / point["1F1B"]) for x, point in enumerate(points) if name in point]
            width = 4.5 - 1.5 * i if i < 2 else 1.2  # lines that lie over each other stay visible
            place.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=width, color=colour, label=name)
        place.axhline(1.0, color=COLOURS[0], linewidth=1, label="1F1B")
        place.set_xticks(range(len(values)), [f"{value:,}" if isinstance(value, int) else value for value in values])
        place.set_xlabel(LABELS[axis])
        place.tick_params(labelleft=True)
        place.set_yscale("log")
        place.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
        place.set_ylim(0.15, 3)
        place.minorticks_off()
        rest = {name: value for name, value in BASE.items() if name != axis}
        title = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in rest.items())
        place.set_title(title, loc="left", fontsize=9)
    figure.supylabel("tokens/s over those of 1F1B", fontsize=9)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
    save(figure, out / "lines")


def maps(at: Callable[..., dict[str, float]], out: Path) -> None:
    """The best local speed over the best exact one: ranks x micro-batches, a panel for each link."""
    from matplotlib.colors import LogNorm

    ranks, micro_batches = AXES["ranks"], AXES["micro_batches"]
    figure, axes = new_figure(1, len(MAP_LINKS), (3.2 * len(MAP_LINKS), 3.4))
    for place, link in zip(axes, MAP_LINKS, strict=True):
        rows = []
        for m in micro_batches:
            points = [at(**{**BASE, "ranks": p, "micro_batches": m, "link": link}) for p in ranks]
            best = [[max(point.get(name, 0.0) for name in names) for names in (LOCAL, EXACT)] for point in points]
            rows.append([local / exact for local, exact in best])
        place.imshow(rows, origin="lower", aspect="auto", cmap="RdBu", norm=LogNorm(0.25, 4))
        for y, row in enumerate(rows):
            for x, ratio in enumerate(row):
                colour = "white" if ratio > 2.2 or ratio < 0.45 else "black"
                place.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color=colour)
        place.set_xticks(range(len(ranks)), [str(value) for value in ranks])
        place.set_yticks(range(len(micro_batches)), [str(value) for value in micro_batches])
        place.grid(False)
        place.set_title(f"{link}, vocabulary {BASE['vocabulary']}", loc="left", fontsize=9)
        place.set_xlabel(LABELS["ranks"])
    axes[0].set_ylabel(LABELS["micro_batches"])
    title = "best with local updates / best with backprop, tokens per second (blue: local updates ahead)"
    figure.suptitle(title, fontsize=9)
    save(figure, out / "map")


if __name__ == "__main__":
    main()
