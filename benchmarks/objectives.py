"""What an update costs under each objective, in one process: seconds and FLOPs, against chunked and backprop.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py

Eight blocks of a small Llama on random tokens. The repetitions are interleaved; medians and the spread in
milliseconds. What a pipeline makes of it is another question: here nothing overlaps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from lptransformer.config.load import load
from lptransformer.data.token_set import Batch
from lptransformer.engine.process_groups import join, leave
from lptransformer.methods import flops
from lptransformer.models.blueprint import make_blueprint
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.training.build import build_engine

VOCABULARY, REPEATS = 512, 15
BASE = {
    "model": {"family": "llama", "hidden_size": 256, "num_layers": 8, "num_heads": 4},
    "data": {"train": "unused", "sequence_length": 128},
    "train": {"micro_batch_size": 8, "micro_batches_per_update": 1, "steps": 1000},
}
OBJECTIVES = {
    "backprop": ["objective.name=backprop"],
    "chunked, 4": ["objective.chunks=4"],
    "overlapping, 4": ["objective.name=overlapping", "objective.chunks=4"],
    "overlapping, 4, by 2": ["objective.name=overlapping", "objective.chunks=4", "objective.overlap=2"],
    "deep supervision, 4": ["objective.name=deep_supervision", "objective.chunks=4"],
    "last, 2 blocks": ["objective.name=last", "objective.trained_blocks=2"],
    "delayed": ["objective.name=delayed", "objective.chunks=4"],
}


@dataclass(frozen=True)
class RandomTokens:
    """The same micro-batch of random tokens every time."""

    batch_of_all: Batch

    def batch(self, index: int) -> Batch:
        return self.batch_of_all

    def label_counts(self, index: int) -> list[int]:
        rows, length = self.batch_of_all.input_ids.shape
        return [length - 1] * rows

    def position(self, index: int) -> dict[str, int]:
        return {"epoch": 0, "offset": index}

    def index(self, position: object) -> int:
        raise NotImplementedError


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    use_fair_share_of_cores()
    ids = torch.randint(0, VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(0))
    stream = RandomTokens(Batch(ids, torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)))
    world = join(1, 1, 60)
    engines, counted = {}, {}
    for name, overrides in OBJECTIVES.items():
        config = load(BASE, overrides)
        blueprint = make_blueprint(config, VOCABULARY, None)
        engines[name] = build_engine(config, world, blueprint, stream, {})
        counted[name] = flops.of_phase(blueprint.objective, blueprint.objective.usual, blueprint.costs).total
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(REPEATS + 2):
        for name, engine in engines.items():
            started = time.perf_counter()
            engine.train_batch()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    leave(world)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    chunked = "chunked, 4"
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), {REPEATS} interleaved repetitions")
    print("| objective | median ms | from | to | time / chunked | FLOPs / chunked |\n|---|---|---|---|---|---|")
    for name, times in seconds.items():
        parts = [f"{1e3 * x:.1f}" for x in (medians[name], min(times), max(times))]
        ratios = [f"{medians[name] / medians[chunked]:.2f}", f"{counted[name] / counted[chunked]:.2f}"]
        print(f"| {name} | {' | '.join([*parts, *ratios])} |")


if __name__ == "__main__":
    main()
