"""The local-update engine: executes the actions of a schedule on the stages of one pipeline rank.

Its weights after an update depend only on the updates before, never on timing (the law of local updates,
docs/design.md), so a run over any number of processes equals the plain one-process loop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from lptransformer import checkpoint, run_folder
from lptransformer.channel import Control, Frame, Header, Kind, Neighbours, open_channels
from lptransformer.deepspeed_stage import TrainedStage
from lptransformer.errors import TrainingError
from lptransformer.executor import Executor, HeadLoss, LocalStage, Update, plan_phases
from lptransformer.face import Report, Stream, UpdateResult, ValidSet, gather_reports
from lptransformer.gradients import crossing, flows
from lptransformer.metrics import EvaluationReport, StageReport, TraceReport
from lptransformer.mirror import Mirror
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan
from lptransformer.processes import peak_memory_bytes
from lptransformer.recorder import COPIES, Recorder
from lptransformer.token_set import whole_rounds
from lptransformer.world import World, any_replica, leave

STOP_KEY = "stop"  # in the store: set by any process that was told to stop


class LocalUpdateEngine:
    """All stages of one pipeline rank, their channels, and the update loop. Built by lptransformer.initialize."""

    def __init__(
        self,
        world: World,
        objective: Objective,
        stages: Sequence[StagePlan],
        build: Callable[[StagePlan], LocalStage],
        stream: Stream,
        valid: Mapping[str, ValidSet],
        head_losses: Mapping[int, HeadLoss],
        copy_lags: Mapping[int, int],
        roundings: Mapping[int, str],
        *,
        hidden_size: int,
        dtype: torch.dtype,
        steps: int,
        micro_batch_size: int,
        sequence_length: int,
        micro_batches_per_update: int,
        in_flight: int,
        refresh_every: int,
        max_skipped_updates: int,
        channel: str,
        trace: Sequence[int] | None = None,
    ) -> None:
        self.world = world
        self.objective = objective
        self.stages = list(stages)
        self.stream = stream
        self.valid = valid
        self.steps = steps
        self.micro_batch_size = micro_batch_size
        self.micro_batches = micro_batches_per_update
        self.max_skipped_updates = max_skipped_updates
        self.update = 0
        self.describe_run: Callable[[Path, bool], None] | None = None
        # Every window is full in training, and its last position has no label.
        self.label_tokens = self.micro_batches * micro_batch_size * (sequence_length - 1)
        self.head_losses = head_losses
        self.local = {plan.index: build(plan) for plan in stages if plan.pipeline_rank == world.pipeline_rank}
        of_phases = [flows(phase, stages) for phase in objective.phases]
        self.neighbours = open_channels(
            world,
            Frame((micro_batch_size, sequence_length, hidden_size), dtype, world.device, channel),
            in_flight,
            rounding_below=roundings.get(min(self.local) - 1),
            rounding_above=roundings.get(max(self.local)),
            gradients_below=max(len(crossing(one, min(self.local))) for one in of_phases),
            gradients_above=max(len(crossing(one, max(self.local) + 1)) for one in of_phases),
        )
        self.executor = Executor(
            world, self.local, self.neighbours, head_losses, roundings, self.micro_batches, stream.batch, self._decide
        )
        self.work = plan_phases(world, stages, objective, self.local, self.micro_batches // world.data_size)
        self.mirror = Mirror(world, stages, self.local, copy_lags, refresh_every)
        self._requested = Control.NOTHING
        self._stop_requested = False
        self._recorder = self._recorder_of(*trace) if trace else None

    # ------------------------------------------------------------------------------------------ the four calls

    def train_batch(self) -> UpdateResult:
        """One update of every stage of this pipeline rank.

        Raises TrainingError when a stage has skipped too many updates in a row, or a neighbour has gone.
        """
        started, waited = time.perf_counter(), self.waited_seconds
        recorder = self._recorder if self._recorder and self._recorder.wants(self.update + 1) else None
        if recorder:
            recorder.begin(started)
        self.executor.recorder = recorder
        phase = self.objective.phase_at(self.update, self.steps)
        with recorder.action(COPIES) if recorder and self.mirror.links else contextlib.nullcontext():
            self.mirror.before(self.update)
        done = self.executor.run(self.work[phase], self.update, is_last=self.update + 1 >= self.steps)
        with recorder.action(COPIES) if recorder and self.mirror.links else contextlib.nullcontext():
            self.mirror.after(self.update + 1)
        if self.world.pipeline_size == 1:
            done.control = self._decide()
        self.update += 1
        seconds, idle_seconds = time.perf_counter() - started, self.waited_seconds - waited
        if self._stop_requested and self.world.pipeline_rank > 0:
            self.world.store.set(STOP_KEY, "")
        own: list[Report] = [self._report(index, done, seconds, idle_seconds) for index in self.local]
        reports = gather_reports(self.world, [*own, *([self._trace(recorder, seconds)] if recorder else [])])
        self._stop_when_skipping(reports, done)
        return UpdateResult(self.update, done.control, reports)

    def eval_batch(self, name: str) -> list[Report]:
        """Sums of the losses of every local head over all windows of the validation set `name`.

        Every process calls this at the same update; replica i takes each i-th micro-batch. No pipeline rank waits for
        the ones after it. Where gradients are delayed, the update before must have been asked for it by `request`.

        Raises TrainingError where it was not.
        """
        if not self.executor.between_updates:
            raise TrainingError(
                "the next update has begun, because gradients are delayed: ask for an evaluation with "
                "engine.request(Control.EVALUATE) before the update that it is to follow"
            )
        sums = {index: 0.0 for index in self.local}
        label_tokens = 0
        for stage in self.local.values():
            stage.train(False)
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
                    hidden_states, _, loss_sum, _, _ = stage.forward(inputs, labels, 1.0)
                    if loss_sum is not None:
                        sums[stage_index] += loss_sum.item()
                    inputs = self.executor.handed_over(stage_index, hidden_states)
                if self.neighbours.above is not None:
                    self.neighbours.above.send(Header(Kind.EVALUATE, self.update, index), inputs)
        for stage in self.local.values():
            stage.train(True)
        return gather_reports(
            self.world,
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
            ],
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
            description = checkpoint.describe(stage.plan, len(self.stages), self.update, position)
            stage.save(folder, description, self.mirror.pending(index, self.update))

    def load_checkpoint(self, run: str | Path, update: int | None = None) -> int:
        """Continue from a complete checkpoint of `run`, the newest one unless `update` says which.

        Returns its number of updates. Raises RunError when there is none, or a file of it is damaged or would execute
        code when read, DataError when its place in the data is none of this stream's.
        """
        assert self.executor.between_updates, "a run that is under way with delayed gradients is not turned back"
        update = checkpoint.latest(run) if update is None else update
        self.mirror.close(self.update)
        for index, stage in self.local.items():
            folder = checkpoint.stage_folder(run, update, index)
            assert self.stream.index(checkpoint.read_state(folder)["position"]) == update * self.micro_batches
            stage.load(folder)
            self.mirror.resume(index, update, checkpoint.read_others(folder))
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
        self.mirror.close(self.update)
        self.neighbours.flush()
        self.world.wait_for_the_end()
        reports = gather_reports(self.world, []) if self.world.global_rank == 0 else []
        self.neighbours = self.executor.neighbours = Neighbours()  # what holds groups lets them go
        self.mirror.links.clear()
        self.work = []
        leave(self.world)
        return reports

    # ------------------------------------------------------------------------------------------ reports

    @property
    def waited_seconds(self) -> float:
        groups = {id(group): group for work in self.work for group in work.clip_groups.values()}
        return (
            self.neighbours.waited_seconds
            + self.mirror.waited_seconds
            + sum(group.waited_seconds for group in groups.values())
        )

    def _report(self, index: int, done: Update, seconds: float, idle_seconds: float) -> StageReport:
        plan, outcome = self.local[index].plan, done.outcomes.get(index)
        label_tokens = self.head_losses[index].label_tokens if plan.has_head else self.label_tokens
        return StageReport(
            update=self.update,
            stage=index,
            data_rank=self.world.data_rank,
            loss_sum=sum(loss.item() for loss in done.loss_sums[index]) if plan.has_head else None,
            label_tokens=label_tokens // self.world.data_size,
            grad_norm=outcome.grad_norm if outcome else None,
            skipped=outcome.skipped if outcome else False,
            learning_rate=outcome.learning_rate if outcome else 0.0,
            seconds=seconds,
            idle_seconds=idle_seconds,
            peak_memory_bytes=peak_memory_bytes(self.world.device),
        )

    def _recorder_of(self, first: int, last: int) -> Recorder:
        """What records the updates `first` to `last`, counted from 1."""
        recorder = Recorder(first, last, lambda: self.waited_seconds)
        for stage in self.local.values():
            if isinstance(stage, TrainedStage) and stage.plan.has_head:
                recorder.watch_head(stage.engine.module.head)
        return recorder

    def _trace(self, recorder: Recorder, seconds: float) -> TraceReport:
        plans = [stage.plan for stage in self.local.values()]
        return TraceReport(
            update=self.update,
            pipeline_rank=self.world.pipeline_rank,
            data_rank=self.world.data_rank,
            device=self.world.device.type,
            stages=[[plan.index, plan.first_block, plan.last_block] for plan in plans],
            micro_batches=self.executor.rounds,
            start=recorder.started,
            seconds=seconds,
            actions=recorder.actions,
        )

    def _stop_when_skipping(self, reports: list[Report], done: Update) -> None:
        for index, stage in self.local.items():
            if stage.skipped_in_a_row >= self.max_skipped_updates:
                losses = [loss.item() for loss in done.loss_sums[index]]
                bad = [self.executor.index(i) for i, loss in enumerate(losses) if not math.isfinite(loss)]
                what = f"the loss of micro-batches {bad} is not finite" if bad else "its gradient is not finite"
                raise TrainingError(
                    f"stage {index} (blocks {stage.plan.first_block}-{stage.plan.last_block}) skipped "
                    f"{stage.skipped_in_a_row} updates in a row; at update {self.update} {what}. Start "
                    f"again with a lower train.learning_rate or more train.warmup_steps, or look at these windows",
                    reports,
                )
