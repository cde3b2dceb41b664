"""Peak activation memory of one process that holds all stages, against backprop, to the byte.

    OMP_NUM_THREADS=1 python benchmarks/memory.py            # writes docs/benchmarks/memory.{json,md}, about 5 minutes
    python benchmarks/memory.py --tables                     # the tables again, from the JSON

A small Llama on random tokens, fp32 on the CPU, a growing number of blocks, a growing window, a growing vocabulary. The
contenders: plain Hugging Face training (`model(input_ids, labels=...).loss.backward()`), the same with its activation
checkpointing, and this engine with `backprop` and with `chunked` in K runs, all stages in one process.

What is counted: an update has two micro-batches, and the peak is that of the second one, less what was alive before it
(weights, their gradients, optimizer state, the batch). So it holds everything a pass needs for a moment: saved tensors,
hidden states, logits, the new gradient of a weight before it is added. allocations.py logs torch's allocator;
nothing is sampled, and the numbers do not depend on the load of the machine. The engine's peak is split by stage too:
from the beginning of a stage's forward pass to the beginning of the next stage's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from allocations import Allocations, log_allocations

from lptransformer.config.load import load
from lptransformer.data.token_set import Batch
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.engine.process_groups import World, join, leave
from lptransformer.models import hf_config
from lptransformer.models.blueprint import make_blueprint
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.study.markdown_tables import ResultTable, update
from lptransformer.training.build import build_engine

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
BASE = {"blocks": 8, "window": 128, "vocabulary": 256}
GROWING = {
    "blocks": (4, 8, 16, 32),
    "window": (64, 128, 256, 512),
    "vocabulary": (256, 2048, 8192, 32768),
}
ROWS, HIDDEN, HEADS, CHUNK_TOKENS = 4, 128, 4, 128
CHUNKS = (2, 4, 8)
PLAIN, CHECKPOINTED, BACKPROP = "plain", "plain, checkpointed", "backprop"
CONTENDERS = (PLAIN, CHECKPOINTED, BACKPROP, *(f"chunked {k}" for k in CHUNKS))


@dataclass(frozen=True)
class RandomTokens:
    """The same random tokens every time, with a mark in the log for every micro-batch."""

    tokens: Batch
    log: Allocations

    def batch(self, index: int) -> Batch:
        self.log.mark("micro-batch")
        return self.tokens

    def label_counts(self, index: int) -> list[int]:
        rows, length = self.tokens.input_ids.shape
        return [length - 1] * rows

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index}

    def index(self, position: object) -> int:
        raise NotImplementedError


def sizes(blocks: int, window: int, vocabulary: int, contender: str) -> dict[str, Any]:
    name, _, chunks = contender.partition(" ")
    objective: dict[str, Any] = {"name": name, "chunks": int(chunks)} if chunks else {"name": "backprop"}
    return {
        "model": {"family": "llama", "hidden_size": HIDDEN, "num_layers": blocks, "num_heads": HEADS},
        "data": {"train": "unused", "sequence_length": window},
        "objective": objective,
        "loss": {"chunk_tokens": CHUNK_TOKENS},
        "train": {"micro_batch_size": ROWS, "micro_batches_per_update": 2, "steps": 1000},
    }


def random_batch(window: int, vocabulary: int) -> Batch:
    ids = torch.randint(0, vocabulary, (ROWS, window), generator=torch.Generator().manual_seed(0))
    return Batch(ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100))


def plain(case: dict[str, int], checkpointed: bool) -> list[int]:
    """Hugging Face's own model and loss, one backward pass per micro-batch."""
    config = load(sizes(**case, contender=BACKPROP))
    blueprint = make_blueprint(config, case["vocabulary"], None)
    model = hf_config.model_class(blueprint.model_config)(blueprint.model_config).train()
    if checkpointed:
        model.activation_checkpointing_enable()
    ids = random_batch(case["window"], case["vocabulary"]).input_ids
    with log_allocations() as log:
        for _ in range(2):
            log.mark("micro-batch")
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        log.mark("end")
    return [log.peak(1, 2) - log.alive(1)]


def ours(case: dict[str, int], contender: str, world: World) -> list[int]:
    """The engine with all stages in this process; the peak of every stage."""
    config = load(sizes(**case, contender=contender))
    blueprint = make_blueprint(config, case["vocabulary"], None)
    log = Allocations()
    stream = RandomTokens(random_batch(case["window"], case["vocabulary"]), log)
    engine = build_engine(config, world, blueprint, stream, {})
    assert isinstance(engine, LocalUpdateEngine)
    with marked_stages(engine.local, log), log_allocations(log):
        engine.train_batch()
    names = log.names()
    begin = [number for number, name in enumerate(names) if name == "micro-batch"][1]
    ends = [*(number for number, name in enumerate(names) if name == "forward" and number > begin)]
    ends = [*ends[1:], names.index("update")]
    return [log.peak(a, b) - log.alive(begin) for a, b in zip([begin, *ends], ends, strict=False)]


