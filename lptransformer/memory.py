"""What a run takes in memory, per pipeline rank, before anything is allocated. Plain arithmetic, no torch.

For another module that wants to say whether something fits:

    activations = activations.count(...)                      # bytes of one micro-batch, from an empty model
    states = memory.state_bytes(dtype, optimizer="adamw")     # bytes per weight
    ranks = memory.predict(objective, stages, costs, activations, states, ...)
    [rank.total for rank in ranks]

The counting is that of footprint.py, which `train --dry-run` uses too. What is coarser here is what it is given: a
block is as large as any other, and a pass is made up from what autograd keeps of a block, instead of being run.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from lptransformer import footprint
from lptransformer.cost import ModelCosts
from lptransformer.footprint import TOKEN_BYTES, PassBytes, Precision, RankMemory, StageTensors
from lptransformer.gradients import Duty, Flow, duties, flows
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan

BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


@dataclass(frozen=True)
class ActivationBytes:
    """Of one micro-batch, in bytes: what autograd keeps from the forward to the backward pass.

    `block`: of one block, its input included. `norm`: of the norm in a head, its input included. `rows`: hidden states
    [b, T, H], which are also a message, and the gradient at the readout's input that the chunked loss keeps. `logits`:
    the greatest that one chunk of the loss takes; it is gone when the forward pass is over. `readout_weight`: one
    weight of a readout, whose gradient the chunked loss keeps until the backward pass.
    """

    block: float
    norm: float
    rows: float
    logits: float
    readout_weight: int


@dataclass(frozen=True)
class StateBytes:
    """How a weight is kept and trained: bytes of the weight, of its gradient, and of each number that the optimizer
    works on (`master`: the weight itself, or a copy of it in fp32), how many `moments` it has, how many
    `step_temporaries` a step makes. Delayed gradients, and nothing else, keep `versions` more of it.
    """

    weights: int
    gradients: int
    master: int
    moments: int
    step_temporaries: int
    versions: int = 0

    @property
    def optimizer(self) -> int:
        """Bytes that a step reads and writes beside weight and gradient: moments, and master weights of bf16."""
        return self.master * (self.moments + (self.master > self.weights))

    def precision(self, zero_stage: int, replicas: int, fused_step: bool, delayed: bool = False) -> Precision:
        return Precision(
            weight_bytes=self.weights,
            gradient_bytes=self.gradients,
            master_bytes=self.master,
            moments=self.moments,
            step_temporaries=self.step_temporaries,
            zero_stage=zero_stage,
            replicas=replicas,
            versions=self.versions if delayed else 0,
            bucket_elements=None,
            fused_step=fused_step,
        )


@dataclass(frozen=True)
class RankBytes:
    """Of one process of a pipeline rank, in bytes, at the peak of an update.

    `gradients` are those that are there at the peak, with ZeRO's buckets. `copies` are read-only weights of other
    stages. `logits` is what a chunk of the loss adds to the peak, `activations` all else that is alive then: saved
    tensors, hidden states, weights that ZeRO 3 has gathered, and what a pass or a step needs for a moment.
    """

    weights: float
    gradients: float
    optimizer: float
    copies: float
    activations: float
    messages: float
    logits: float
    held: int  # micro-batches whose activations are kept at once, of the stage that keeps most

    @property
    def total(self) -> float:
        stays = self.weights + self.gradients + self.optimizer + self.copies
        return stays + self.activations + self.messages + self.logits


def state_bytes(dtype: str, optimizer: str = "adamw", momentum: bool = True, versions: int = 0) -> StateBytes:
    """How weights of `dtype` (fp32, bf16 with fp32 master weights, fp64) are trained by an optimizer (adamw or sgd).

    AdamW at bf16: 2 + 2 + (4 + 8) bytes per weight, as in ZeRO (1910.02054, section 3.1); at fp32: 4 + 4 + 8.
    """
    size, adamw = BYTES[dtype], optimizer == "adamw"
    return StateBytes(size, size, max(size, 4), 2 if adamw else int(momentum), 2 if adamw else 1, versions)


def weights_of(stage: StagePlan, costs: ModelCosts) -> tuple[int, int]:
    """Own weights and read-only copies of a stage."""
    auxiliary = stage.has_head and not stage.is_last
    own = stage.num_blocks * costs.block_parameters + stage.is_first * costs.embedding_parameters
    own += costs.head_parameters if stage.is_last else auxiliary * costs.auxiliary_parameters
    return own, auxiliary * costs.auxiliary_copied


def predict(
    objective: Objective,
    stages: Sequence[StagePlan],
    costs: ModelCosts,
    activations: ActivationBytes,
    states: StateBytes,
    *,
    micro_batches: int,
    micro_batch_tokens: int,
    chunk_tokens: int,
    zero_stage: int = 0,
    replicas: int = 1,
    in_flight: int = 2,
    head_blocks: int = 0,
    token_fraction: float = 1.0,
    fused_step: bool = False,
) -> list[RankBytes]:
    """Bytes of one process of every pipeline rank.

    `micro_batches` are those of a replica in an update, `chunk_tokens` those of a chunk of the loss. `head_blocks` are
    the extra blocks of auxiliary heads, `token_fraction` the share of positions that those see. `fused_step`: see
    footprint.Precision.
    """
    how = states.precision(zero_stage, replicas, fused_step, objective.delayed)
    seen = min(token_fraction * micro_batch_tokens, chunk_tokens) / min(micro_batch_tokens, chunk_tokens)
    parts = _Parts(costs, activations, states.weights, micro_batch_tokens, head_blocks, token_fraction, seen)
    of_phases = [flows(phase, stages) for phase in objective.phases]
    duty_of_phases = [duties(phase, stages) for phase in objective.phases]
    passes, silent = (
        [{s.index: parts.passes(s, d, logits) for s, d in zip(stages, duty, strict=True)} for duty in duty_of_phases]
        for logits in (activations.logits, 0.0)
    )
    # More micro-batches than ranks to the furthest head only repeat what was: their ids and labels alone are new.
    rounds = min(micro_batches, _furthest(of_phases, stages) + 2)
    more = (micro_batches - rounds) * micro_batch_tokens * TOKEN_BYTES

    def peak(local: Sequence[StagePlan], of_phases: Sequence[Mapping[int, PassBytes]]) -> RankMemory:
        return footprint.predict(
            objective,
            stages,
            local[0].pipeline_rank,
            {stage.index: footprint.stage_state(parts.tensors(stage), how) for stage in local},
            of_phases,
            rounds=rounds,
            micro_batch_tokens=micro_batch_tokens,
            hidden_bytes=int(activations.rows),
            in_flight=in_flight,
        )

    found: list[RankBytes] = []
    known: dict[Hashable, RankBytes] = {}  # of a hundred ranks most are alike
    for rank in range(stages[-1].pipeline_rank + 1):
        local = [stage for stage in stages if stage.pipeline_rank == rank]
        signature = _signature(local, stages, of_phases, duty_of_phases)
        if signature not in known:
            one = peak(local, passes)
            logits = one.peak - peak(local, silent).peak
            known[signature] = RankBytes(
                weights=one.weights,
                gradients=one.gradients + one.buckets,
                optimizer=one.optimizer,
                copies=one.copies,
                activations=one.activations - logits + more,
                messages=one.messages,
                logits=logits,
                held=one.held,
            )
        found.append(known[signature])
    return found


def of_others(
    weights: int,
    largest: int,
    how: Precision,
    *,
    kept: float,
    logits: float,
    messages: float = 0.0,
    gathered: float = 0.0,
) -> float:
    """Bytes of a process of somebody else's program that trains so many weights, at its peak.

    `kept` is what waits for its backward pass, `gathered` what ZeRO 3 has of the other replicas' weights meanwhile.
    """
    zero_3 = how.zero_stage == 3
    state = footprint.stage_state(StageTensors(True, weights, largest, weights, 0), how)
    stays = state.weights + state.gradients + state.optimizer + messages
    return stays + state.bucket * zero_3 + max(kept + logits + (gathered if zero_3 else state.bucket), state.step)


def largest_tensor(num_blocks: int, costs: ModelCosts, embedding: bool, readout: int) -> int:
    """Weights of the largest tensor: a third of a block (one of its MLP's two or three), or at one of the ends."""
    return max((num_blocks > 0) * costs.block_parameters // 3, embedding * costs.embedding_parameters, readout)


@dataclass(frozen=True)
class _Parts:
    """What stages are made up from. `logits_share`: of a chunk of logits, what an auxiliary head has of it."""

    costs: ModelCosts
    activations: ActivationBytes
    weight_bytes: int
    tokens: int  # of a micro-batch
    head_blocks: int
    token_fraction: float
    logits_share: float

    def tensors(self, stage: StagePlan) -> StageTensors:
        own, copied = weights_of(stage, self.costs)
        largest = largest_tensor(stage.num_blocks, self.costs, stage.is_first, self._readout(stage))
        return StageTensors(stage.trained, own, largest, own, copied * self.weight_bytes)

    def passes(self, stage: StagePlan, duty: Duty, logits: float) -> PassBytes:
        """What passes.of_stage would find, roughly: of the gradients inside of a block the widest is counted alone."""
        of, rows = self.activations, self.activations.rows
        if not stage.trained:
            return PassBytes(int(of.block + rows), 0, 0, 0)
        kept = stage.num_blocks * of.block
        kept -= 0 if stage.is_first else rows  # what comes in is counted by footprint.py, and so is what goes out:
        if stage.has_head:
            blocks, share = (0, 1.0) if stage.is_last else (self.head_blocks, self.token_fraction)
            kept += blocks * of.block + share * (of.norm + rows) + self._readout(stage) * of.readout_weight
            kept -= rows if (blocks or share == 1.0) and not duty.split else 0
            logits *= 1.0 if stage.is_last else self.logits_share
        gradients = weights_of(stage, self.costs)[0] * self.weight_bytes
        inside = 2 * rows + self._widest()
        return PassBytes(
            forward=int(kept + rows + stage.has_head * logits),
            kept=int(kept),
            first_backward=int(max(inside, gradients - kept + rows)),
            backward=int(
                max(inside, rows + largest_tensor(stage.num_blocks, self.costs, stage.is_first, 0) * self.weight_bytes)
            ),
            pull=int(inside),
        )

    def _readout(self, stage: StagePlan) -> int:
        """Weights of a readout that is trained."""
        return int(self.costs.head_flops / 2) if stage.is_last else stage.has_head * self.costs.auxiliary_readout

    def _widest(self) -> float:
        """Bytes of the widest hidden states in a block, those of its MLP: a tensor of [H, width] is a third of it."""
        column = self.tokens * self.weight_bytes
        return column * self.costs.block_parameters / 3 / (self.activations.rows / column)


def _furthest(of_phases: Sequence[Sequence[Flow]], stages: Sequence[StagePlan]) -> int:
    """Pipeline ranks between a loss and the lowest block that it trains, at most."""
    of_all = [flow for of_phase in of_phases for flow in of_phase]
    return max((stages[flow.top].pipeline_rank - stages[flow.bottom].pipeline_rank for flow in of_all), default=0)


def _signature(
    local: Sequence[StagePlan],
    stages: Sequence[StagePlan],
    of_phases: Sequence[Sequence[Flow]],
    duty_of_phases: Sequence[Sequence[Duty]],
) -> Hashable:
    """What a rank has and does, equal where another rank takes as much: stages and flows are numbered from its own."""
    first, rank, top = local[0].index, local[0].pipeline_rank, local[-1].index

    def numbered(duty: Duty) -> Hashable:
        own, down = (None if flow is None else flow - first for flow in (duty.own, duty.down))
        above = tuple((flow - first, weight) for flow, weight in duty.above)
        return duty.loss_weight, own, above, tuple(flow - first for flow in duty.pulls), down

    shapes = tuple((one.num_blocks, one.has_head, one.is_first, one.is_last, one.trained) for one in local)
    duty = tuple(numbered(of_phase[stage.index]) for of_phase in duty_of_phases for stage in local)
    lags = tuple(
        tuple(
            (flow.number - first, stages[flow.top].pipeline_rank - rank)
            for flow in one
            if flow.bottom <= top < flow.top
        )
        for one in of_phases
    )
    return shapes, duty, lags
