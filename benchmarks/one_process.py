"""What the engine costs: all stages in one process, against the plain loop that it equals bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/one_process.py       # writes docs/benchmarks/one_process.{json,md}
    OMP_NUM_THREADS=1 python benchmarks/one_process.py --pretrained FOLDER      # one_process_pretrained.json, and .md

The plain loop is the network of tests/reference.py, torch and transformers only: for every micro-batch and every run of
blocks forward, loss, backward; then clip every run, one AdamW for all. The engine does the same with a DeepSpeed engine
per stage. Both take the same tokens, the same chunks of logits, the same number of threads. The repetitions are
interleaved, and each ratio is of two updates that followed one another. Wall time and processor time of the process
(user and system) are reported: on a machine that does other work only the second one says anything, and little.

With `--pretrained` a real model (benchmarks/pretrained.py) is fine-tuned instead, and plain is what transformers' users
write: model(input_ids, labels).loss, backward, clip, AdamW. Here peak memory counts too, to the byte
(benchmarks/allocations.py): weights, gradients, optimizer and all that an update takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from allocations import log_allocations
from random_tokens import RandomTokens
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lptransformer.config.checks import micro_batch_size
from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.process_groups import join, leave
from lptransformer.models.blueprint import make_blueprint
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.study.markdown_tables import ResultTable, update
from lptransformer.training.build import build_engine

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import reference  # noqa: E402

FOLDER = ROOT / "docs" / "benchmarks"
VOCABULARY, LEARNING_RATE, CHUNK_TOKENS = 512, 1e-3, 1024
SIZES: dict[str, dict[str, Any]] = {
    "small": {"hidden_size": 128, "num_layers": 4, "rows": 8, "window": 128},
    "medium": {"hidden_size": 256, "num_layers": 8, "rows": 8, "window": 128},
}
MICRO_BATCHES = (1, 4)
METHODS = {"backprop": 1, "chunked 2": 2, "chunked 4": 4}
SHAPES = ("2x256", "4x512")  # rows and tokens of a micro-batch, one in an update
FINE_TUNED: dict[str, tuple[str, ...]] = {
    "backprop, tied": ("objective.name=backprop", "model.tie=keep"),
    "backprop": ("objective.name=backprop",),
    "chunked 2": (),
}
Update = Callable[[], object]


def loaded(size: dict[str, Any], chunks: int, micro_batches: int) -> Config:
    objective = {"name": "backprop"} if chunks == 1 else {"name": "chunked", "chunks": chunks}
    return load(
        {
            "model": {
                "family": "llama",
                "hidden_size": size["hidden_size"],
                "num_layers": size["num_layers"],
                "num_heads": 4,
            },
            "data": {"train": "unused", "sequence_length": size["window"]},
            "objective": objective,
            "loss": {"chunk_tokens": CHUNK_TOKENS},
            "optimizer": {"weight_decay": 0.1},
            "train": {
                "micro_batch_size": size["rows"],
                "micro_batches_per_update": micro_batches,
                "steps": 100_000,
                "lr_scheduler": "constant",
                "learning_rate": LEARNING_RATE,
            },
        }
    )


def plain_loop(config: Config, model_config: Any, stream: RandomTokens) -> Update:
    """The loop that one would write by hand; returns what makes one update."""
    blocks, chunks = config.model.num_layers, config.value("objective.chunks") or 1
    assert isinstance(chunks, int) and blocks % chunks == 0
    length = blocks // chunks
    spans = [(first, first + length - 1) for first in range(0, blocks, length)]
    net = reference.Net(model_config, spans).train()
    net.initialise(config.train.seed)
    runs = [
        [p for block in range(a, b + 1) for p in (*net.block_parameters(block), *net.head_parameters(block))]
        for a, b in spans
    ]
    every = [parameter for run in runs for parameter in run]
    groups = [
        {"params": [p for p in every if p.dim() >= 2], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.optimizer.beta1, config.optimizer.beta2)
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=betas, eps=config.optimizer.eps)
    train, done = config.train, 0
    tokens = train.micro_batches_per_update * micro_batch_size(config) * (config.data.sequence_length - 1)

    def one_update() -> list[float]:
        nonlocal done
        sums = [0.0] * len(spans)
        for index in range(done, done + train.micro_batches_per_update):
            batch = stream.batch(index)
            hidden: Tensor | None = None
            for number, span in enumerate(spans):
                given = net.embed(batch.input_ids) if hidden is None else hidden
                output = net.run_blocks(given, span)
                loss = net.loss(output, batch.labels, span[1], CHUNK_TOKENS)
                (loss / tokens).backward()
                sums[number] += loss.item()
                hidden = output.detach()
        for run in runs:
            nn.utils.clip_grad_norm_(run, train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        done += train.micro_batches_per_update
        return [one / tokens for one in sums]

    return one_update


def check_equal(method: str, plain: Any, result: Any) -> None:
    """Both do the same work: the losses of the first update are the same."""
    losses = [report.loss_sum / report.label_tokens for report in result.reports]
    assert plain == losses, f"{method}: {plain} in the plain loop, {losses} in the engine"


def seconds_of(one_update: Update) -> tuple[float, float]:
    """Wall and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    one_update()
    return time.perf_counter() - wall, time.process_time() - processor


