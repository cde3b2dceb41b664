"""Bytes that one process of a pipeline rank takes at its peak, by the actions of its schedule. No torch.

What stages are made of (`StageTensors`) and what a micro-batch takes in them (`PassBytes`) comes in:
planning/stage_memory.py counts it on empty stages. Then the actions that the engine runs (methods/schedule.py) are
walked, and what is alive is added up: 1F1B's p micro-batches in flight, the one of local updates, delayed gradients,
and an update of few micro-batches, whose first stages reach their peak before the last ones have gradients, all as they
happen.

Not counted: what a process takes without a model (libraries, a GPU's context), gaps of the allocator, what a kernel
takes for itself for a moment, message headers and scalars.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lptransformer.config.deepspeed_keys import BUCKET_ELEMENTS, bucket_elements, offloads
from lptransformer.config.schema import OptimizerSection
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.gradient_flow import Duty, Flow, crossing, duties, flows
from lptransformer.methods.objectives import Objective
from lptransformer.methods.schedule import Action, one_update
from lptransformer.methods.stages import StagePlan

EIGHT_BITS = (1 + 4 / 256) / 4  # of a moment's fp32: a byte, and a scale for 256 of them (small tensors are in fp32)
TOKEN_BYTES = 16  # id and label, int64 each


@dataclass(frozen=True)
class PassBytes:
    """Of one micro-batch in one stage, beyond what was alive before.

    `forward` is the peak of the forward pass, the loss of the stage's head with it. `kept` is what is alive between
    forward and backward pass, without the hidden states that come in and go out. `first_backward` is the peak of a
    backward pass that makes the gradients of the weights (they are in this number), `backward` of one that adds to
    them, `pull` of an inputs-only one; the three are beyond what was alive before that pass.
    """

    forward: int
    kept: int
    first_backward: int
    backward: int
    pull: int = 0


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


@dataclass(frozen=True)
class RankMemory:
    """Of one process of a pipeline rank, in bytes.

    `activations` are what is alive at the peak beyond all else that is named here: saved tensors, hidden states,
    logits, and what a pass or a step needs for a moment. `buckets` are ZeRO's, at the peak. `messages` are the buffers
    of the channels. `peak` is less than the sum where gradients are not all there at the peak. `held` are the
    micro-batches that wait for their backward pass at once, in the stage that holds most. `host` is not in the peak:
    what an offloaded optimizer has in the host's memory beside that of a GPU.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    copies: int = 0
    activations: int = 0
    buckets: int = 0
    messages: int = 0
    peak: int = 0
    held: int = 0
    host: int = 0