@contextlib.contextmanager
def marked_stages(local: Any, log: Allocations) -> Iterator[None]:
    """A mark where the forward pass of a stage begins, and one before an optimizer's step."""
    hooks = []
    for stage in local.values():
        hooks.append(stage.engine.module.register_forward_pre_hook(lambda *_: log.mark("forward")))
        hooks.append(stage.optimizer.register_step_pre_hook(lambda *_: log.mark("update")))
    yield
    for hook in hooks:
        hook.remove()


def measure() -> dict[str, Any]:
    use_fair_share_of_cores()
    world = join(1, 1, 60)
    cases = [{**BASE, axis: value} for axis, values in GROWING.items() for value in values]
    rows: list[dict[str, Any]] = []
    for case in cases:
        if any(row["case"] == case for row in rows):
            continue
        peaks = {}
        for contender in CONTENDERS:
            if contender in (PLAIN, CHECKPOINTED):
                peaks[contender] = plain(case, contender == CHECKPOINTED)
            elif contender == BACKPROP or int(contender.split()[1]) <= case["blocks"]:
                peaks[contender] = ours(case, contender, world)
        rows.append({"case": case, "peak_bytes_by_stage": peaks})
        print(case, {name: f"{max(found) / 2**20:.2f} MiB" for name, found in peaks.items()}, file=sys.stderr)
    leave(world)
    return {"torch": torch.__version__, "rows": ROWS, "hidden_size": HIDDEN, "cases": rows}


def border_bytes(case: dict[str, int]) -> int:
    """Hidden states of one micro-batch, fp32."""
    return 4 * ROWS * case["window"] * HIDDEN


def tables(found: dict[str, Any]) -> list[ResultTable]:
    made = []
    for axis, values in GROWING.items():
        chosen = [row for row in found["cases"] if all(row["case"][k] == v for k, v in BASE.items() if k != axis)]
        chosen.sort(key=lambda row: row["case"][axis])
        assert [row["case"][axis] for row in chosen] == list(values)
        fixed = ", ".join(f"{key} {value}" for key, value in BASE.items() if key != axis)
        rows = [
            (row["case"][axis], *(_mib(row, contender) for contender in CONTENDERS), _mib_of(border_bytes(row["case"])))
            for row in chosen
        ]
        title = f"MiB at the peak of a micro-batch, {fixed}"
        made.append(ResultTable(f"memory-{axis}", title, (axis, *CONTENDERS, "one border"), tuple(rows)))
        made.append(_shares(axis, chosen, fixed))
    base = next(row for row in found["cases"] if row["case"] == BASE)
    stages = [
        (contender, *(_mib_of(peak) for peak in [*base["peak_bytes_by_stage"][contender], *[None] * 8][:8]))
        for contender in CONTENDERS[2:]
    ]
    title = f"MiB at the peak of every stage, {', '.join(f'{key} {value}' for key, value in BASE.items())}"
    made.append(ResultTable("memory-stages", title, ("", *(f"stage {i}" for i in range(8))), tuple(stages)))
    return made


def _shares(axis: str, chosen: list[dict[str, Any]], fixed: str) -> ResultTable:
    """Peak over what is aimed at: 1/K of the peak of backprop, and a border. At most 1 is aimed at."""
    columns, rows = [axis], []
    for against in (PLAIN, BACKPROP):
        columns += [f"K={k} to {against}" for k in CHUNKS]
    for row in chosen:
        peaks = {name: max(found) for name, found in row["peak_bytes_by_stage"].items()}
        cells: list[Any] = [row["case"][axis]]
        for against in (PLAIN, BACKPROP):
            for k in CHUNKS:
                own = peaks.get(f"chunked {k}")
                cells.append(own and f"{own / (peaks[against] / k + border_bytes(row['case'])):.2f}")
        rows.append(tuple(cells))
    title = f"Peak of K chunks over (peak of backprop / K + one border), {fixed}"
    return ResultTable(f"memory-{axis}-aim", title, tuple(columns), tuple(rows))


def _mib(row: dict[str, Any], contender: str) -> str | None:
    found = row["peak_bytes_by_stage"].get(contender)
    return _mib_of(max(found)) if found else None


def _mib_of(size: int | None) -> str | None:
    return None if size is None else f"{size / 2**20:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak activation memory, one process.", allow_abbrev=False)
    parser.add_argument("--tables", action="store_true", help="make the tables from the JSON, measure nothing")
    numbers = FOLDER / "memory.json"
    if not parser.parse_args().tables:
        numbers.write_text(json.dumps(measure(), indent=1) + "\n")
    print(update(FOLDER / "memory.md", tables(json.loads(numbers.read_text()))))


if __name__ == "__main__":
    main()
