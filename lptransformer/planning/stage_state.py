"""Bytes of one stage that do not depend on the micro-batch: weights, gradients, the optimizer's, by ZeRO. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lptransformer.config.deepspeed_keys import BUCKET_ELEMENTS, bucket_elements, offloads
from lptransformer.config.schema import OptimizerSection
from lptransformer.methods.dtypes import DTYPES

EIGHT_BITS = (1 + 4 / 256) / 4  # of a moment's fp32: a byte, and a scale for 256 of them (small tensors are in fp32)


@dataclass(frozen=True)
class StageTensors:
    """What a stage is made of: numbers of its weights, and of those that are `frozen`; among the others of the largest
    tensor, and of those that decay (of two and more dimensions; each group of the optimizer is one flat tensor under
    ZeRO), the `matrices` of linear maps in blocks among them, and the largest of these. `buffer_bytes` are of read-only
    copies and other buffers. `copies` are (block, bytes) of the weights that its head follows: the block is counted
    from the stage's last one, None for the last block of the model. `shared` are the bytes of what a fitted head reads
    and never trains, by name: heads of one process share what has the same name.
    """

    trained: bool
    weights: int
    largest: int
    decaying: int
    buffer_bytes: int
    copies: tuple[tuple[int | None, int], ...] = ()
    frozen: int = 0
    shared: Mapping[str, int] = field(default_factory=dict)
    matrices: int = 0
    largest_matrix: int = 0

    @property
    def training(self) -> int:
        """How many of its weights have gradients and optimizer state."""
        return self.weights - self.frozen if self.trained else 0


@dataclass(frozen=True)
class Precision:
    """How weights are kept and trained: bytes of a weight, and of each number that the optimizer works on (`master`:
    the weight itself, or a copy of it in fp32); how many `moments` of that size a weight has, how many
    `step_temporaries` a step makes; bytes of a gradient where ZeRO 2 and 3 accumulate it.

    `bucket` is how many gradients a bucket of ZeRO's has (None: as many as the stage has weights, up to DeepSpeed's
    default), and `buckets` how many there are below ZeRO 3. `on_gpu`: the optimizer takes all tensors at once, with
    `fused_temporaries` of every weight; on a CPU it goes tensor by tensor. With `muon` matrices of blocks
    have one moment, and are stepped one by one everywhere. `offloaded`: it is in the host's memory, and steps in place.
    """

    weights: int
    master: int
    moments: float
    step_temporaries: int
    accumulated: int
    bucket: int | None = None
    buckets: int = 1
    zero_stage: int = 0
    replicas: int = 1
    on_gpu: bool = False
    fused_temporaries: int = 1
    muon: bool = False
    offloaded: bool = False

    @property
    def gradients(self) -> int:
        """Bytes of a gradient."""
        return self.accumulated if self.zero_stage > 1 else self.weights

    def trained_bytes(self, delayed: bool) -> int:
        """Of a weight (with Muon, of one that AdamW steps) with its gradient and the optimizer's state, before ZeRO
        divides it; with another version of it where gradients are `delayed`."""
        return self.weights + self.gradients + self.optimizer + delayed * self.weights

    @property
    def optimizer(self) -> int:
        """Bytes that a step reads and writes beside weight and gradient: moments, and master weights of bf16."""
        return int(self.master * (self.moments + (self.master > self.weights)))

    @property
    def update_bytes(self) -> int:
        """Bytes per weight that an update moves: the gradient twice (norm, step), weight and moments read and written;
        a weight of bf16 is written only."""
        return 2 * self.gradients + 2 * self.optimizer + self.weights * (1 if self.master > self.weights else 2)


def precision(
    dtype: str,
    optimizer: OptimizerSection | None = None,
    deepspeed: Mapping[str, Any] | None = None,
    **how: Any,
) -> Precision:
    """What the configuration says of it; `how`: zero_stage, replicas and on_gpu.

    AdamW at bf16: 2 + 2 + (4 + 8) bytes per weight, as in ZeRO (1910.02054, section 3.1), with gradients that are added
    up in fp32 (ZeRO 2 and 3) 2 more; at fp32: 4 + 4 + 8. Its kernel on a GPU needs nothing for itself.
    """
    optimizer, deepspeed = optimizer or OptimizerSection(), deepspeed or {}
    of_dtype, sgd = DTYPES[dtype], optimizer.name == "sgd"
    zero: Mapping[str, Any] = deepspeed.get("zero_optimization", {})
    in_bf16 = deepspeed.get("data_types", {}).get("grad_accum_dtype") == "bf16"
    bucket = zero.get("reduce_bucket_size") if zero.get("contiguous_gradients", True) else 0
    return Precision(
        weights=of_dtype.bytes,
        master=of_dtype.state_bytes,
        moments=moments(optimizer) * (EIGHT_BITS if optimizer.name == "adamw_8bit" else 1),
        step_temporaries=1 if sgd else 2,
        accumulated=of_dtype.bytes if in_bf16 else max(4, of_dtype.bytes),
        bucket=BUCKET_ELEMENTS if bucket == "auto" else bucket,
        buckets=1 + bool(zero.get("overlap_comm")),
        fused_temporaries=int(sgd),
        muon=optimizer.name == "muon",
        offloaded=offloads(deepspeed),
        **how,
    )


def moments(optimizer: OptimizerSection) -> int:
    """How many tensors an optimizer has of a weight in a checkpoint; Muon one less of the matrices of blocks."""
    return 2 if optimizer.name != "sgd" else int(bool(optimizer.momentum))


@dataclass(frozen=True)
class StageState:
    """Bytes of a stage on one replica that do not depend on the micro-batch.

    `weights`, `optimizer` (with the master weights of ZeRO and a further version) and `buffers` (read-only copies of
    other stages' weights) are there all the time. `gradients` come with the first backward pass of an update and go
    with the optimizer's step, at ZeRO 3 they stay. `step` is what the step takes for itself, beside the gradients.

    ZeRO 1 to 3 reduce gradients through a `bucket`, whose size is given
    (deepspeed.zero_optimization.reduce_bucket_size), whatever the stage: at ZeRO 1 from the first backward pass to the
    update, at 2 in every backward pass, at 3 always. `gathered` is what a backward pass at ZeRO 3 has of all of the
    stage's weights. `host` is what an offloaded optimizer has in the host's memory, beside all this on a GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    zero_stage: int = 0
    bucket: int = 0
    gathered: int = 0
    host: int = 0


def stage_state(stage: StageTensors, how: Precision, delayed: bool = False) -> StageState:
    """The bytes of a stage's weights and what belongs to them; buffers as DeepSpeed 0.19.8 was seen to make them.

    Delayed gradients keep a second version of the weights.
    """
    zero, all_weights, size = how.zero_stage, stage.weights, stage.training
    matrices = stage.matrices if how.muon else 0
    # Of one matrix, two bytes each of the direction, of it as it is and as it becomes, and beside that at most as much
    # for each of two square products, or what comes out in fp32.
    one_matrix = stage.largest_matrix * 10 if matrices else 0
    rest = size - matrices
    if not stage.trained:
        return StageState(all_weights * how.weights, 0, 0, stage.buffer_bytes, 0)
    if zero == 0:
        temporaries = rest * how.fused_temporaries if how.on_gpu else stage.largest * how.step_temporaries
        step = max(temporaries * how.master, one_matrix)
        averaged = size * how.gradients if how.replicas > 1 else 0  # flattened for the all-reduce
        optimizer = int((size * (how.moments + delayed) - matrices) * how.master)
        gradients = size * how.gradients
        return StageState(all_weights * how.weights, gradients, optimizer, stage.buffer_bytes, max(step, averaged))
    own = -(-size // how.replicas)  # the share of a replica
    # The optimizer's tensors are flat: one for the weights that decay, one for the others.
    flat = max(stage.decaying - matrices, size - stage.decaying) / size * own
    stepped = how.fused_temporaries * rest / size * own if how.on_gpu else how.step_temporaries * flat
    # Gradients as the step takes them: of the own share at once, at ZeRO 3 of one flat tensor at a time.
    cast = int(flat if zero == 3 else own) * 4
    partitioned = own * how.gradients
    bucket = bucket_elements(size) if how.bucket is None else how.bucket
    second = delayed * size * how.weights
    state = StageState(
        weights=(-(-all_weights // how.replicas) if zero == 3 else all_weights) * how.weights,
        gradients=partitioned if zero > 1 else size * how.gradients,
        optimizer=int((own * (1 + how.moments) - -(-matrices // how.replicas)) * how.master) + second,
        buffers=stage.buffer_bytes,
        step=max(int(stepped * how.master), one_matrix) + cast + (partitioned if zero == 1 and how.replicas > 1 else 0),
        zero_stage=zero,
        bucket=bucket * (how.buckets if zero < 3 else 1) * how.weights,
        gathered=all_weights * how.weights if zero == 3 else 0,
    )
    return _offloaded(state, stage, how, own, second) if how.offloaded else state


def _offloaded(state: StageState, stage: StageTensors, how: Precision, own: int, second: int) -> StageState:
    """The same where the optimizer is in the host's memory, with the gradients that it steps by, always. There too is,
    below ZeRO 3, the copy that new weights come from. Gradients of micro-batches are added up there at ZeRO 3, and at 2
    in the dtype of the weights; a sum in fp32 of bf16 stays on the device."""
    zero, through = how.zero_stage, stage.largest * how.weights if how.zero_stage < 3 else 0
    summed_there = zero == 3 or (zero == 2 and how.accumulated == how.weights)
    there = int(own * how.master * (2 + how.moments)) + through + own * how.weights * (zero < 3)
    there += own * how.gradients if summed_there else 0
    return replace(
        state,
        gradients=0 if summed_there else state.gradients,
        optimizer=second + through + (0 if how.on_gpu else there),
        step=0,
        host=there if how.on_gpu else 0,
    )
