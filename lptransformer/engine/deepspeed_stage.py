"""One stage under DeepSpeed: a DeepSpeedEngine with ZeRO over the replicas, and the update that belongs to it.

Clipping and skipping are per clip group (engine/clipping.py), learning rate and counters per stage. What each ZeRO
stage does:

    0        plain gradients; clipped here with torch's formula, before the optimizer's step
    1, 2, 3  optimizer state (and gradients, and weights) partitioned; clipped by DeepSpeed's own formula
    bf16     ZeRO 1 to 3 only: fp32 master weights; gradients are accumulated in fp32 at ZeRO 2 and 3 (in bf16 with
             `deepspeed.data_types.grad_accum_dtype: bf16`), in bf16 at ZeRO 1
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lptransformer.config.deepspeed_keys import FORCED, bucket_elements
from lptransformer.engine import optimizer_state
from lptransformer.engine.optimizer import Muon, as_configured
from lptransformer.engine.optimizer_state import BEFORE, TwoVersions
from lptransformer.errors import RunError
from lptransformer.models.adapters import saved_name
from lptransformer.models.head import Copy, LossBatch
from lptransformer.models.stage import Stage, StageOutput
from lptransformer.run_folder.saved_stage import (
    DEEPSPEED,
    FP32,
    SECOND_NAMES,
    Frozen,
    Pieces,
    SavedFor,
    StageContent,
    read_others,
)


def deepspeed_config(
    user: dict[str, Any], *, micro_batch_size: int, zero_stage: int, bf16: bool, grad_clip: float
) -> dict[str, Any]:
    """The DeepSpeed configuration of a stage: the user's section and what the engine decides.

    Every call of `step()` is an update: our schedule owns the accumulation boundary. The loss is scaled by us.
    """
    zero = {**user.get("zero_optimization", {}), "stage": zero_stage, "memory_efficient_linear": False}
    config: dict[str, Any] = {
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # waits for the GPU in every forward, and for posted receives
        "zero_allow_untested_optimizer": True,
        FORCED: False,
        **user,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": grad_clip if zero_stage > 0 else 0.0,
        "zero_optimization": zero,
    }
    if bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero_stage > 1:
            config["data_types"] = {"grad_accum_dtype": "fp32", **user.get("data_types", {})}
    return config


def _with_bucket(config: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """Where the user does not say how large the bucket for reducing gradients is, it is no larger than all of them."""
    bucket = bucket_elements(sum(parameter.numel() for parameter in parameters))
    return {**config, "zero_optimization": {"reduce_bucket_size": bucket, **config["zero_optimization"]}}


def _mark_infinite(norm: Tensor, device: Any = None, val: float = -1.0) -> None:
    """In place of mask_nan_or_inf_with_val_inplace, which brings the value to a GPU by a copy that is waited for."""
    norm.masked_fill_(norm.isfinite().logical_not(), val)


stage_1_and_2.mask_nan_or_inf_with_val_inplace = _mark_infinite


class SafeCheckpointEngine(TorchCheckpointEngine):
    """Reads DeepSpeed's files, which are pickles, without executing what they say.

    DeepSpeed itself reads with `weights_only=False`: anyone who can write into a checkpoint's folder then decides
    what the next `--resume` runs. Here tensors, plain values and the classes that ZeRO saves are read, nothing else.
    """

    CLASSES = (fragment_address, LossScaler, ZeroStageEnum)

    def load(self, path: str, map_location: Any = None) -> Any:
        """Raises RunError when the file holds anything else, or is damaged."""
        try:
            with torch.serialization.safe_globals([*self.CLASSES]):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL (\S+)", str(error))
            what = f" ({named[1]})" if named else ""
            raise RunError(
                f"{path} is refused: it is damaged, or holds more than tensors and plain values{what}, which could "
                "execute code when it is read: choose another checkpoint"
            ) from None
        except Exception as error:  # no archive of torch's, or one cut short: errors of many types
            what = f"{type(error).__name__} {error}".splitlines()[0]
            raise RunError(f"{path} cannot be read ({what}): choose another checkpoint") from None


def read_safely(engine: deepspeed.DeepSpeedEngine) -> None:
    """From now on the engine, or PipelineEngine, reads checkpoints without executing anything.

    Only the universal checkpoint, which no key of ours turns on, has readers that do not ask `checkpoint_engine`.
    """
    assert type(engine.checkpoint_engine) is TorchCheckpointEngine, "deepspeed_keys refuses what chooses another"
    engine.checkpoint_engine = SafeCheckpointEngine(engine._config)


@dataclass(frozen=True)
class StepResult:
    """What an update did. The norm is before clipping, over the clip group; not finite when the update was skipped.
    At ZeRO 3 it may be on the device."""

    grad_norm: float | Tensor
    skipped: bool
    learning_rate: float


class TrainedStage:
    """A stage, its DeepSpeedEngine, its learning-rate schedule and its counters."""

    def __init__(
        self,
        stage: Stage,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: LRScheduler,
        config: dict[str, Any],
        grad_clip: float,
        delayed: bool = False,
    ) -> None:
        self.plan = stage.plan
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.grad_clip = grad_clip
        self.skipped_in_a_row = 0
        self._norm = torch.zeros(())  # what this update is clipped by
        # Those that train; to walk the modules takes time in every update.
        self._names = {saved_name(name): one for name, one in stage.named_parameters() if one.requires_grad}
        self.parameters = list(self._names.values())
        self.engine, *_ = deepspeed.initialize(
            model=stage, optimizer=optimizer, config=_with_bucket(config, self.parameters), dist_init_required=False
        )
        read_safely(self.engine)
        self.zero_stage: int = self.engine.zero_optimization_stage()
        self.versions = TwoVersions(self.parameters, self.engine) if delayed else None
        if isinstance(optimizer, Muon):
            optimizer.partition(optimizer_state.owned(self.engine, self._names))
        if self.zero_stage == 0:
            optimizer.register_step_pre_hook(self._clip_or_skip)
        elif self.zero_stage < 3:
            # In bf16 DeepSpeed looks for infinities first, stage by stage, and takes no norm where it finds one; other
            # stages that clip by the same norm would wait for it. The norm finds the same infinities, on all alike.
            self._own_norm = self.engine.optimizer.scaled_global_norm
            self.engine.optimizer.check_overflow = lambda partition_gradients=True: None
            self.engine.optimizer.scaled_global_norm = lambda norm_type=2: self._norm

    def forward(self, inputs: Tensor, batch: LossBatch, split: bool = False) -> StageOutput:
        """See Stage.forward. Not `engine.module(...)`: at ZeRO 3 that goes wrong silently."""
        return self.engine(inputs, batch, split)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def gradient_norms(self) -> Tensor:
        """The norms that the norm of a clip group is made of, after averaging the gradients over the replicas.

        Of every parameter at ZeRO 0, of the whole stage at ZeRO 1 and 2. Not at ZeRO 3, where update() takes the norm
        of the stage alone.
        """
        assert self.zero_stage < 3
        if self.zero_stage == 2:
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
            return self._own_norm().float().reshape(1)
        if self.zero_stage == 1 or dist.get_world_size() > 1:  # at ZeRO 0 one replica has nothing to average
            self.engine._running_engine_step = True  # what makes this the boundary of accumulation
            self.engine.allreduce_gradients()
            self.engine._running_engine_step = False
        if self.zero_stage == 1:
            return self._own_norm().float().reshape(1)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])

    def update(self, norm: Tensor | None) -> StepResult:
        """Clip, step, next learning rate; a gradient that is not finite leaves weights and optimizer state alone.

        `norm` is that of the clip group, on the host, from the gradient_norms() of its stages; None at ZeRO 3. A
        skipped update still advances the step and the learning rate.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        if norm is None:
            self.engine.step()
        else:
            self._norm = norm
            with self._reduced(), self.versions.updating() if self.versions else contextlib.nullcontext():
                self.engine.step()
        self.lr_scheduler.step()
        grad_norm: float | Tensor
        if norm is not None and self.zero_stage == 0:
            grad_norm = norm.item()
            skipped = not math.isfinite(grad_norm)
        else:
            skipped = bool(self.engine.optimizer.overflow)
            grad_norm = float("nan") if skipped else self.engine.optimizer._global_grad_norm
            if skipped and self.zero_stage < 3:  # offloading, DeepSpeed would add the next ones to these
                self.engine.optimizer.averaged_gradients.clear()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        return StepResult(grad_norm, skipped, learning_rate)

    @contextlib.contextmanager
    def _reduced(self) -> Iterator[None]:
        """In here the engine's step does not average gradients again: gradient_norms() has done it."""
        owner, name = self.engine, "allreduce_gradients"
        if self.zero_stage == 2:
            owner, name = self.engine.optimizer, "finalize_gradient_accumulation_boundary"
        setattr(owner, name, lambda *args: None)
        yield
        delattr(owner, name)

    def _clip_or_skip(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """ZeRO 0: between the all-reduce of the gradients and the optimizer's step. No gradient, no step."""
        parameters = [p for p in self.parameters if p.grad is not None]
        if not bool(torch.isfinite(self._norm)):
            for parameter in parameters:
                parameter.grad = None
        elif self.grad_clip > 0:
            # torch's formula (clip_grads_with_norm_), by a number of the host: a tensor would have to be copied there.
            factor = (self.grad_clip / (self._norm + 1e-6)).item()
            if factor < 1.0:
                torch._foreach_mul_([p.grad for p in parameters if p.grad is not None], factor)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.engine.train(mode)

    def release(self) -> None:
        """After the last update: hooks of DeepSpeed on the weights would keep them, and the process groups, alive."""
        self.engine.destroy()

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What its head holds of other stages' weights."""
        head = self.engine.module.head
        return head.copies if head is not None else ()

    def refresh(self, received: Mapping[str, Tensor]) -> None:
        """New values for the head's copies."""
        self.engine.module.head.refresh(received)

    def begin_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """First values for the copies of a head that is new."""
        self.engine.module.head.begin_copies(tensors)

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some weights and copies, as they are now, by name; at ZeRO 3 all replicas call this together."""
        module = self.engine.module
        wanted = [parameter for name, parameter in module.named_parameters() if name in names]
        gathered = deepspeed.zero.GatheredParameters(wanted) if self.zero_stage == 3 else contextlib.nullcontext()
        with gathered:
            return {name: t.detach().clone() for name, t in module.state_dict(keep_vars=True).items() if name in names}

    def weights(self) -> dict[str, Tensor]:
        """All tensors under their names in a checkpoint, on the CPU; at ZeRO 3 all replicas call this together."""
        found = self.tensors(self.engine.module.state_dict().keys())
        return {saved_name(name): tensor.cpu() for name, tensor in found.items()}

    def frozen(self) -> Frozen:
        """Its weights that never change; at ZeRO 3 all replicas call this together."""
        names = _frozen_names(self.engine.module) - _second_names(self.engine.module).keys()
        return Frozen(_saved(self.tensors(names) if self.zero_stage == 3 else _detached(self.engine.module, names)))

    def content(self, description: dict[str, Any], copies: Mapping[str, Tensor]) -> StageContent:
        """What this replica saves of the stage beside `frozen`, with the copies that are not in use yet: no collective.

        The tensors are those in use: whoever keeps them past the next update copies them.
        """
        first, module = dist.get_rank() == 0, self.engine.module
        pieces = Pieces(shapes={name: tuple(_shape(weight)) for name, weight in self._names.items()})
        owned = optimizer_state.owned(self.engine, self._names) if first or self.zero_stage else []
        pieces.steps |= optimizer_state.steps(self.optimizer, owned)
        for piece in owned:
            kinds = optimizer_state.tensors(self.optimizer, piece)
            if self.zero_stage == 3 or piece.flat.dtype != piece.parameter.dtype:
                kinds[FP32] = piece.of(piece.flat)
            if self.versions is not None:
                before = self.versions.before_of(piece.parameter).view(-1)
                kinds[BEFORE] = before[piece.start : piece.start + piece.numel]
            pieces.flat |= {f"{kind}/{piece.name}": tensor for kind, tensor in kinds.items()}
            pieces.start[piece.name] = piece.start
        if not first:
            return StageContent(pieces)
        there = set(module.state_dict(keep_vars=True)) - _frozen_names(module)
        whole = _saved(_detached(module, there))
        if self.zero_stage == 3:
            whole = {name: tensor for name, tensor in whole.items() if name not in self._names}
        state = {**description, "skipped_in_a_row": self.skipped_in_a_row, SECOND_NAMES: _second_names(module)}
        return StageContent(pieces, state, whole, dict(copies))

    def load(self, saved: SavedFor) -> None:
        """Continue from what any stages with its blocks saved, at any ZeRO stage and number of replicas; a head that
        was not there stays as it is. All replicas call this together.

        Raises RunError when a file is damaged, or would execute code when read.
        """
        with as_configured(self.optimizer, self.lr_scheduler, saved.parts[0].state["update"]):
            if (older := saved.older) is not None:
                self._load_older(older.folder)
            else:
                self._load_weights(saved)
                optimizer_state.load(self.optimizer, optimizer_state.owned(self.engine, self._names), saved)
        if self.versions is not None and not saved.older:
            before = {one: self._one_before(name, saved) for name, one in self._names.items()}
            self.versions.load({one: tensor for one, tensor in before.items() if tensor is not None})
        self.skipped_in_a_row = max(part.state["skipped_in_a_row"] for part in saved.parts)

    def _load_weights(self, saved: SavedFor) -> None:
        optimizer, module = self.engine.optimizer, self.engine.module
        held = module.state_dict(keep_vars=True)
        beside = {name: one for name, one in held.items() if saved_name(name) not in self._names}
        if self.zero_stage == 3:
            optimizer.checkpoint_event_prologue()
        for piece in optimizer_state.owned(self.engine, self._names) if self.zero_stage else []:
            if (part := saved.of(piece.name)) is not None:
                piece.of(piece.flat).copy_(part.exact(piece.name, piece.start, piece.numel))
        if self.zero_stage == 3:
            for group in range(len(optimizer.fp32_partitioned_groups_flat)):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
            optimizer.checkpoint_event_epilogue()
            frozen = [one for one in beside.values() if isinstance(one, nn.Parameter)]
            with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
                saved.fill(beside, saved_name)
            return
        saved.fill(held, saved_name)

    def _one_before(self, name: str, saved: SavedFor) -> Tensor | None:
        """A weight as it was one update before; as it is, where gradients were not delayed."""
        part = saved.of(name)
        if part is None:
            return None
        return part.part(BEFORE, name) if BEFORE in part.kinds(name) else part.exact(name)

    def _load_older(self, folder: Path) -> None:
        """From DeepSpeed's own files, at the same ZeRO stage and number of replicas."""
        self.engine.load_checkpoint(str(folder / DEEPSPEED), tag="state")
        if self.zero_stage > 0:
            self.engine.optimizer.clip_grad = self.grad_clip  # ZeRO 1 and 2 take that of the file
        if self.versions is not None:
            before = read_others(folder)
            self.versions.load({one: before[f"before.{number}"] for number, one in enumerate(self.parameters)})


def _shape(weight: nn.Parameter) -> torch.Size:
    return getattr(weight, "ds_shape", weight.shape)  # at ZeRO 3 the tensor itself is empty


def _frozen_names(stage: Stage) -> set[str]:
    """The tensors that never change."""
    weights = {name for name, one in stage.named_parameters(remove_duplicate=False) if not one.requires_grad}
    return weights | ({f"head.{name}" for name in stage.head.frozen} if stage.head is not None else set())


def _second_names(stage: Stage) -> dict[str, str]:
    """Of a tensor that has two names (`model.tie`), the second and the first; as in a checkpoint."""
    first: dict[int, str] = {}
    named = [(saved_name(name), one) for name, one in stage.state_dict(keep_vars=True).items()]
    return {name: first[id(one)] for name, one in named if first.setdefault(id(one), name) != name}


def _detached(stage: Stage, names: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a stage, each under its first name."""
    held, second = stage.state_dict(keep_vars=True), _second_names(stage)
    return {name: one.detach() for name, one in held.items() if name in names and name not in second}


def _saved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Under their names in a checkpoint."""
    return {saved_name(name): tensor for name, tensor in tensors.items()}


class FrozenStage:
    """A stage that stays as it was initialised: no DeepSpeedEngine, no optimizer. Gradients go through it by pulls."""

    skipped_in_a_row = 0

    def __init__(self, stage: Stage, dtype: torch.dtype, device: torch.device) -> None:
        self.plan = stage.plan
        for weight in stage.parameters():  # as DeepSpeed does it: buffers stay precise
            weight.data = weight.data.to(dtype)
        self.stage = stage.to(device)
        assert not any(weight.requires_grad for weight in stage.parameters())

    def forward(self, inputs: Tensor, batch: LossBatch, split: bool = False) -> StageOutput:
        with torch.set_grad_enabled(inputs.requires_grad):
            return self.stage(inputs, batch, split and inputs.requires_grad)

    def train(self, mode: bool) -> None:
        """Training or evaluation mode."""
        self.stage.train(mode)

    def release(self) -> None:
        """There is nothing to let go."""

    @property
    def copies(self) -> tuple[Copy, ...]:
        """What its head holds of other stages' weights."""
        return self.stage.head.copies if self.stage.head is not None else ()

    def refresh(self, received: Mapping[str, Tensor]) -> None:
        """New values for the head's copies."""
        assert self.stage.head is not None
        self.stage.head.refresh(received)

    def begin_copies(self, tensors: Mapping[str, Tensor]) -> None:
        """First values for the copies of a head that is new."""
        assert self.stage.head is not None
        self.stage.head.begin_copies(tensors)

    def tensors(self, names: Collection[str]) -> dict[str, Tensor]:
        return {name: t.detach().clone() for name, t in self.stage.state_dict().items() if name in names}

    def weights(self) -> dict[str, Tensor]:
        found = self.tensors(self.stage.state_dict().keys())
        return {saved_name(name): tensor.cpu() for name, tensor in found.items()}

    def frozen(self) -> Frozen:
        """As of TrainedStage: all but the copies in its head."""
        return Frozen(
            _saved(_detached(self.stage, set(self.stage.state_dict()) - {copy.target for copy in self.copies}))
        )

    def content(self, description: dict[str, Any], copies: Mapping[str, Tensor]) -> StageContent:
        """As of TrainedStage."""
        if dist.get_rank() > 0:
            return StageContent()
        state = {**description, "skipped_in_a_row": 0, SECOND_NAMES: _second_names(self.stage)}
        return StageContent(
            Pieces(), state, _saved(_detached(self.stage, {one.target for one in self.copies})), dict(copies)
        )

    def load(self, saved: SavedFor) -> None:
        """Raises RunError when a file is damaged."""
        saved.fill(self.stage.state_dict(keep_vars=True), saved_name)


def combine_norms(norms: Tensor, zero_stage: int) -> Tensor:
    """The norm of a clip group from the norms of its stages, in order: by torch's formula at ZeRO 0, else DeepSpeed's.

    One norm stays what it is, which the formula of DeepSpeed would round.
    """
    if zero_stage == 0:
        return torch.linalg.vector_norm(norms)
    return norms[0] if norms.numel() == 1 else combine_grad_norm_groups(list(norms))
