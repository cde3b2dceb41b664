"""Jobs for worker processes that train by DeepSpeed's own PipelineEngine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine_jobs import RandomValidSet, load_config, make_stream
from torch import Tensor

from lptransformer.engine.deepspeed_pipeline import PipelineBaseline
from lptransformer.engine.p2p import Control
from lptransformer.errors import TrainingError
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.head import LossTerm
from lptransformer.processes import use_fair_share_of_cores
from lptransformer.run_folder.metrics import StageReport
from lptransformer.training.build import build_engine, join_world

UPDATES = 20
BASELINE = ("engine=deepspeed_pipeline", "objective.name=backprop")
ONE_SPAN = ("objective.chunks=1",)  # what the reference calls backprop
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9", "train.learning_rate=0.5")
OPTIMIZERS: dict[str, tuple[str, ...]] = {"adamw": (), "sgd": SGD}
LOSS_TOLERANCE = {"sgd": 1e-5, "adamw": 1e-4}
NO_CLIP = ("train.steps=40", "train.grad_clip=0")
CLIP = ("train.steps=40", "train.grad_clip=0.25")


# --------------------------------------------------------------------------------------------- jobs


@dataclass
class Outcome:
    """What one process gives back. Lists are by update."""

    plan: StagePlan
    data_rank: int
    reports: list[StageReport] = field(default_factory=list)
    controls: list[int] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    evaluation: tuple[float | None, int] = (None, 0)
    error: str = ""


def open_baseline(overrides: Sequence[str]) -> PipelineBaseline:
    config = load_config((*overrides, *BASELINE))
    use_fair_share_of_cores()
    world, stream = join_world(config), make_stream(config)
    valid = {"valid": RandomValidSet(stream)}
    engine = build_engine(config, world, make_blueprint(config, stream.vocab_size, None), stream, valid)
    assert isinstance(engine, PipelineBaseline)
    return engine


def train(
    overrides: Sequence[str],
    updates: int,
    load: Path | None = None,
    save: Path | None = None,
    evaluate_before: int | None = None,
    requests: Sequence[tuple[int, int, Control, bool]] = (),
    sleep: tuple[int, float] | None = None,
    infinite_from: int | None = None,
) -> Outcome:
    """Load, train, save, evaluate. `requests`: (global rank, before which update, what, urgent); `sleep`: (pipeline
    rank, seconds) in each forward pass; `infinite_from`: the update from which on the loss is infinite."""
    engine = open_baseline(overrides)
    world = engine.world
    outcome = Outcome(engine.plan, world.data_rank)
    if load is not None:
        engine.load_checkpoint(load)
    if sleep is not None and sleep[0] == world.pipeline_rank:
        forward = engine.stage.hidden_states
        engine.stage.hidden_states = lambda inputs: [time.sleep(sleep[1]), forward(inputs)][1]  # type: ignore[assignment]
    if infinite_from is not None and engine.stage.head is not None:
        head = engine.stage.head.forward

        def infinite(*args: Any) -> dict[str, LossTerm]:
            factor = math.inf if engine.update + 1 >= infinite_from else 1
            return {name: LossTerm(*(factor * loss for loss in term)) for name, term in head(*args).items()}

        engine.stage.head.forward = infinite  # type: ignore[method-assign]
    try:
        for update in range(1, updates + 1):
            if update == evaluate_before:
                engine.eval_batch("valid")
            for rank, when, control, urgent in requests:
                if (rank, when) == (world.global_rank, update):
                    engine.request(control, urgent)
            result = engine.train_batch()
            outcome.controls.append(int(result.control))
            outcome.reports += own(engine, result.reports)
    except TrainingError as error:
        outcome.error = str(error)
        return outcome
    if save is not None:
        engine.save_checkpoint(save)
    for report in own(engine, engine.eval_batch("valid")):  # none where a stop was asked for
        outcome.evaluation = (report.nll_sum, report.label_tokens)
    outcome.weights = {name: weight.detach().clone() for name, weight in engine.stage.named_parameters()}
    engine.close()
    return outcome


def own(engine: PipelineBaseline, reports: Sequence[Any]) -> list[Any]:
    """Without those of other processes, which arrive at global rank 0 at any time."""
    return [r for r in reports if (r.stage, r.data_rank) == (engine.plan.index, engine.world.data_rank)]
