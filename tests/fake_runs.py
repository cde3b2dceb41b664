"""Run folders and records without training: losses by a formula, so that tests know what must come out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lptransformer.config.load import load, to_yaml
from lptransformer.methods import objectives
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.stages import cut
from lptransformer.run_folder import history, layout
from lptransformer.run_folder.metrics import TextCounts, perplexity
from lptransformer.run_folder.metrics_log import MetricsWriter

COUNTS = {"tokens": 1000, "bytes": 1000, "words": 200}
BASE: dict[str, Any] = {
    "model": {"hidden_size": 16, "num_layers": 4, "num_heads": 2},
    "data": {"train": "text.txt", "valid": {"choose": "a.txt", "report": "b.txt"}, "tokenizer": "bytes"},
    "train": {"steps": 40, "micro_batch_size": 2, "micro_batches_per_update": 2, "lr_scheduler": "constant"},
}
MODEL = {"model_type": "gpt2", "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 256, "vocab_size": 257}
MODEL |= {"bos_token_id": None, "eos_token_id": None}
Loss = Callable[[int, int], float]


def falling(end: float, speed: float = 8.0) -> Loss:
    """Losses that fall towards `end`; the exit after block b is 0.1 nats behind for every block above it."""
    return lambda update, block: end + 3.0 * math.exp(-update / speed) + 0.1 * (3 - block)


def make_run(
    folder: Path,
    overrides: Sequence[str] = (),
    loss: Loss | None = None,
    updates: int | None = None,
    every: int = 10,
    seconds: float = 0.5,
    idle: float = 0.25,
) -> Path:
    """A run folder as `train` leaves it, but for checkpoints; `seconds` is the time of an update, `idle` what share of
    it every stage waits."""
    config = load(BASE, [*overrides, f"--run.dir={folder}"])
    folder.mkdir(parents=True, exist_ok=True)
    tokens = folder.parent / "tokens"
    tokens.mkdir(exist_ok=True)
    (tokens / "manifest.json").write_text(json.dumps(COUNTS))
    (folder / layout.CONFIG).write_text(to_yaml(config))
    (folder / layout.MODEL).write_text(json.dumps({**MODEL, "n_layer": config.model.num_layers}))
    sets = {"train": {"train": str(tokens)}, "valid": dict.fromkeys(config.data.valid, str(tokens))}
    (folder / layout.DATA).write_text(json.dumps(sets))
    (folder / history.ENVIRONMENT).write_text(json.dumps([{"cpu_count": 2, "omp_num_threads": "1"}]))
    loss = loss or falling(1.5)
    objective = objectives.build(config.model.num_layers, **config.objective.model_dump())
    stages = cut(objective, config.parallel.pipeline, ModelCosts(1.0, 1.0, 1.0))
    done = config.train.steps if updates is None else updates
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    writer = MetricsWriter(folder)
    for update in range(1, done + 1):
        entries = [
            {
                "stage": stage.index,
                "last_block": stage.last_block,
                "loss": loss(update, stage.last_block) if stage.has_head else None,
                "grad_norm": 1.0,
                "skipped": False,
                "idle_share": idle,
                "memory_bytes": 2**20 * (stage.index + 1),
            }
            for stage in stages
        ]
        numbers = {"tokens": 1020 * update, "seconds": seconds * update, "tokens_per_second": 1020 / seconds}
        writer.write({"update": update, **numbers, "learning_rate": config.train.learning_rate, "stages": entries})
        if update % every == 0 or update == done:
            for offset, name in enumerate(config.data.valid):
                exits = [
                    {
                        "stage": stage.index,
                        "last_block": stage.last_block,
                        **vars(perplexity(loss(update, stage.last_block) + offset, 1, TextCounts(**COUNTS))),
                    }
                    for stage in stages
                    if stage.has_head
                ]
                writer.write({"update": update, "evaluation": name, "exits": exits})
    writer.close()
    return folder
