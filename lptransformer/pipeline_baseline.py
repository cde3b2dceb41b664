"""The baseline: the same run by DeepSpeed's own PipelineEngine, for `engine: deepspeed_pipeline`.

Backprop through all blocks as 1F1B, over the same stages (so the same initial weights and cuts), micro-batches, loss,
optimizer and learning rates as `objective.name: backprop` of the engine beside it. It has that engine's face, and its
run folders and checkpoints. What is DeepSpeed's own: one torch.distributed world for all pipeline ranks, the schedule,
messages, the reduction of gradients, clipping (over the whole model) and ZeRO 0 or 1. In fp32 at ZeRO 0 it skips no
update: a gradient that is not finite spoils the weights. There it tells no gradient norm either, unless it clips.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lptransformer import checkpoint, run_folder
from lptransformer.channel import Control
from lptransformer.deepspeed_stage import read_safely
from lptransformer.errors import RunError, TrainingError
from lptransformer.face import Report, Stream, UpdateResult, ValidSet, gather_reports
from lptransformer.metrics import EvaluationReport, StageReport
from lptransformer.partition import StagePlan
from lptransformer.processes import peak_memory_bytes
from lptransformer.stage import Stage
from lptransformer.token_set import Batch, whole_rounds
from lptransformer.world import World, leave

FLAGS = (Control.EVALUATE, Control.SAVE, Control.STOP)
Built = tuple[Stage, torch.optim.Optimizer, LRScheduler]


class PipelineBaseline:
    """One stage of a model on every pipeline rank, trained by a PipelineEngine. Built by lptransformer.initialize.

    See LocalUpdateEngine for what the calls mean; here every one of them is a collective of all processes.
    """

    def __init__(
        self,
        world: World,
        stages: Sequence[StagePlan],
        build: Callable[[StagePlan], Built],
        deepspeed_config: Mapping[str, Any],
        stream: Stream,
        valid: Mapping[str, ValidSet],
        *,
        grad_clip: float,
        micro_batch_size: int,
        sequence_length: int,
        micro_batches_per_update: int,
        max_skipped_updates: int,
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
        # Every window is full in training, and its last position has no label.
        self.label_tokens = self.micro_batches * micro_batch_size * (sequence_length - 1)
        assert [plan.pipeline_rank for plan in stages] == list(range(world.pipeline_size)), stages
        self.plan = stages[world.pipeline_rank]
        self.stage, self.optimizer, self.lr_scheduler = build(self.plan)
        for parameter in self.stage.parameters():
            # At ZeRO 0 DeepSpeed takes the norm over pipeline rank 0 and over what bears this mark.
            parameter.model_parallel = True  # type: ignore[attr-defined]
        config = {
            **deepspeed_config,
            "gradient_accumulation_steps": micro_batches_per_update // world.data_size,
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
        self._loss_sums: list[Tensor] = []
        self._grad_norm: float | None = None
        self._rounds: dict[str, tuple[int, int]] = {}  # of a validation set: micro-batches and labels of this replica
        self._requested = Control.NOTHING
        self._stop_requested = False

    # ------------------------------------------------------------------------------------------ the four calls

    def train_batch(self) -> UpdateResult:
        """One update of the whole model.

        Raises TrainingError when too many updates in a row were skipped or had a loss that is not finite, or another
        process has gone.
        """
        started, waited = time.perf_counter(), self._waited_seconds
        self._loss_sums = []
        learning_rate = self.optimizer.param_groups[0]["lr"]
        first = self.update * self.micro_batches
        own = range(first + self.world.data_rank, first + self.micro_batches, self.world.data_size)
        with _lost_processes_in_our_words():
            mean_loss = self.engine.train_batch(_pairs(map(self.stream.batch, own))).item()
            control = self._timed(self._decide)()
        self.lr_scheduler.step()
        self.update += 1
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        if self.engine.zero_optimization_stage() > 0:
            self._grad_norm = float("nan") if skipped else float(self.engine.get_global_grad_norm())
        report = StageReport(
            update=self.update,
            stage=self.plan.index,
            data_rank=self.world.data_rank,
            loss_sum=sum(loss.item() for loss in self._loss_sums) if self.plan.has_head else None,
            label_tokens=self.label_tokens // self.world.data_size,
            grad_norm=self._grad_norm,
            skipped=skipped,
            learning_rate=learning_rate,
            seconds=time.perf_counter() - started,
            idle_seconds=self._waited_seconds - waited if self.world.device.type == "cpu" else math.nan,
            peak_memory_bytes=peak_memory_bytes(self.world.device),
        )
        reports = gather_reports(self.world, [report])
        self.skipped_in_a_row = 0 if math.isfinite(mean_loss) and not skipped else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= self.max_skipped_updates:
            raise TrainingError(
                f"{self.skipped_in_a_row} updates in a row were skipped, or had a loss that is not finite; the last "
                f"one was update {self.update}. Start again with a lower train.learning_rate or more "
                "train.warmup_steps, or look at these windows",
                reports,
            )
        return UpdateResult(self.update, control, reports)

    def eval_batch(self, name: str) -> list[Report]:
        """The sum of the losses over all windows of the validation set `name`."""
        if name not in self._rounds:
            own = [batch.label_tokens for batch in self._own_batches(name)]
            self._rounds[name] = len(own), sum(own)
        micro_batches, label_tokens = self._rounds[name]
        self._loss_sums = []
        if micro_batches > 0:
            with _lost_processes_in_our_words():
                batches = _pairs(self._own_batches(name))
                self.engine.eval_batch(batches, bcast_loss=False, num_micro_batches=micro_batches)
        nll_sum = sum(loss.item() for loss in self._loss_sums) if self.plan.has_head else None
        return gather_reports(
            self.world,
            [EvaluationReport(self.update, name, self.plan.index, self.world.data_rank, nll_sum, label_tokens)],
        )

    def save_checkpoint(self, run: str | Path) -> None:
        """Write all stages below the run folder `run`. A folder that is no run folder yet becomes one.

        DeepSpeed's own files are beside those of the stages: it reads them from one folder, which all processes see.
        """
        if self.world.global_rank == 0 and self.describe_run is not None and not run_folder.holds_run(Path(run)):
            self.describe_run(Path(run), False)
        folder = checkpoint.stage_folder(run, self.update, self.plan.index)
        position = self.stream.position(self.update * self.micro_batches)
        state = {
            **checkpoint.describe(self.plan, len(self.stages), self.update, position),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
        }
        first_replica = self.world.data_rank == 0
        with _lost_processes_in_our_words():
            if first_replica:
                checkpoint.begin_stage(folder)
            if self.world.global_rank == 0:
                shutil.rmtree(folder.parent / checkpoint.DEEPSPEED, ignore_errors=True)
            dist.barrier()
            self.engine.save_checkpoint(str(folder.parent / checkpoint.DEEPSPEED), tag="state", save_latest=False)
            if first_replica:
                weights = {name: weight.detach().cpu() for name, weight in self.stage.named_parameters()}
                checkpoint.write_stage(folder, weights, state)
            dist.barrier()
        if first_replica:
            checkpoint.finish_stage(folder)

    def load_checkpoint(self, run: str | Path, update: int | None = None) -> int:
        """Continue from a complete checkpoint of `run` that a baseline of the same shape has written.

        Raises RunError when there is none, another engine has written it, or a file is damaged or would execute code
        when read.
        """
        update = checkpoint.latest(run) if update is None else update
        folder = checkpoint.stage_folder(run, update, self.plan.index)
        state = checkpoint.read_state(folder)
        assert self.stream.index(state["position"]) == update * self.micro_batches
        if not (folder.parent / checkpoint.DEEPSPEED).is_dir():
            raise RunError(
                f"{folder.parent} was not written by engine: deepspeed_pipeline, which can only resume its own"
            )
        self.engine.load_checkpoint(str(folder.parent / checkpoint.DEEPSPEED), tag="state")
        self.skipped_in_a_row = state["skipped_in_a_row"]
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        for group, learning_rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        self.update = update
        return update

    # ------------------------------------------------------------------------------------------ control

    def request(self, control: Control, urgent: bool = False) -> None:
        """Ask for something to follow the update under way. Pipeline rank 0 decides for all, elsewhere this is ignored.

        An urgent request means save and stop. It counts on every process, and may be made in a signal handler.
        """
        if urgent:
            self._stop_requested = True
        elif self.world.pipeline_rank == 0:
            self._requested |= control

    def _decide(self) -> Control:
        """What follows this update: whatever any process was asked for."""
        asked, self._requested = self._requested, Control.NOTHING
        if self._stop_requested:
            asked |= Control.SAVE | Control.STOP
        flags = torch.tensor([int(bool(asked & flag)) for flag in FLAGS], device=self.world.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        decided = Control.NOTHING
        for flag, is_set in zip(FLAGS, flags.tolist(), strict=True):
            decided |= flag if is_set else Control.NOTHING
        return decided

    def close(self) -> list[Report]:
        """Leave the run, when every process has come to its end; returns the last reports on global rank 0."""
        self.world.wait_for_the_end()
        reports = gather_reports(self.world, []) if self.world.global_rank == 0 else []
        leave(self.world)
        return reports

    # ------------------------------------------------------------------------------------------ parts

    def _loss(self, hidden_states: Tensor, labels: Tensor) -> Tensor:
        """hidden_states [b, T, H] of the last block and labels [b, T] to the loss of a micro-batch.

        DeepSpeed averages over the micro-batches and over the replicas: the mean has to be the one over tokens.
        """
        assert self.stage.head is not None
        loss, loss_sum = self.stage.head(hidden_states, labels, self.micro_batches / self.label_tokens)
        self._loss_sums.append(loss_sum)
        return loss

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

    def _own_batches(self, name: str) -> Iterator[Batch]:
        rounds = whole_rounds(self.valid[name].batches(self.micro_batch_size), self.world.data_size)
        return islice(rounds, self.world.data_rank, None, self.world.data_size)


class _Layer(nn.Module):
    """What PipelineModule calls: inputs to hidden states. The head is in the stage, and its loss is the loss_fn."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, inputs: Tensor) -> Tensor:
        return self.stage.hidden_states(inputs)


def _pairs(batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    return ((batch.input_ids, batch.labels) for batch in batches)


@contextlib.contextmanager
def _lost_processes_in_our_words() -> Iterator[None]:
    """gloo's errors are plain RuntimeErrors, among those that the model itself may raise."""
    try:
        yield
    except RuntimeError as error:
        if "gloo" not in str(error):
            raise
        raise TrainingError(f"another process of this run has gone: {str(error).splitlines()[0]}") from error
