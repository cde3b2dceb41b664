"""Where the time of one update goes, in the real engine: every microsecond of it, by kind of work.

    OMP_NUM_THREADS=1 python benchmarks/step_profile.py      # writes docs/benchmarks/step_profile.{json,md}

Two runs of a small Llama on random tokens: all stages in one process (4 chunks), and two pipeline ranks (2 chunks),
each a process, with the engine's own channels. torch's profiler gives every operator that ran on the main thread, with
its beginning and its end; an update is one scope around all of them, so what no operator covers is known too.

Each moment belongs to the innermost operator or scope that is open. From the inside out, the first of these decides:

    matrix products       mm, addmm, bmm, linear and their like, wherever they are (heads are counted apart)
    attention             torch's fused attention, forward and backward; its projections are matrix products
    optimizer             whatever runs inside of the optimizer's step
    channel               inside of sending and receiving: copies into buffers, and waiting for a neighbour
    loss                  what else runs inside of the chunked cross-entropy, forward and backward
    ZeRO and DeepSpeed    inside of DeepSpeed's forward, backward and step what is outside of the model, the loss, and
                          autograd: hooks, averaging, clipping, gradients set to none; our gradient norms and clipping
    other operators       norms, activations, residual sums, rotary embeddings, copies, autograd's sums of gradients
    Python                moments of an update in which no operator is open, in the model's code and in the engine's

The profiler itself costs: the table's last line says how much longer an update was than without it.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from random_tokens import RandomTokens
from torch.profiler import ProfilerActivity, profile, record_function

from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.p2p import Receiver, Sender
from lptransformer.engine.process_groups import join
from lptransformer.models.blueprint import make_blueprint
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.study.markdown_tables import ResultTable, update
from lptransformer.training.build import build_engine

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
VOCABULARY, ROWS, WINDOW, WARM_UP = 2048, 8, 128, 3
RUNS = {
    "one process, 4 chunks": {"pipeline": 1, "chunks": 4},
    "two ranks, 2 chunks": {"pipeline": 2, "chunks": 2},
}
KINDS = (
    "matrix products, blocks",
    "matrix products, heads",
    "attention",
    "loss",
    "optimizer",
    "ZeRO and DeepSpeed",
    "channel",
    "other operators",
    "Python",
)
MATRIX = re.compile(r"aten::(mm|addmm|bmm|baddbmm|matmul|linear|_mm|mkldnn_linear)$|mkl")
ATTENTION = re.compile(r"aten::.*scaled_dot_product")
UPDATE, MODEL, DEEPSPEED, CHANNEL = "bench: update", "bench: model", "bench: deepspeed", "bench: channel"
LOSS = re.compile(r"_ChunkedCrossEntropy")
OPTIMIZER = re.compile(r"Optimizer\.step#")
ACTION = re.compile(r"\d+[A-Z]")  # the engine names its actions
AUTOGRAD = re.compile(r"autograd::engine|Backward\d*$|AccumulateGrad")


def kind_of(name: str, around: list[str]) -> str:
    """The kind of work of a moment: the innermost open operator or scope, and those around it from the inside out."""
    open_ones = [name, *around]
    in_loss = any(LOSS.search(one) for one in open_ones)
    if MATRIX.search(name):
        return "matrix products, heads" if in_loss else "matrix products, blocks"
    if ATTENTION.search(name):
        return "attention"
    for one in open_ones:
        if OPTIMIZER.search(one):
            return "optimizer"
        if one == CHANNEL:
            return "channel"
        if LOSS.search(one):
            return "loss"
        if one == MODEL or AUTOGRAD.search(one):
            break
        if one == DEEPSPEED:
            return "ZeRO and DeepSpeed"
    return "Python" if name in (UPDATE, MODEL) or ACTION.match(name) else "other operators"


def loaded(pipeline: int, chunks: int) -> Config:
    return load(
        {
            "model": {"family": "llama", "hidden_size": 256, "num_layers": 8, "num_heads": 4},
            "data": {"train": "unused", "sequence_length": WINDOW},
            "objective": {"chunks": chunks},
            "parallel": {"pipeline": pipeline},
            "train": {"micro_batch_size": ROWS, "micro_batches_per_update": 2, "steps": 1000},
        }
    )


def scoped(owner: Any, name: str, scope: str) -> None:
    """From now on calls of a method are a scope of the profile."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(scope):
            return method(*args, **kwargs)

    setattr(owner, name, inside)


@contextlib.contextmanager
def channels_in_scope() -> Iterator[None]:
    before = Sender.send, Receiver.receive
    scoped(Sender, "send", CHANNEL)
    scoped(Receiver, "receive", CHANNEL)
    yield
    Sender.send, Receiver.receive = before  # type: ignore[method-assign]