def measure(repeats: int, sizes: Sequence[str], numbers: Sequence[int]) -> dict[str, Any]:
    use_fair_share_of_cores()
    world = join(1, 1, 60)
    found = []
    for name in sizes:
        size = SIZES[name]
        stream = RandomTokens(size["rows"], size["window"], VOCABULARY)
        for micro_batches in numbers:
            contenders: dict[str, tuple[Update, Update]] = {}
            for method, chunks in METHODS.items():
                config = loaded(size, chunks, micro_batches)
                blueprint = make_blueprint(config, VOCABULARY, None)
                engine = build_engine(config, world, blueprint, stream, {})
                contenders[method] = plain_loop(config, blueprint.model_config, stream), engine.train_batch
            for method, (plain, engine_update) in contenders.items():
                check_equal(method, plain(), engine_update())
            times: dict[str, list[list[tuple[float, float]]]] = {method: [[], []] for method in METHODS}
            for repeat in range(repeats + 3):
                for method, pair in contenders.items():
                    order = (0, 1) if repeat % 2 == 0 else (1, 0)
                    for which in order:
                        taken = seconds_of(pair[which])
                        if repeat >= 3:
                            times[method][which].append(taken)
            for method, (plain_times, engine_times) in times.items():
                row = {"size": name, "micro_batches": micro_batches, "method": method}
                found.append({**row, "plain": plain_times, "engine": engine_times})
            print(name, micro_batches, "done", file=sys.stderr)
    leave(world)
    return {"machine": _machine(), "repeats": repeats, "sizes": SIZES, "rows": found}


def table(found: dict[str, Any]) -> ResultTable:
    rows = []
    for one in found["rows"]:
        cells: list[str] = []
        for kind in (0, 1):  # wall, processor
            plain, engine = ([taken[kind] for taken in one[who]] for who in ("plain", "engine"))
            ratios = sorted(b / a for a, b in zip(plain, engine, strict=True))
            low, _, high = statistics.quantiles(ratios, n=4)
            cells += [f"{1e3 * statistics.median(plain):.1f}", f"{1e3 * statistics.median(engine):.1f}"]
            cells += [f"{statistics.median(ratios):.3f}", f"{low:.3f}-{high:.3f}"]
        rows.append((one["size"], one["micro_batches"], one["method"], *cells))
    columns: tuple[str, ...] = (
        "size",
        "micro-batches",
        "method",
        "plain ms",
        "engine ms",
        "engine / plain",
        "quartiles",
    )
    columns += ("plain CPU ms", "engine CPU ms", "engine / plain, CPU", "quartiles, CPU")
    title = f"One update; {found['machine']}, {found['repeats']} interleaved repetitions"
    return ResultTable("one-process", title, columns, tuple(rows))


# ---- a real model, fine-tuned


