"""Checkpoints as they were before they had a format of their own: DeepSpeed's files, and a marker for every stage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as dist
from engine_jobs import open_engine
from safetensors.torch import save_file

from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.run_folder import checkpoint


def train_and_save(overrides: Sequence[str], updates: int, run: Path) -> None:
    """Every process of the run calls this."""
    engine = open_engine(overrides)
    for _ in range(updates):
        engine.train_batch()
    save(engine, run)
    engine.close()


def save(engine: LocalUpdateEngine, run: Path) -> None:
    for index, stage in engine.local.items():
        folder = checkpoint.stage_folder(run, engine.update, index)
        folder.mkdir(parents=True, exist_ok=True)
        skipped, others = 0, {}
        if isinstance(stage, TrainedStage):
            stage.engine.save_checkpoint(str(folder / "deepspeed"), tag="state", save_latest=False)
            skipped = stage.skipped_in_a_row
            if stage.versions is not None:
                others |= {f"before.{number}": tensor for number, tensor in enumerate(stage.versions.before.shown)}
        for (target, source), route in engine.weight_copies.routes.items():
            if target == index:
                route.catch_up(engine.update)
                others |= {f"copy.{source}.{number}": flat for number, flat in enumerate(route.arrived)}
        weights = stage.weights()
        if dist.get_rank() == 0:
            save_file(weights, folder / "weights.safetensors")
            if others:
                save_file(others, folder / "others.safetensors")
            position = engine.stream.position(engine.update * engine.blueprint.micro_batches)
            where = {"format": 1, "update": engine.update, "position": position, "num_stages": len(engine.stages)}
            state = {**where, "plan": asdict(stage.plan), "skipped_in_a_row": skipped}
            (folder / "state.json").write_text(json.dumps(state))
            (folder / "complete").touch()