@dataclass
class _Walk:
    """What is alive while the actions of a rank are walked, beyond what is always there.

    `more` micro-batches after the last one are not walked: their ids and labels come with it.
    """

    states: Mapping[int, StageState]
    passes: Sequence[PassBytes]
    duty: Sequence[Duty]
    stages: Sequence[StagePlan]
    hidden: int
    batch: int
    last: int
    more: int
    now: int = 0
    gradients: int = 0  # of weights; they are in `now` too, and so are
    buckets: int = 0
    peak: int = 0
    at_peak: tuple[int, int] = (0, 0)  # gradients and buckets
    held: Counter[int] = field(default_factory=Counter)
    most_held: int = 0
    _made: set[int] = field(default_factory=set)  # stages that have gradients of weights
    _begun: set[int] = field(default_factory=set)  # micro-batches
    _holders: Counter[tuple[int, int]] = field(default_factory=Counter)  # of the output of (stage, micro-batch)
    _pulled: Counter[tuple[int, int]] = field(default_factory=Counter)  # flows of (stage, micro-batch)

    def __post_init__(self) -> None:
        for index, state in self.states.items():
            if state.zero_stage == 3:
                self.take_gradients(index, state.gradients)
                self.take_bucket(state.bucket)

    def reach(self, more: int, gradients: int = 0) -> None:
        """For a moment `more` bytes are alive, `gradients` of them new gradients of weights."""
        if self.now + more > self.peak:
            self.peak = self.now + more
            self.at_peak = self.gradients + gradients, self.buckets

    def take_gradients(self, index: int, change: int) -> None:
        self._made.add(index) if change > 0 else self._made.discard(index)
        self.gradients += change
        self.now += change

    def take_bucket(self, change: int) -> None:
        self.buckets += change
        self.now += change

    def hold(self, stage: int, micro_batch: int, change: int) -> None:
        """One more holder (1) of the output of a stage, or one fewer (-1)."""
        key = stage, micro_batch
        before = self._holders[key] > 0
        self._holders[key] += change
        self.now += self.hidden * ((self._holders[key] > 0) - before)

    def do(self, action: Action) -> None:
        index, number = action.stage, -1 if action.micro_batch is None else action.micro_batch
        match action.op:
            case "RECV_F":
                self.hold(index - 1, number, 1)
            case "SEND_F":
                self.hold(index, number, -1)
            case "RECV_B":
                self.now += self.hidden
            case "SEND_B":
                self.now -= self.hidden
            case "F":
                self._forward(self.stages[index], number)
            case "I":
                self.reach(self.passes[index].pull)
                self.now += self.hidden
                self._pulled[index, number] += 1
                if not self.stages[index].trained and self._pulled[index, number] == len(self.duty[index].pulls):
                    self._let_go(self.stages[index], number)
            case "B":
                self._backward(self.stages[index], number)
            case "U":
                self._update(index, self.states[index])
        self.reach(0)

    def _forward(self, plan: StagePlan, number: int) -> None:
        if number not in self._begun:
            self._begun.add(number)
            self.now += self.batch * (1 + (number == self.last) * self.more)
        one = self.passes[plan.index]
        self.reach(one.forward)
        if not plan.is_last:
            self.hold(plan.index, number, 1)  # for who comes next
        if plan.trained or self.duty[plan.index].pulls:
            self.now += one.kept
            self.hold(plan.index, number, 1)
            self.held[plan.index] += 1
            self.most_held = max(self.most_held, self.held[plan.index])
        elif not plan.is_first:
            self.hold(plan.index - 1, number, -1)

    def _backward(self, plan: StagePlan, number: int) -> None:
        index, own = plan.index, self.duty[plan.index]
        one, state = self.passes[index], self.states[index]
        first = index not in self._made
        if state.zero_stage == 2 or (state.zero_stage == 1 and first):
            self.take_bucket(state.bucket)
        if state.zero_stage >= 2:  # whole gradients are made in every pass, and partitioned
            if first:
                self.take_gradients(index, state.gradients)
            self.reach(one.first_backward + state.gathered)
        elif first:
            self.reach(one.first_backward, state.gradients)
            self.take_gradients(index, state.gradients)
        else:
            self.reach(one.backward)
        if state.zero_stage == 2:
            self.take_bucket(-state.bucket)
        self._let_go(plan, number)
        self.now += self.hidden * (own.down is not None)

    def _let_go(self, plan: StagePlan, number: int) -> None:
        """The last that a stage does with a micro-batch is done."""
        self.now -= self.passes[plan.index].kept + self.hidden * len(self.duty[plan.index].above)
        self.hold(plan.index, number, -1)
        self.held[plan.index] -= 1
        if not plan.is_first:
            self.hold(plan.index - 1, number, -1)

    def _update(self, index: int, state: StageState) -> None:
        if state.zero_stage == 1:
            self.take_bucket(-state.bucket)
        self.reach(state.step)
        if state.zero_stage < 3:
            self.take_gradients(index, -state.gradients)


def predict(
    objective: Objective,
    stages: Sequence[StagePlan],
    tensors: Sequence[StageTensors],
    passes: Sequence[Sequence[PassBytes]],
    how: Precision,
    *,
    rounds: int,
    micro_batch_tokens: int,
    hidden_bytes: int,
    in_flight: int,
    lags: Mapping[int, int] | None = None,
    refresh_every: int = 1,
) -> list[RankMemory]:
    """The memory of one process of every pipeline rank; `tensors` and `passes` (of every phase) are those of `stages`.

    `rounds` are the micro-batches of a replica in an update; `hidden_bytes` are those of the hidden states of one,
    [b, T, H] in the dtype of training. `in_flight` receives are posted ahead. `lags` are those of the stages whose
    heads follow other stages' weights, in updates.
    """
    of_phases = [flows(phase, stages) for phase in objective.phases]
    duty_of_phases = [duties(phase, stages) for phase in objective.phases]
    batch = micro_batch_tokens * TOKEN_BYTES
    short = min(rounds, _furthest(of_phases, stages) + 2)  # more micro-batches only repeat what was

    found: list[RankMemory] = []
    for rank in range(stages[-1].pipeline_rank + 1):
        local = [stage for stage in stages if stage.pipeline_rank == rank]
        patterns = [one_update(stages, phase, rank, short, objective.delayed) for phase in objective.phases]
        done = [(*one.fill, *one.body, *(one.goes_on or one.drains), *one.updates) for one in patterns]
        on_their_way = _on_their_way(local, stages, tensors, lags or {}, refresh_every)
        messages = hidden_bytes * _messages(of_phases, len(stages), local, in_flight)
        states = {stage.index: stage_state(tensors[stage.index], how, objective.delayed) for stage in local}
        walks = []
        for actions, of_phase, duty in zip(done, passes, duty_of_phases, strict=True):
            walks.append(_Walk(states, of_phase, duty, stages, hidden_bytes, batch, short - 1, rounds - short))
            for action in actions:
                walks[-1].do(action)
        found.append(_summed(walks, states.values(), on_their_way - _shared(local, tensors), messages))
    return found


