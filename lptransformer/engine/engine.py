"""The local-update engine: executes the actions of a schedule on the stages of one pipeline rank.

Its weights after an update depend only on the updates before, never on timing (the law of local updates,
docs/design.md), so a run over any number of processes equals the plain one-process loop.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lptransformer.console import megabytes
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.engine.executor import Executor, LocalStage, Update, plan_phases, to_host
from lptransformer.engine.interface import (
    EngineOptions,
    Report,
    Stream,
    TrainingEngine,
    UpdateResult,
    ValidSet,
    telling_of_wrong_data,
)
from lptransformer.engine.p2p import Control, Frame, Header, Kind, Neighbours, open_channels
from lptransformer.engine.process_groups import World, any_replica
from lptransformer.engine.saving import HostCopies, Save
from lptransformer.engine.weight_copies import WeightCopies
from lptransformer.errors import RunError, TrainingError
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.border_codec import make_codec
from lptransformer.models.head import LossBatch
from lptransformer.processes import host_memory
from lptransformer.run_folder import saved_stage
from lptransformer.run_folder.metrics import StageReport, TraceReport
from lptransformer.run_folder.saved_stage import Frozen, SavedStep, StageContent
from lptransformer.run_folder.trace import COPIES, Tracer
from lptransformer.store import STOP_KEY


class LocalUpdateEngine(TrainingEngine):
    """All stages of one pipeline rank, their channels, and the update loop. Built by lptransformer.initialize."""

    def __init__(
        self,
        world: World,
        blueprint: Blueprint,
        build: Callable[[StagePlan], LocalStage],
        stream: Stream,
        valid: Mapping[str, ValidSet],
        options: EngineOptions,
    ) -> None:
        super().__init__(world, blueprint, stream, valid, options)
        self.objective = blueprint.objective
        self.local = {plan.index: build(plan) for plan in self.stages if plan.pipeline_rank == world.pipeline_rank}
        bottom, top, phases, codecs = min(self.local), max(self.local), blueprint.phases, blueprint.codecs
        dtype: torch.dtype = getattr(torch, DTYPES[blueprint.dtype].name)
        self.neighbours = open_channels(
            world,
            Frame(blueprint.hidden_shape, dtype, world.device, options.channel),
            blueprint.in_flight,
            codec_below=make_codec(codecs.get(bottom - 1, "none")),
            codec_above=make_codec(codecs.get(top, "none")),
            gradients_below=max(len(plan.crossing(bottom)) for plan in phases),
            gradients_above=max(len(plan.crossing(top + 1)) for plan in phases),
        )
        self.executor = Executor(
            world, blueprint, self.local, self.neighbours, stream.batch, self.label_tokens, self._decide
        )
        self.work = plan_phases(world, blueprint, self.local)
        self.weight_copies = WeightCopies(
            world, self.stages, self.local, blueprint.copy_lags, blueprint.head.refresh_every
        )
        self._host_copies, self._in_foreground = HostCopies(world.device), False
        self._frozen: dict[tuple[Path, int], Frozen] = {}
        self._tracer = self._make_tracer(*options.trace) if options.trace else None

    # ------------------------------------------------------------------------------------------ the calls

    @telling_of_wrong_data
    def train_batch(self) -> UpdateResult:
        """See TrainingEngine. No stage waits for another's optimizer."""
        started, clock = time.perf_counter(), self.world.clock
        clock.begin()
        tracer = self._tracer if self._tracer and self._tracer.wants(self.update + 1) else None
        if tracer:
            tracer.begin(started)
        self.executor.tracer = tracer
        steps = self.blueprint.steps
        works = [self.work[self.objective.phase_at(update, steps)] for update in (self.update, self.update + 1)]
        with tracer.action(COPIES) if tracer and self.weight_copies.routes else contextlib.nullcontext():
            self.weight_copies.before(self.update)
        done = self.executor.run(works[0], self.update, works[1] if self.update + 1 < steps else None)
        with tracer.action(COPIES) if tracer and self.weight_copies.routes else contextlib.nullcontext():
            self.weight_copies.after(self.update + 1)
        if self.world.pipeline_size == 1:
            done.control = self._decide()
        self.update += 1
        if tracer:
            tracer.end()
        seconds, idle_seconds = time.perf_counter() - started, clock.end()
        if self._stop_requested and self.world.pipeline_rank > 0:
            self.world.store.set(STOP_KEY, "")
        own: list[Report] = [self._report(index, done, seconds, idle_seconds) for index in self.local]
        reports = self._gather([*own, *([self._trace(tracer, seconds)] if tracer else [])])
        self._stop_when_skipping(reports, done)
        return UpdateResult(self.update, done.control, reports)

    @telling_of_wrong_data
    @torch.no_grad()
    def eval_batch(self, name: str, advance: Callable[[int], None] = lambda done: None) -> list[Report]:
        """See TrainingEngine. No pipeline rank waits for the ones after it.

        Where gradients are delayed, `request` must have asked for it before the update that it follows. Raises
        TrainingError where it has not.
        """
        self._check_between_updates("for an evaluation")
        # Summed as they come: scalars that are kept would lie between large tensors that are freed, whose memory then
        # serves nothing as large again.
        found = {index: torch.zeros((), dtype=torch.float64, device=self.world.device) for index in self.local}
        label_tokens, control = 0, Control.NOTHING
        for stage in self.local.values():
            stage.train(False)
        for index, batch in self._own_batches(name):
            label_tokens += batch.label_tokens
            here = batch.to(self.world.device)
            if self.neighbours.below is None:
                inputs = here.input_ids
                stop = self._stop_requested or self.world.store.check([STOP_KEY])
                control = Control.STOP if any_replica([stop], self.world)[0] else Control.NOTHING
            else:
                header, inputs = self.neighbours.below.receive()
                assert (header.kind, header.update, header.micro_batch) == (Kind.EVALUATE, self.update, index)
                control = header.control
            loss_batch = LossBatch(here.labels, 1.0, position_ids=here.position_ids, document_ids=here.document_ids)
            for stage_index, stage in self.local.items():
                output = stage.forward(inputs, loss_batch)
                if output.nll_sum is not None:
                    found[stage_index] += output.nll_sum
                inputs = self.executor.handed_over(stage_index, output.hidden_states)
            if self.neighbours.above is not None:
                self.neighbours.above.send(Header(Kind.EVALUATE, self.update, index, control), inputs)
            advance(1)
            self._gather_saves()
            if control & Control.STOP:  # nobody takes another micro-batch, and half a set is no result
                break
        for stage in self.local.values():
            stage.train(True)
        self.cut_short = bool(control & Control.STOP)
        if self.cut_short:
            return self._gather([])
        sums = dict(zip(found, (nll_sum.item() for nll_sum in to_host([*found.values()])), strict=True))
        plans = {index: stage.plan for index, stage in self.local.items()}
        return self._gather(
            [self._evaluation_report(name, plans[index], nll_sum, label_tokens) for index, nll_sum in sums.items()],
        )

    def _check_between_updates(self, what: str) -> None:
        if not self.executor.between_updates:
            raise TrainingError(
                f"the next update has begun, because gradients are delayed: {what} ask with "
                "engine.request(Control.EVALUATE) before the update that it is to follow"
            )

    def _begin_save(self, run: Path) -> Save:
        """No stage waits for another."""
        save = self._new_save(run)
        contents = [(index, self._content(run, index)) for index in self.local]
        needed = sum(content.changing_bytes for _, content in contents) - self._host_copies.num_bytes
        if needed > host_memory():
            if not self._in_foreground:
                self.on_problem(f"the copies of a save, {megabytes(needed)}, do not fit: training waits for it")
            self._in_foreground = True
            save.write(self.world.data_rank, ((i, self._host_copies.of(i, one, keep=False)) for i, one in contents))
        else:
            copies = [(index, self._host_copies.of(index, one, keep=True)) for index, one in contents]
            save.begin(self.world.data_rank, copies, self._host_copies.made())
        return save

    def _content(self, run: Path, index: int) -> StageContent:
        stage, copies = self.local[index], self.weight_copies
        description = self._description(stage.plan) | {"copies_in_use": copies.in_use(index)}
        content = stage.content(description, copies.pending(index, self.update))
        if (run, index) not in self._frozen:
            self._frozen[run, index] = stage.frozen()
        content.frozen = self._frozen[run, index]
        return content

    def _weights(self) -> list[dict[str, Tensor]]:
        return [stage.weights() for stage in self.local.values()]

    def _load(self, run: Path, update: int) -> None:
        self._check_between_updates("to load a checkpoint")
        self.weight_copies.close(self.update)
        self._frozen.clear()
        step = SavedStep(run, update)
        for index, stage in self.local.items():
            saved = step.seen_by(stage.plan)
            if saved.parts[0].is_of_pipeline_engine:
                raise RunError(f"{step.folder} was written by engine: deepspeed_pipeline, which alone can resume it")
            self._check_position(saved.parts[0], update)
            if saved.head is not None:
                saved_stage.check_head(saved.head, self.blueprint.head.model_dump())
            stage.load(saved)
            if saved.older is not None:
                self.weight_copies.resume_older(index, update, saved_stage.read_others(saved.older.folder))
            elif saved.head is not None:
                self.weight_copies.resume(index, update, saved.head.state["copies_in_use"], saved.head.copies())
            elif stage.copies:  # a new head
                stage.begin_copies({one.target: step.weight(one.source_block, one.source) for one in stage.copies})
                self.weight_copies.begin(index, update)

    # ------------------------------------------------------------------------------------------ control

    def _decide(self) -> Control:
        """On pipeline rank 0, once per update: what follows it. Its replicas agree first."""
        requested = self._take_requests()
        if self.world.store.check([STOP_KEY]):
            requested |= Control.SAVE | Control.STOP
        flags = (Control.EVALUATE, Control.SAVE, Control.STOP)
        agreed = any_replica([bool(requested & flag) for flag in flags], self.world)
        return Control(sum(flag for flag, is_set in zip(flags, agreed, strict=True) if is_set))

    def _finish(self) -> None:
        self.weight_copies.close(self.update)
        self.neighbours.flush()

    def _release(self) -> None:
        self.neighbours = self.executor.neighbours = Neighbours()
        self.weight_copies.routes.clear()
        self.work = []
        for stage in self.local.values():
            stage.release()

    # ------------------------------------------------------------------------------------------ reports

    @property
    def waited_seconds(self) -> float:
        return self.world.clock.waited_seconds

    def _report(self, index: int, done: Update, seconds: float, idle_seconds: float) -> StageReport:
        step = done.step_results.get(index)
        return self._stage_report(
            self.local[index].plan,
            loss_sum=sum(done.losses(index)),
            grad_norm=float(step.grad_norm) if step else None,
            skipped=step.skipped if step else False,
            learning_rate=step.learning_rate if step else 0.0,
            seconds=seconds,
            idle_seconds=idle_seconds,
        )

    def _make_tracer(self, first: int, last: int) -> Tracer:
        """What traces the updates `first` to `last`, counted from 1."""
        tracer = Tracer(first, last, self.world.clock)
        for stage in self.local.values():
            if isinstance(stage, TrainedStage) and stage.plan.has_head:
                tracer.watch_head(stage.engine.module.head)
        return tracer

    def _trace(self, tracer: Tracer, seconds: float) -> TraceReport:
        plans = [stage.plan for stage in self.local.values()]
        return TraceReport(
            update=self.update,
            pipeline_rank=self.world.pipeline_rank,
            data_rank=self.world.data_rank,
            device=self.world.device.type,
            stages=[[plan.index, plan.first_block, plan.last_block] for plan in plans],
            micro_batches=self.executor.rounds,
            start=tracer.started,
            seconds=seconds,
            actions=tracer.actions,
        )

    def _stop_when_skipping(self, reports: list[Report], done: Update) -> None:
        for index, stage in self.local.items():
            if stage.skipped_in_a_row >= self.options.max_skipped_updates:
                bad = [self.executor.index(i) for i, loss in enumerate(done.losses(index)) if not math.isfinite(loss)]
                what = f"the loss of micro-batches {bad} is not finite" if bad else "its gradient is not finite"
                raise TrainingError(
                    f"stage {index} (blocks {stage.plan.first_block}-{stage.plan.last_block}) skipped "
                    f"{stage.skipped_in_a_row} updates in a row; at update {self.update} {what}. Resume "
                    f"(--resume, maybe --step N) with a lower train.learning_rate, or look at these windows",
                    reports,
                )
