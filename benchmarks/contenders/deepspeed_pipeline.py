"""DeepSpeed's PipelineEngine: backprop by 1F1B, one stage on every pipeline rank."""

from __future__ import annotations

from contenders.face import Sleeper, Spec, Work
from contenders.local import EngineContender, build_from

BASELINE = ("engine=deepspeed_pipeline", "objective.name=backprop")


def build(spec: Spec, work: Work, sleeper: Sleeper) -> EngineContender:
    return build_from(spec.config_of(work, f"parallel.pipeline={work.ranks}", *BASELINE), work, sleeper)