def _summed(walks: Sequence[_Walk], states: Collection[StageState], on_their_way: int, messages: int) -> RankMemory:
    """What is always there, and the worst of the phases."""
    worst = max(walks, key=lambda walk: walk.peak)
    weights, optimizer = sum(one.weights for one in states), sum(one.optimizer for one in states)
    copies = sum(one.buffers for one in states) + on_their_way
    return RankMemory(
        weights=weights,
        gradients=sum(one.gradients for one in states),
        optimizer=optimizer,
        copies=copies,
        activations=worst.peak - sum(worst.at_peak),
        buckets=worst.at_peak[1],
        messages=messages,
        peak=weights + optimizer + copies + messages + worst.peak,
        held=max(walk.most_held for walk in walks),
        host=sum(one.host for one in states),
    )


def _messages(of_phases: Sequence[Sequence[Flow]], num_stages: int, local: Sequence[StagePlan], in_flight: int) -> int:
    """Message buffers of a rank: receives posted ahead, and one message on its way in every channel that sends."""
    first, after = local[0].index, local[-1].index + 1
    down = max(len(crossing(one, first)) for one in of_phases)
    coming = max(len(crossing(one, after)) for one in of_phases)
    return in_flight * ((first > 0) + coming) + (after < num_stages) + down


def _on_their_way(
    local: Sequence[StagePlan],
    stages: Sequence[StagePlan],
    tensors: Sequence[StageTensors],
    lags: Mapping[int, int],
    refresh_every: int,
) -> int:
    """Bytes of copies of weights on their way between stages (engine/weight_copies.py), in a rank with these stages.

    A rank posts a receive for every version that can be on its way to it. Versions that a rank keeps for itself are
    shared by all heads that follow the same stage; of what it sends to other ranks one is on its way.
    """
    here = {stage.index for stage in local}
    arriving, kept = 0, dict[tuple[int, int], int]()
    for target, lag in lags.items():
        waiting = math.ceil(lag / refresh_every)
        sizes: Counter[int] = Counter()
        for above, size in tensors[target].copies:
            block = stages[-1].last_block if above is None else stages[target].last_block + above
            sizes[next(stage.index for stage in stages if block <= stage.last_block)] += size
        for source, size in sizes.items():
            if source in here:
                versions = waiting if target in here else 1
                kept[source, size] = max(kept.get((source, size), 0), versions)
            elif target in here:
                arriving += size * (waiting + 1)
    return arriving + sum(size * versions for (_, size), versions in kept.items())


def _shared(local: Sequence[StagePlan], tensors: Sequence[StageTensors]) -> int:
    """Bytes of frozen tensors that are there once, and were counted in several heads of a rank."""
    of_heads = [tensors[stage.index].shared for stage in local]
    once = {name: size for shared in of_heads for name, size in shared.items()}
    return sum(sum(shared.values()) for shared in of_heads) - sum(once.values())


def _furthest(of_phases: Sequence[Sequence[Flow]], stages: Sequence[StagePlan]) -> int:
    """Pipeline ranks between a loss and the lowest block that it trains, at most."""
    of_all = [flow for of_phase in of_phases for flow in of_phase]
    return max((stages[flow.top].pipeline_rank - stages[flow.bottom].pipeline_rank for flow in of_all), default=0)


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