def plain_fine_tuning(folder: str, rows: int, window: int) -> tuple[Update, list[nn.Module]]:
    """What a user of transformers writes; the model's own matrix is embedding and readout, where it is tied."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    stream, updates = RandomTokens(rows, window, model.config.vocab_size), itertools.count()

    def one_update() -> None:
        ids = stream.batch(next(updates)).input_ids
        model(input_ids=ids, labels=ids).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return one_update, [model]


def fine_tuning(folder: str, contender: str, rows: int, window: int) -> tuple[Update, list[nn.Module]]:
    """An update of `contender`, of the engine or plain, in this process; and what it trains."""
    if contender == "plain":
        return plain_fine_tuning(folder, rows, window)
    sizes = {"micro_batch_size": rows, "micro_batches_per_update": 1, "steps": 100_000, "lr_scheduler": "constant"}
    data = {"train": "unused", "sequence_length": window}
    config = load({"model": {"pretrained": folder}, "data": data, "train": sizes}, FINE_TUNED[contender])
    blueprint = make_blueprint(config, None, None)
    stream = RandomTokens(rows, window, blueprint.parts.vocab_size)
    engine = build_engine(config, join(1, 1, 600), blueprint, stream, {})
    assert isinstance(engine, LocalUpdateEngine)
    return engine.train_batch, [one.engine.module for one in engine.local.values() if isinstance(one, TrainedStage)]


def peak_of(folder: str, contender: str, rows: int, window: int) -> int:
    """Bytes at the peak of the second update, when the optimizer has its state.

    The weights are counted by themselves: they are read as parts of the file, which torch takes for one allocation.
    """
    use_fair_share_of_cores()
    one_update, modules = fine_tuning(folder, contender, rows, window)
    weights = [tensor for module in modules for tensor in itertools.chain(module.parameters(), module.buffers())]
    held = {tensor.data_ptr(): tensor.nbytes for tensor in weights}
    with log_allocations() as log:
        one_update()
        log.mark("second")
        one_update()
        log.mark("end")
    return sum(held.values()) + log.peak(0, 1)


def seconds_beside_plain(
    folder: str, contender: str, rows: int, window: int, repeats: int
) -> list[list[tuple[float, float]]]:
    """Wall and processor seconds of updates, plain and of the contender, in turns."""
    use_fair_share_of_cores()
    pair = [fine_tuning(folder, one, rows, window)[0] for one in ("plain", contender)]
    times: list[list[tuple[float, float]]] = [[], []]
    for repeat in range(repeats + 1):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            taken = seconds_of(pair[which])
            if repeat > 0:
                times[which].append(taken)
    return times


def measure_pretrained(folder: str, repeats: int, shapes: Sequence[str]) -> dict[str, Any]:
    found = []
    for shape, contender in itertools.product(shapes, ["plain", *FINE_TUNED]):
        rows, window = map(int, shape.split("x"))
        row: dict[str, Any] = {"rows": rows, "window": window, "contender": contender}
        with multiprocessing.get_context("spawn").Pool(1) as alone:
            row["peak_bytes"] = alone.apply(peak_of, (folder, contender, rows, window))
        if contender != "plain":
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                arguments = (folder, contender, rows, window, repeats)
                row["plain"], row["engine"] = alone.apply(seconds_beside_plain, arguments)
        found.append(row)
        print(shape, contender, "done", file=sys.stderr)
    return {"machine": _machine(), "repeats": repeats, "rows": found}


def table_pretrained(found: dict[str, Any]) -> ResultTable:
    plain = {(one["rows"], one["window"]): one["peak_bytes"] for one in found["rows"] if one["contender"] == "plain"}
    rows = []
    for one in found["rows"]:
        shape = one["rows"], one["window"]
        cells = [f"{one['peak_bytes'] / 2**20:,.0f}", f"{one['peak_bytes'] / plain[shape]:.3f}"]
        if "engine" in one:
            before, after = ([taken[1] for taken in one[who]] for who in ("plain", "engine"))
            ratios = sorted(b / a for a, b in zip(before, after, strict=True))
            speeds = [f"{shape[0] * shape[1] / statistics.median(times):.1f}" for times in (before, after)]
            cells += [*speeds, f"{statistics.median(ratios):.3f}", f"{ratios[0]:.3f}-{ratios[-1]:.3f}"]
        rows.append((f"{shape[0]} x {shape[1]}", one["contender"], *cells, *[None] * (6 - len(cells))))
    columns = ("tokens", "training", "peak MiB", "of plain", "plain tokens per CPU s", "its own", "CPU time of plain's")
    title = f"SmolLM2-135M, fp32; {found['machine']}, {found['repeats']} interleaved repetitions"
    return ResultTable("pretrained", title, (*columns, "lowest-highest"), tuple(rows))


def _machine() -> str:
    return f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine in one process against a plain loop.", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="repetitions of every update (default: 31; of a real model 5)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which models (default: all)")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=MICRO_BATCHES, help="of an update")
    parser.add_argument("--out", default=str(FOLDER), metavar="DIR", help="folder of one_process.json and .md")
    parser.add_argument("--pretrained", metavar="FOLDER", help="fine-tune this model instead")
    shapes = "rows x tokens of its micro-batches (default: %(default)s)"
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxTOKENS", help=shapes)
    args = parser.parse_args()
    if args.pretrained:
        of_real = measure_pretrained(args.pretrained, args.repeats or 5, args.shapes)
        (Path(args.out) / "one_process_pretrained.json").write_text(json.dumps(of_real) + "\n")
        update(Path(args.out) / "one_process.md", [table_pretrained(of_real)], prefix="pretrained")
        return
    args.repeats = args.repeats or 31
    found, out = measure(args.repeats, args.sizes, args.micro_batches), Path(args.out)
    (out / "one_process.json").write_text(json.dumps(found) + "\n")
    update(out / "one_process.md", [table(found)])
    print((out / "one_process.md").read_text())


if __name__ == "__main__":
    main()
