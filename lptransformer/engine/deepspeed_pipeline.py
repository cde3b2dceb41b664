"""The baseline: the same run by DeepSpeed's own PipelineEngine, for `engine: deepspeed_pipeline`.

Backprop through all blocks as 1F1B, over the same stages (so the same initial weights and cuts), micro-batches, loss,
optimizer and learning rates as `objective.name: backprop` of the engine beside it. It has that engine's interface, and
its run folders and checkpoints. What is DeepSpeed's own: one torch.distributed world for all pipeline ranks, the
schedule, messages, the reduction of gradients, clipping (over the whole model) and ZeRO 0 or 1. In fp32 at ZeRO 0 it
skips no update: a gradient that is not finite spoils the weights. There it reports no gradient norm either, unless it
clips.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lptransformer import files
from lptransformer.data.token_set import Batch
from lptransformer.engine.deepspeed_stage import read_safely
from lptransformer.engine.interface import (
    EngineOptions,
    Report,
    Stream,
    TrainingEngine,
    UpdateResult,
    ValidSet,
)
from lptransformer.engine.optimizer import as_configured
from lptransformer.engine.p2p import Control
from lptransformer.engine.process_groups import World
from lptransformer.engine.saving import Save
from lptransformer.errors import LostProcessError, RunError, TrainingError
from lptransformer.methods.stages import StagePlan
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import CROSS_ENTROPY, LossBatch
from lptransformer.models.stage import Stage
from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.saved_stage import DEEPSPEED, SavedStage, StageContent
from lptransformer.store import STOP_KEY

EVALUATED_AT_ONCE = 8  # micro-batches: between them a stop is seen
FLAGS = (Control.EVALUATE, Control.SAVE, Control.STOP)
Built = tuple[Stage, torch.optim.Optimizer, LRScheduler]


class PipelineBaseline(TrainingEngine):
    """One stage of a model on every pipeline rank, trained by a PipelineEngine. Built by lptransformer.initialize.

    Every call is a collective of all processes.
    """

    def __init__(
        self,
        world: World,
        blueprint: Blueprint,
        build: Callable[[StagePlan], Built],
        deepspeed_config: Mapping[str, Any],
        stream: Stream,
        valid: Mapping[str, ValidSet],
        options: EngineOptions,
        *,
        grad_clip: float,
    ) -> None:
        super().__init__(world, blueprint, stream, valid, options)
        stages = self.stages
        assert [plan.pipeline_rank for plan in stages] == list(range(world.pipeline_size)), stages
        self.plan = stages[world.pipeline_rank]
        self.stage, self.optimizer, self.lr_scheduler = build(self.plan)
        for parameter in self.stage.parameters():
            # At ZeRO 0 DeepSpeed takes the norm over pipeline rank 0 and over what bears this mark.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        config = {
            **deepspeed_config,
            "gradient_accumulation_steps": blueprint.rounds,
            "managed_gradient_accumulation": True,
            "gradient_clipping": grad_clip,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its layers
            module = PipelineModule(
                # One layer for every pipeline rank; those of other processes are never made.
                [_Layer(self.stage) if plan is self.plan else LayerSpec(nn.Identity) for plan in stages],
                num_stages=len(stages),
                loss_fn=self._loss,
                partition_method="uniform",
            )
            self.engine, *_ = deepspeed.initialize(
                model=module, optimizer=self.optimizer, config=config, dist_init_required=False
            )
        read_safely(self.engine)
        self.engine.clip_fp32_gradients = self._clip
        self._waited_seconds = 0.0
        for call in ("send", "recv", "broadcast", "all_reduce"):
            setattr(deepspeed.comm.comm.cdb, call, self._timed(getattr(deepspeed.comm.comm.cdb, call)))
        self.skipped_in_a_row = 0
        self._loss_sum = self._no_loss()
        self._grad_norm: float | None = None
        self._rounds: dict[str, tuple[int, int]] = {}  # of a validation set: micro-batches and labels of this replica

    # ------------------------------------------------------------------------------------------ the calls

    def train_batch(self) -> UpdateResult:
        """See TrainingEngine. At ZeRO 0 in fp32 losses that are not finite count as skipped."""
        if not self.label_tokens(self.update, 1.0):
            raise TrainingError(
                f"update {self.update + 1} has no label: engine=local skips it, DeepSpeed's pipeline cannot"
            )
        started, waited = time.perf_counter(), self._waited_seconds
        self._loss_sum = self._no_loss()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        first, many = self.update * self.blueprint.micro_batches, self.blueprint.micro_batches
        own = range(first + self.world.data_rank, first + many, self.world.data_size)
        with _translate_gloo_errors():
            mean_loss = self.engine.train_batch(_pairs(map(self.stream.batch, own))).item()
            control = self._timed(self._decide)()
        self.lr_scheduler.step()
        self.update += 1
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        if self.engine.zero_optimization_stage() > 0:
            self._grad_norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        report = self._stage_report(
            self.plan,
            loss_sum=self._loss_sum.item(),
            grad_norm=self._grad_norm,
            skipped=skipped,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - started,
            idle_seconds=self._waited_seconds - waited if self.world.device.type == "cpu" else math.nan,
        )
        reports = self._gather([report])
        self.skipped_in_a_row = 0 if math.isfinite(mean_loss) and not skipped else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.options.max_skipped_updates:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row were skipped, or had a loss that is not finite; the last "
                f"one was update {self.update}. Resume (--resume, maybe --step N) with a lower "
                "train.learning_rate, or look at these windows",
                reports,
            )
        return UpdateResult(self.update, control, reports)

    def eval_batch(self, name: str, advance: Callable[[int], None] = lambda done: None) -> list[Report]:
        if name not in self._rounds:
            own = [batch.label_tokens for _, batch in self._own_batches(name)]
            self._rounds[name] = len(own), sum(own)
        micro_batches, label_tokens = self._rounds[name]
        self._loss_sum = self._no_loss()
        batches = _pairs(batch for _, batch in self._own_batches(name))
        for first in range(0, micro_batches, EVALUATED_AT_ONCE):
            count = min(EVALUATED_AT_ONCE, micro_batches - first)
            with _translate_gloo_errors():
                asked = self._stop_requested or self.world.store.check([STOP_KEY])
                self.cut_short = any(self._on_any_process([asked]))
                if self.cut_short:
                    return self._gather([])
                self.engine.eval_batch(batches, bcast_loss=False, num_micro_batches=count)
            advance(count)
            self._gather_saves()
        return self._gather([self._evaluation_report(name, self.plan, self._loss_sum.item(), label_tokens)])

    def _begin_save(self, run: Path) -> Save:
        """Here and now: DeepSpeed's own files, which it reads in one folder that all processes see, are beside the
        stages'."""
        save = self._new_save(run)
        own = checkpoint.unfinished_folder(run, self.update, self.generation) / DEEPSPEED
        with _translate_gloo_errors():
            if self.world.global_rank == 0:
                shutil.rmtree(own, ignore_errors=True)
                files.make_folders(own.parent)
            dist.barrier()
            self.engine.save_checkpoint(str(own), tag="state", save_latest=False)
            dist.barrier()
        state = {**self._description(self.plan), "skipped_in_a_row": self.skipped_in_a_row}
        save.write(self.world.data_rank, [(self.plan.index, StageContent(state=state, weights=self._weights()[0]))])
        if self.world.global_rank == 0:
            save.add_folder(own)
        return save

    def _weights(self) -> list[dict[str, Tensor]]:
        return [{name: weight.detach().cpu() for name, weight in self.stage.named_parameters()}]

    def _load(self, run: Path, update: int) -> None:
        """Raises RunError where another engine has written the checkpoint."""
        folder = checkpoint.stage_folder(run, update, self.plan.index)
        saved = SavedStage(folder)
        if not saved.is_of_pipeline_engine:
            raise RunError(
                f"{folder.parent} was not written by engine: deepspeed_pipeline, which can only resume its own"
            )
        self._check_position(saved, update)
        with as_configured(self.optimizer, self.lr_scheduler, update):
            self.engine.load_checkpoint(str(folder.parent / DEEPSPEED), tag="state")
        if self.engine.zero_optimization_stage() > 0:
            self.engine.optimizer.clip_grad = self.engine.gradient_clipping()  # it takes that of the file
        self.skipped_in_a_row = saved.state["skipped_in_a_row"]

    def _decide(self) -> Control:
        """What follows this update: whatever was requested on any process."""
        requested = self._take_requests()
        if self.world.store.check([STOP_KEY]):
            requested |= Control.SAVE | Control.STOP
        decided = Control.NOTHING
        for flag, is_set in zip(FLAGS, self._on_any_process([bool(requested & flag) for flag in FLAGS]), strict=True):
            decided |= flag if is_set else Control.NOTHING
        return decided

    def _on_any_process(self, flags: Sequence[bool]) -> list[bool]:
        either = torch.tensor([int(flag) for flag in flags], device=self.world.device)
        dist.all_reduce(either, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in either.tolist()]

    # ------------------------------------------------------------------------------------------ parts

    @property
    def waited_seconds(self) -> float:
        """In DeepSpeed's communication between pipeline ranks, transfers included, because its calls block."""
        return self._waited_seconds

    def _no_loss(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self.world.device)

    def _loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """hidden_states [b, T, H] of the last block and labels [b, T] to the loss of a micro-batch.

        DeepSpeed averages over the micro-batches and over the replicas: the mean has to be the one over tokens.
        """
        assert self.stage.head is not None
        trains = torch.is_grad_enabled()  # in an evaluation the next update's rows may be none, or not there yet
        scale = self.blueprint.micro_batches / self.label_tokens(self.update, 1.0) if trains else 1.0
        term = self.stage.head(hidden_states, LossBatch(labels, scale))[CROSS_ENTROPY]
        self._loss_sum += term.total.detach()
        return term.loss

    def _clip(self) -> None:
        """DeepSpeed's clip_fp32_gradients, which forgets the norm."""
        norm = clip_grad_norm_(self.engine.module.parameters(), self.engine.gradient_clipping(), mpu=self.engine.mpu)
        self._grad_norm = norm.item()

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """One of DeepSpeed's communications: between pipeline ranks its time is idle time, the transfer included.

        Only gloo's calls return when they are done; on a GPU nothing is measured.
        """
        replicas = self.engine.grid.get_data_parallel_group()

        @functools.wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            done = call(*args, **kwargs)
            between_ranks = self.world.pipeline_size > 1 and not any(a is replicas for a in (*args, *kwargs.values()))
            if between_ranks:
                self._waited_seconds += time.perf_counter() - started
            return done

        return timed


class _Layer(nn.Module):
    """What PipelineModule calls: inputs to hidden states. The head is in the stage, and its loss is the loss_fn."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage.hidden_states(inputs)


def _pairs(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((batch.input_ids, batch.labels) for batch in batches)


@contextlib.contextmanager
def _translate_gloo_errors() -> Iterator[None]:
    """gloo's errors are plain RuntimeErrors, among those that the model itself may raise."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise LostProcessError(f"another process of this run has gone: {str(error).splitlines()[0]}") from error
