"""The face of a training engine: what it takes and gives, whichever engine it is.

`train_batch() -> UpdateResult`, `eval_batch(name) -> reports`, `save_checkpoint(run)`, `load_checkpoint(run)`,
`request(control)` and `close()` are all that train.py knows of engine.py and pipeline_baseline.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from lptransformer.channel import Control
from lptransformer.metrics import EvaluationReport, StageReport, TraceReport, report_from_dict
from lptransformer.token_set import Batch
from lptransformer.world import World

Report = StageReport | EvaluationReport | TraceReport


class Stream(Protocol):
    """Micro-batches by their number since the start of the run; the same on every pipeline rank."""

    def batch(self, index: int) -> Batch: ...

    def position(self, index: int) -> dict[str, int]: ...

    def index(self, position: Mapping[str, int]) -> int: ...


class ValidSet(Protocol):
    """A validation set: micro-batches of full shape, padded with positions that have no label."""

    def batches(self, micro_batch_size: int) -> Iterable[Batch]: ...


@dataclass(frozen=True)
class UpdateResult:
    """After an update: how many there were, what pipeline rank 0 wants to follow, and reports.

    On global rank 0 `reports` holds what has arrived from all processes since the last call, elsewhere this process's.
    """

    update: int
    control: Control
    reports: list[Report]


def gather_reports(world: World, reports: list[Report]) -> list[Report]:
    """Reports go to global rank 0 through the store: no collective, nobody waits.

    There: these and all that have arrived since the last call. Elsewhere: these.
    """
    if world.global_rank != 0:
        world.store.queue_push("reports", json.dumps([report.to_dict() for report in reports]))
        return reports
    while world.store.queue_len("reports"):
        reports = reports + [report_from_dict(r) for r in json.loads(world.store.queue_pop("reports", True))]
    return reports
