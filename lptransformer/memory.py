"""What a run takes in memory, per pipeline rank, before anything is allocated. Plain arithmetic, no torch.

For another module that wants to say whether something fits:

    activations = activations.count(...)                      # bytes of one micro-batch, from an empty model
    states = memory.state_bytes(dtype, optimizer="adamw")     # bytes per weight
    ranks = memory.predict(stages, costs, activations, states, objective.phases, ...)
    [rank.total for rank in ranks]

A rank's total is what stays (weights, gradients, optimizer) and the larger of two peaks: that of the passes
(activations of the micro-batches in flight, messages, the chunk of logits) and that of the update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lptransformer.cost import ModelCosts
from lptransformer.gradients import Duty, duties, flows
from lptransformer.objective import Phase
from lptransformer.partition import StagePlan

BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


@dataclass(frozen=True)
class ActivationBytes:
    """Of one micro-batch, in bytes: what autograd keeps from the forward to the backward pass.

    `block`: of one block, its input included. `norm`: of the norm in a head. `rows`: hidden states [b, T, H], which are
    also a message, and the gradient at the readout's input that the chunked loss keeps. `logits`: the greatest that
    one chunk of the loss takes; it is gone when the forward pass is over. `readout_weight`: one weight of a readout,
    whose gradient the chunked loss keeps until the backward pass.
    """

    block: float
    norm: float
    rows: float
    logits: float
    readout_weight: int


@dataclass(frozen=True)
class StateBytes:
    """Bytes per trained weight. ZeRO 1 divides the optimizer over the replicas, 2 the gradients too, 3 the weights too.

    `optimizer` has the master weights of bf16. `update` is what a step takes for a while (ZeRO 1 to 3: the gradients
    of the own share in fp32).
    """

    weights: int
    gradients: int
    optimizer: int
    update: int


@dataclass(frozen=True)
class RankBytes:
    """Of one process of a pipeline rank, in bytes. `copies` are read-only weights of other stages."""

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    messages: float
    logits: float
    update: float
    held: int  # micro-batches whose activations are kept at once, of the stage that keeps most

    @property
    def total(self) -> float:
        stays = self.weights + self.gradients + self.optimizer + self.copies
        return stays + max(self.activations + self.messages + self.logits, self.update)


def state_bytes(dtype: str, optimizer: str = "adamw", momentum: bool = True, versions: int = 0) -> StateBytes:
    """Bytes per weight of `dtype` (fp32, bf16 with fp32 master weights, fp64) and an optimizer (adamw or sgd).

    `versions` are further versions of the weights (delayed gradients). AdamW at bf16: 2 + 2 + (4 + 8), as in ZeRO
    (1910.02054, section 3.1); at fp32: 4 + 4 + 8.
    """
    size = BYTES[dtype]
    moments = 2 if optimizer == "adamw" else int(momentum)
    if dtype == "bf16":
        return StateBytes(2, 2, 4 + 4 * moments, 4)
    return StateBytes(size, size, size * (moments + versions), size)


def of_states(
    trained: float, frozen: float, copied: float, states: StateBytes, weight_bytes: int, zero_stage: int, replicas: int
) -> dict[str, float]:
    """Bytes of weights, gradients, optimizer, copies and update of so many weights, divided as ZeRO does it."""
    divided = [1 / replicas if zero_stage >= stage else 1.0 for stage in (3, 2, 1)]
    return {
        "weights": trained * states.weights * divided[0] + frozen * weight_bytes,
        "gradients": trained * states.gradients * divided[1],
        "optimizer": trained * states.optimizer * divided[2],
        "copies": copied * weight_bytes,
        "update": trained * states.update / replicas if zero_stage > 0 else 0.0,
    }


def weights_of(stage: StagePlan, costs: ModelCosts) -> tuple[int, int]:
    """Own weights and read-only copies of a stage."""
    auxiliary = stage.has_head and not stage.is_last
    own = stage.num_blocks * costs.block_parameters + stage.is_first * costs.embedding_parameters
    own += costs.head_parameters if stage.is_last else auxiliary * costs.auxiliary_parameters
    return own, auxiliary * costs.auxiliary_copied


def held_passes(phase: Phase, stages: Sequence[StagePlan], micro_batches: int) -> list[int]:
    """For every stage the micro-batches between their forward and their backward at once (schedule.py).

    A stage waits for the gradient of as many later forward passes as there are ranks to the flow's highest head:
    one span over p ranks gives p, p - 1, ... 1 (1F1B); a chunk on its own rank gives 1. Frozen stages keep none.
    """
    of_phase = flows(phase, stages)
    held = []
    for stage in stages:
        above = [flow for flow in of_phase if flow.bottom <= stage.index < flow.top]
        lag = max((stages[flow.top].pipeline_rank - stage.pipeline_rank for flow in above), default=0)
        held.append(min(micro_batches, lag + 1) if stage.trained else 0)
    return held


def predict(
    stages: Sequence[StagePlan],
    costs: ModelCosts,
    activations: ActivationBytes,
    states: StateBytes,
    phases: Sequence[Phase],
    *,
    micro_batches: int,
    dtype: str = "fp32",
    zero_stage: int = 0,
    replicas: int = 1,
    in_flight: int = 2,
    head_blocks: int = 0,
    token_fraction: float = 1.0,
    recompute: float = 0.0,
) -> list[RankBytes]:
    """Bytes of one process of every pipeline rank.

    `micro_batches` are those of a replica in an update, `phases` those of the objective (the greatest counts),
    `head_blocks` the extra blocks of auxiliary heads, `token_fraction` the share of positions that those see.
    Of a share `recompute` of the blocks only the input is kept; the rest is made again, a block at a time.
    """
    of_phases = [(duties(phase, stages), held_passes(phase, stages, micro_batches)) for phase in phases]
    found = []
    for rank in range(stages[-1].pipeline_rank + 1):
        local = [stage for stage in stages if stage.pipeline_rank == rank]
        weights = [weights_of(stage, costs) for stage in local]
        trained = sum(own for stage, (own, _) in zip(local, weights, strict=True) if stage.trained)
        frozen = sum(own for stage, (own, _) in zip(local, weights, strict=True) if not stage.trained)
        kept = {s.index: _kept(s, costs, activations, head_blocks, token_fraction, recompute) for s in local}
        peak = max(_in_flight(local, duty, held, kept) for duty, held in of_phases)
        bottom, over = local[0].index, local[-1].index + 1  # the stages over the borders with the ranks around
        above, below = over < len(stages), bottom > 0
        received = above and any(duty[over].below for duty, _ in of_phases)
        returned = below and any(duty[bottom].below for duty, _ in of_phases)
        found.append(
            RankBytes(
                **of_states(
                    trained, frozen, sum(copied for _, copied in weights), states, BYTES[dtype], zero_stage, replicas
                ),
                activations=peak,
                # Receives are posted ahead; of what is sent one message is on its way.
                messages=(in_flight * (below + received) + above + returned) * activations.rows,
                logits=activations.logits if any(stage.has_head for stage in local) else 0.0,
                held=max(held[stage.index] for _, held in of_phases for stage in local),
            )
        )
    return found


def _kept(
    stage: StagePlan,
    costs: ModelCosts,
    activations: ActivationBytes,
    head_blocks: int,
    token_fraction: float,
    recompute: float,
) -> float:
    """What one micro-batch leaves behind in a stage until its backward."""
    blocks = stage.num_blocks
    size = blocks * (recompute * activations.rows + (1 - recompute) * activations.block)
    size += activations.block if recompute else 0.0
    if stage.is_last:
        size += activations.norm + activations.rows + costs.head_flops / 2 * activations.readout_weight
    elif stage.has_head:
        size += head_blocks * activations.block
        size += token_fraction * (activations.norm + activations.rows)
        size += costs.auxiliary_readout * activations.readout_weight
    return size


def _in_flight(
    local: Sequence[StagePlan], duty: Sequence[Duty], held: Sequence[int], kept: Mapping[int, float]
) -> float:
    """The peak of a rank: all passes that wait for gradients from above, and of the others, which run backward at once,
    the largest."""
    waiting = sum(held[stage.index] * kept[stage.index] for stage in local if duty[stage.index].above)
    at_once = [kept[stage.index] for stage in local if not duty[stage.index].above and stage.trained]
    return waiting + max(at_once, default=0.0)
