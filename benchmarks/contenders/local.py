"""Ours: the real engine, with the stages, channels and schedules of any run."""

from __future__ import annotations

import contextlib

from contenders import emulated
from contenders.face import Sleeper, Spec, Work, stream_of
from lptransformer.config.schema import Config
from lptransformer.engine.interface import TrainingEngine
from lptransformer.models.blueprint import make_blueprint
from lptransformer.run_folder.metrics import StageReport
from lptransformer.training.build import build_engine, join_world


class EngineContender:
    """An engine of lptransformer: ours, or the baseline that has the same interface."""

    def __init__(self, engine: TrainingEngine) -> None:
        self.engine = engine
        last = engine.stages[-1]
        self.last = last.index if last.pipeline_rank == engine.world.pipeline_rank else None

    def update(self) -> float | None:
        for report in self.engine.train_batch().reports:
            if isinstance(report, StageReport) and report.stage == self.last and report.loss_sum is not None:
                return report.loss_sum / report.label_tokens
        return None

    @property
    def waited_seconds(self) -> float | None:
        return self.engine.waited_seconds


def build(spec: Spec, work: Work, sleeper: Sleeper) -> EngineContender:
    return build_from(spec.config_of(work, f"parallel.pipeline={work.ranks}"), work, sleeper)


def build_from(config: Config, work: Work, sleeper: Sleeper) -> EngineContender:
    """The engine of a configuration, with stages that sleep where the compute is emulated."""
    world = join_world(config)
    blueprint = make_blueprint(config, work.vocab_size, None)
    stages = contextlib.nullcontext() if work.block_seconds is None else emulated.stages(sleeper, work.block_seconds)
    with stages:
        engine = build_engine(config, world, blueprint, stream_of(config, work), {})
    return EngineContender(engine)
