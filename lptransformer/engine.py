"""The local-update engine: executes the actions of a schedule on the stages of one pipeline rank.

Its weights after an update depend only on the updates before, never on timing (the law of local updates,
docs/design.md), so a run over any number of processes equals the plain one-process loop.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from lptransformer import checkpoint, run_folder
from lptransformer.channel import Control, Frame, Header, Kind, Neighbours, open_channels
from lptransformer.deepspeed_stage import SpanGroup, TrainedStage
from lptransformer.errors import TrainingError
from lptransformer.metrics import EvaluationReport, StageReport, report_from_dict
from lptransformer.partition import StagePlan
from lptransformer.processes import peak_memory_bytes
from lptransformer.schedule import Action, one_update
from lptransformer.token_set import Batch, whole_rounds
from lptransformer.world import World, any_replica, leave

Report = StageReport | EvaluationReport
STOP_KEY = "stop"  # in the store: set by any process that was told to stop


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


class LocalUpdateEngine:
    """All stages of one pipeline rank, their channels, and the update loop. Built by lptransformer.initialize."""

    def __init__(
        self,
        world: World,
        stages: Sequence[StagePlan],
        build: Callable[[StagePlan, SpanGroup | None], TrainedStage],
        stream: Stream,
        valid: Mapping[str, ValidSet],
        *,
        hidden_size: int,
        dtype: torch.dtype,
        micro_batch_size: int,
        sequence_length: int,
        micro_batches_per_update: int,
        in_flight: int,
        max_skipped_updates: int,
        channel: str,
    ) -> None:
        self.world = world
        self.stages = list(stages)
        self.stream = stream
        self.valid = valid
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches_per_update
        self.max_skipped_updates = max_skipped_updates
        self.update = 0
        self.describe_run: Callable[[Path, bool], None] | None = None
        self.schedule: list[Action] = one_update(stages, world.pipeline_rank, self.micro_batches // world.data_size)
        # Every window is full in training, and its last position has no label.
        self.label_tokens = self.micro_batches * micro_batch_size * (sequence_length - 1)
        self.local = {
            plan.index: build(plan, self._span_group(plan))
            for plan in stages
            if plan.pipeline_rank == world.pipeline_rank
        }
        frame = Frame((micro_batch_size, sequence_length, hidden_size), dtype, world.device, channel)
        self.neighbours = open_channels(
            world,
            frame,
            in_flight,
            gradient_below=self.local[min(self.local)].plan.gradient_below,
            gradient_above=self.local[max(self.local)].plan.gradient_above,
        )
        self._actions: dict[str, Callable[[TrainedStage, int], None]] = {
            "R": self._receive,
            "F": self._forward,
            "S": self._send,
            "RG": self._receive_gradient,
            "B": self._backward,
            "SG": self._send_gradient,
        }
        self._batches: dict[int, Batch] = {}
        self._hidden: dict[tuple[int, int], Tensor] = {}  # (stage, micro-batch): its output, detached
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor | None, Tensor]] = {}  # input, loss, output
        self._gradients: dict[tuple[int, int], Tensor] = {}  # (stage, micro-batch): gradient at the stage's output
        self._loss_sums: dict[int, list[Tensor]] = {}
        self._requested = Control.NOTHING
        self._stop_requested = False
        self._control = Control.NOTHING

    # ------------------------------------------------------------------------------------------ the four calls

    def train_batch(self) -> UpdateResult:
        """One update of every stage of this pipeline rank.

        Raises TrainingError when a stage has skipped too many updates in a row, or a neighbour has gone.
        """
        started, waited = time.perf_counter(), self.waited_seconds
        self._control = Control.NOTHING
        self._loss_sums = {index: [] for index in self.local}
        outcomes = {}
        for action in self.schedule:
            stage = self.local[action.stage]
            if action.op == "U":
                outcomes[action.stage] = stage.update()
            else:
                assert action.micro_batch is not None
                self._actions[action.op](stage, action.micro_batch)
        assert not (self._hidden or self._graphs or self._gradients), "an update left something behind"
        self._batches.clear()
        if self.world.pipeline_size == 1:
            self._control = self._decide()
        self.update += 1
        seconds = time.perf_counter() - started
        idle_seconds = self.waited_seconds - waited
        reports: list[Report] = [
            StageReport(
                update=self.update,
                stage=index,
                data_rank=self.world.data_rank,
                loss_sum=sum(loss.item() for loss in self._loss_sums[index]) if stage.plan.has_head else None,
                label_tokens=self.label_tokens // self.world.data_size,
                grad_norm=outcomes[index].grad_norm,
                skipped=outcomes[index].skipped,
                learning_rate=outcomes[index].learning_rate,
                seconds=seconds,
                idle_seconds=idle_seconds,
                peak_memory_bytes=peak_memory_bytes(self.world.device),
            )
            for index, stage in self.local.items()
        ]
        if self._stop_requested and self.world.pipeline_rank > 0:
            self.world.store.set(STOP_KEY, "")
        reports = self._tell(reports)
        self._stop_when_skipping(reports)
        return UpdateResult(self.update, self._control, reports)

    def eval_batch(self, name: str) -> list[Report]:
        """Sums of the losses of every local head over all windows of the validation set `name`.

        Every process calls this at the same update; replica i takes each i-th micro-batch. No pipeline rank waits for
        the ones after it.
        """
        sums = {index: 0.0 for index in self.local}
        label_tokens = 0
        for stage in self.local.values():
            stage.engine.eval()
        with torch.no_grad():
            batches = whole_rounds(self.valid[name].batches(self.micro_batch_size), self.world.data_size)
            for index, batch in enumerate(batches):
                if index % self.world.data_size != self.world.data_rank:
                    continue
                label_tokens += batch.label_tokens
                if self.neighbours.below is None:
                    inputs = batch.input_ids.to(self.world.device)
                else:
                    header, inputs = self.neighbours.below.receive()
                    assert (header.kind, header.update, header.micro_batch) == (Kind.EVALUATE, self.update, index)
                labels = batch.labels.to(self.world.device)
                for stage_index, stage in self.local.items():
                    inputs, _, loss_sum = stage.forward(inputs, labels, 1.0)
                    if loss_sum is not None:
                        sums[stage_index] += loss_sum.item()
                if self.neighbours.above is not None:
                    self.neighbours.above.send(Header(Kind.EVALUATE, self.update, index), inputs)
        for stage in self.local.values():
            stage.engine.train()
        return self._tell(
            [
                EvaluationReport(
                    update=self.update,
                    evaluation=name,
                    stage=index,
                    data_rank=self.world.data_rank,
                    nll_sum=nll_sum if self.local[index].plan.has_head else None,
                    label_tokens=label_tokens,
                )
                for index, nll_sum in sums.items()
            ]
        )

    def save_checkpoint(self, run: str | Path) -> None:
        """Write the local stages below the run folder `run`. No stage waits for another.

        A folder that is no run folder yet becomes one, so that it can be evaluated and exported.
        """
        if self.world.global_rank == 0 and self.describe_run is not None and not run_folder.holds_run(Path(run)):
            self.describe_run(Path(run), False)
        for index, stage in self.local.items():
            folder = checkpoint.stage_folder(run, self.update, index)
            position = self.stream.position(self.update * self.micro_batches)
            stage.save(folder, checkpoint.describe(stage.plan, len(self.stages), self.update, position))

    def load_checkpoint(self, run: str | Path, update: int | None = None) -> int:
        """Continue from a complete checkpoint of `run`, the newest one unless `update` says which.

        Returns its number of updates. Raises RunError when there is none, DataError when its place in the data is none
        of this stream's.
        """
        update = checkpoint.latest(run) if update is None else update
        for index, stage in self.local.items():
            folder = checkpoint.stage_folder(run, update, index)
            assert self.stream.index(checkpoint.read_state(folder)["position"]) == update * self.micro_batches
            stage.load(folder)
        self.update = update
        return update

    # ------------------------------------------------------------------------------------------ control

    def request(self, control: Control, urgent: bool = False) -> None:
        """Ask for something to follow the update under way. Pipeline rank 0 decides for all, elsewhere this is ignored.

        An urgent request means save and stop. It counts on every process, and may be made in a signal handler.
        """
        if urgent:
            self._stop_requested = True  # only ever set: a handler may run between any two steps of the loop
        elif self.world.pipeline_rank == 0:
            self._requested |= control

    def _decide(self) -> Control:
        """On pipeline rank 0, once per update: what follows it. Its replicas agree first."""
        asked = self._requested
        self._requested = Control.NOTHING
        if self._stop_requested or self.world.store.check([STOP_KEY]):
            asked |= Control.SAVE | Control.STOP
        decided = Control.NOTHING
        for flag in (Control.EVALUATE, Control.SAVE, Control.STOP):
            if any_replica(bool(asked & flag), self.world):
                decided |= flag
        return decided

    def close(self) -> list[Report]:
        """Leave the run, when every process has come to its end; returns the last reports on global rank 0."""
        self.neighbours.flush()
        self.world.wait_for_the_end()
        reports = self._tell([]) if self.world.global_rank == 0 else []
        self.neighbours = Neighbours()
        leave(self.world)
        return reports

    # ------------------------------------------------------------------------------------------ actions

    def _index(self, micro_batch: int) -> int:
        """The number within the update of this replica's `micro_batch`-th micro-batch."""
        return micro_batch * self.world.data_size + self.world.data_rank

    def _batch(self, micro_batch: int) -> Batch:
        if micro_batch not in self._batches:
            self._batches[micro_batch] = self.stream.batch(self.update * self.micro_batches + self._index(micro_batch))
        return self._batches[micro_batch]

    def _receive(self, stage: TrainedStage, micro_batch: int) -> None:
        assert self.neighbours.below is not None
        header, hidden_states = self.neighbours.below.receive()
        self._check(header, Kind.TRAIN, micro_batch)
        self._control |= header.control
        self._hidden[stage.plan.index - 1, micro_batch] = hidden_states

    def _forward(self, stage: TrainedStage, micro_batch: int) -> None:
        plan, batch = stage.plan, self._batch(micro_batch)
        if plan.is_first:
            inputs = batch.input_ids.to(self.world.device)
        else:
            inputs = self._hidden.pop((plan.index - 1, micro_batch)).requires_grad_(plan.gradient_below)
        # DeepSpeed averages gradients over the replicas: the sum over replicas has to come out as the mean over tokens.
        scale = self.world.data_size / self.label_tokens
        hidden_states, loss, loss_sum = stage.forward(inputs, batch.labels.to(self.world.device), scale)
        if loss_sum is not None:
            self._loss_sums[plan.index].append(loss_sum)
        self._graphs[plan.index, micro_batch] = (inputs, loss, hidden_states)
        if not plan.is_last:
            self._hidden[plan.index, micro_batch] = hidden_states.detach()

    def _send(self, stage: TrainedStage, micro_batch: int) -> None:
        assert self.neighbours.above is not None
        final = micro_batch == self.micro_batches // self.world.data_size - 1
        if final and self.world.pipeline_rank == 0:
            self._control = self._decide()
        header = Header(Kind.TRAIN, self.update, self._index(micro_batch), self._control)
        self.neighbours.above.send(header, self._hidden.pop((stage.plan.index, micro_batch)))

    def _receive_gradient(self, stage: TrainedStage, micro_batch: int) -> None:
        assert self.neighbours.gradient_above is not None
        header, gradient = self.neighbours.gradient_above.receive()
        self._check(header, Kind.GRADIENT, micro_batch)
        self._gradients[stage.plan.index, micro_batch] = gradient

    def _backward(self, stage: TrainedStage, micro_batch: int) -> None:
        key = (stage.plan.index, micro_batch)
        inputs, loss, hidden_states = self._graphs.pop(key)
        if loss is None:  # the loss of this span is above: its gradient comes down as a vector-Jacobian product
            loss = (hidden_states * self._gradients.pop(key)).sum()
        stage.backward(loss)
        if stage.plan.gradient_below:
            assert inputs.grad is not None
            self._gradients[stage.plan.index - 1, micro_batch] = inputs.grad

    def _send_gradient(self, stage: TrainedStage, micro_batch: int) -> None:
        assert self.neighbours.gradient_below is not None
        header = Header(Kind.GRADIENT, self.update, self._index(micro_batch))
        self.neighbours.gradient_below.send(header, self._gradients.pop((stage.plan.index - 1, micro_batch)))

    def _check(self, header: Header, kind: Kind, micro_batch: int) -> None:
        expected = (kind, self.update, self._index(micro_batch))
        assert (header.kind, header.update, header.micro_batch) == expected, f"expected {expected}, received {header}"

    # ------------------------------------------------------------------------------------------ construction

    def _span_group(self, plan: StagePlan) -> SpanGroup | None:
        members = [other for other in self.stages if other.span == plan.span]
        if len(members) == 1:
            return None
        group = self.world.group(f"span/{plan.span}", members.index(plan), len(members))
        return SpanGroup(group, len(members))

    # ------------------------------------------------------------------------------------------ reports

    @property
    def waited_seconds(self) -> float:
        return self.neighbours.waited_seconds + sum(stage.waited_seconds for stage in self.local.values())

    def _tell(self, reports: list[Report]) -> list[Report]:
        """Reports go to global rank 0 through the store: no collective, nobody waits."""
        if self.world.global_rank != 0:
            self.world.store.queue_push("reports", json.dumps([report.to_dict() for report in reports]))
            return reports
        while self.world.store.queue_len("reports"):
            reports = reports + [report_from_dict(r) for r in json.loads(self.world.store.queue_pop("reports", True))]
        return reports

    def _stop_when_skipping(self, reports: list[Report]) -> None:
        for index, stage in self.local.items():
            if stage.skipped_in_a_row >= self.max_skipped_updates:
                losses = [loss.item() for loss in self._loss_sums[index]]
                bad = [self._index(i) for i, loss in enumerate(losses) if not math.isfinite(loss)]
                what = f"the loss of micro-batches {bad} is not finite" if bad else "its gradient is not finite"
                raise TrainingError(
                    f"stage {index} (blocks {stage.plan.first_block}-{stage.plan.last_block}) skipped "
                    f"{stage.skipped_in_a_row} updates in a row; at update {self.update} {what}. Start "
                    f"again with a lower train.learning_rate or more train.warmup_steps, or look at these windows",
                    reports,
                )