def profile_rank(pipeline: int, chunks: int, updates: int) -> dict[str, Any]:
    """Seconds of an update by kind, on this process's pipeline rank; and of whole updates without the profiler."""
    use_fair_share_of_cores()
    config = loaded(pipeline, chunks)
    blueprint = make_blueprint(config, VOCABULARY, None)
    world = join(pipeline, 1, 60)
    stream = RandomTokens(ROWS, WINDOW, VOCABULARY)
    with channels_in_scope():
        engine = build_engine(config, world, blueprint, stream, {})
        assert isinstance(engine, LocalUpdateEngine)
        for stage in engine.local.values():
            assert isinstance(stage, TrainedStage)
            scoped(stage.engine.module, "forward", MODEL)
            scoped(stage, "forward", DEEPSPEED)
            scoped(stage, "backward", DEEPSPEED)
            scoped(stage, "update", DEEPSPEED)
            scoped(stage, "gradient_norms", DEEPSPEED)
        plain = []
        for number in range(WARM_UP + updates):
            started = time.perf_counter()
            engine.train_batch()
            if number >= WARM_UP:
                plain.append(time.perf_counter() - started)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(updates):
                with record_function(UPDATE):
                    engine.train_batch()
    engine.close()
    return {"seconds": account(profiler.events()), "updates": updates, "without_profiler": plain}


def account(events: Any) -> dict[str, float]:
    """Seconds by kind of all moments inside of updates, and "total": the length of the updates, taken by itself."""
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        around, parent = [], event.cpu_parent
        while parent is not None:
            around.append(parent.name)
            parent = parent.cpu_parent
        if event.name == UPDATE:
            seconds["total"] += event.time_range.elapsed_us() / 1e6
        elif UPDATE not in around:
            continue
        seconds[kind_of(event.name, around)] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def measure(updates: int) -> dict[str, Any]:
    found = {}
    for name, sizes in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            outs = [Path(folder) / f"{rank}.json" for rank in range(sizes["pipeline"])]
            port = free_port()
            workers = []
            for rank, out in enumerate(outs):
                variables: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": len(outs)}
                variables |= {"LOCAL_WORLD_SIZE": len(outs), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                given = ["--worker", json.dumps([sizes["pipeline"], sizes["chunks"], updates]), str(out)]
                environment = {**os.environ, **{key: str(value) for key, value in variables.items()}}
                workers.append(subprocess.Popen([sys.executable, __file__, *given], env=environment))
            if any([worker.wait() for worker in workers]):
                raise SystemExit(f"{name}: a process failed")
            found[name] = [json.loads(out.read_text()) for out in outs]
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    return {"machine": f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}", "runs": found}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def table(found: dict[str, Any]) -> ResultTable:
    columns, ranks = ["kind of work"], []
    for name, of_ranks in found["runs"].items():
        for rank, one in enumerate(of_ranks):
            columns += [f"{name}{f', rank {rank}' if len(of_ranks) > 1 else ''}: ms", "share"]
            ranks.append(one)
    rows: list[tuple[str, ...]] = []
    for kind in KINDS:
        cells = []
        for one in ranks:
            seconds = one["seconds"].get(kind, 0.0)
            cells += [f"{1e3 * seconds / one['updates']:.1f}", f"{seconds / one['seconds']['total']:.1%}"]
        rows.append((kind, *cells))
    totals, costs = [], []
    for one in ranks:
        total, known = one["seconds"]["total"], sum(one["seconds"].get(kind, 0.0) for kind in KINDS)
        plain = statistics.median(one["without_profiler"])
        totals += [f"{1e3 * total / one['updates']:.1f}", f"{known / total:.1%}"]
        costs += [f"{1e3 * plain:.1f}", f"x {total / one['updates'] / plain:.2f}"]
    rows += [("an update, and how much of it is above", *totals), ("without the profiler; with it", *costs)]
    title = f"One update of 2 micro-batches; {found['machine']}, mean of {ranks[0]['updates']} updates"
    return ResultTable("step-profile", title, tuple(columns), tuple(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description="A profile of one update.", allow_abbrev=False)
    parser.add_argument("--updates", type=int, default=10, help="updates to profile (default: 10)")
    parser.add_argument("--out", default=str(FOLDER), metavar="DIR", help="folder of step_profile.json and .md")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        Path(args.worker[1]).write_text(json.dumps(profile_rank(*json.loads(args.worker[0]))))
        # Beside gloo, what torch's profiler leaves behind was seen to crash when the interpreter cleans up.
        os._exit(0)
    found, out = measure(args.updates), Path(args.out)
    (out / "step_profile.json").write_text(json.dumps(found, indent=1) + "\n")
    update(out / "step_profile.md", [table(found)])
    print((out / "step_profile.md").read_text())


if __name__ == "__main__":
    main()
