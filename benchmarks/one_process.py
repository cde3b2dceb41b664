"""What the engine costs: all stages in one process, against the plain loop that it equals bit for bit.

    OMP_NUM_THREADS=1 python benchmarks/one_process.py       # writes docs/benchmarks/one_process.{json,md}

The plain loop is the network of tests/reference.py, torch and transformers only: for every micro-batch and every run of
blocks forward, loss, backward; then clip every run, one AdamW for all. The engine does the same with a DeepSpeed engine
per stage. Both take the same tokens, the same chunks of logits, the same number of threads. The repetitions are
interleaved, and each ratio is of two updates that followed one another. Wall time and processor time of the process
(user and system) are reported: on a machine that does other work only the second one says anything, and little.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from random_tokens import RandomTokens
from torch import Tensor, nn

from lptransformer.config.checks import micro_batch_size
from lptransformer.config.load import load
from lptransformer.config.schema import Config
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
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    return {"machine": machine, "repeats": repeats, "sizes": SIZES, "rows": found}


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


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine in one process against a plain loop.", allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=31, help="repetitions of every update (default: 31)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="which models (default: all)")
    parser.add_argument("--micro-batches", nargs="+", type=int, default=MICRO_BATCHES, help="of an update")
    parser.add_argument("--out", default=str(FOLDER), metavar="DIR", help="folder of one_process.json and .md")
    args = parser.parse_args()
    found, out = measure(args.repeats, args.sizes, args.micro_batches), Path(args.out)
    (out / "one_process.json").write_text(json.dumps(found) + "\n")
    update(out / "one_process.md", [table(found)])
    print((out / "one_process.md").read_text())


if __name__ == "__main__":
    main()
