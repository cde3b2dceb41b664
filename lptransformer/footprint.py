"""Bytes that the stages of a pipeline rank take at their peak, by the actions of its schedule. No torch.

What one micro-batch takes in one stage comes in (`PassBytes`): passes.py counts it on tensors that have a shape and no
memory, for any family and any head. Then the same actions that the engine runs (schedule.py) are walked, and what is
alive is added up: so 1F1B's p micro-batches in flight, the one of local updates, delayed gradients, and an update of
few micro-batches, whose first stages reach their peak before the last ones have gradients, are counted as they happen.
memory.py asks less and says less: it plans for clusters.

Not counted: what a process takes without a model (libraries, a GPU's context), gaps of the allocator, what a kernel
takes for itself for a moment, message headers and scalars.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lptransformer.deepspeed_keys import bucket_elements
from lptransformer.gradients import Duty, crossing, duties, flows
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan
from lptransformer.schedule import RECV_B, RECV_F, SEND_B, SEND_F, Action, one_update

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
class StageState:
    """Bytes of a stage on one replica that do not depend on the micro-batch.

    `weights`, `optimizer` (with the master weights of ZeRO and further versions) and `copies` (of other stages'
    weights) are there all the time. `gradients` come with the first backward pass of an update and go with the
    optimizer's step, unless `gradients_stay`. `step` is what the step takes for itself, beside the gradients.

    ZeRO 1 to 3 reduce gradients through a `bucket`, which is as large as it is told to be
    (deepspeed.zero_optimization.reduce_bucket_size), whatever the stage: at ZeRO 1 from the first backward pass to the
    update, at 2 in every backward pass, at 3 always. `gathered` is what a backward pass at ZeRO 3 has of all of the
    stage's weights.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    step: int
    zero_stage: int = 0
    bucket: int = 0
    gathered: int = 0

    @property
    def gradients_stay(self) -> bool:
        return self.zero_stage == 3


@dataclass(frozen=True)
class StageTensors:
    """What a stage is made of: numbers of its weights, of the largest tensor among them, and of those that decay (of
    two and more dimensions; each group of the optimizer is one flat tensor under ZeRO). `copy_bytes` are of read-only
    copies and other buffers."""

    trained: bool
    weights: int
    largest: int
    decaying: int
    copy_bytes: int


@dataclass(frozen=True)
class Precision:
    """How weights are kept and trained: the configuration in numbers.

    `weight_bytes` and `gradient_bytes` of one number, `master_bytes` what the optimizer works on, `moments` numbers of
    its state per weight, `versions` further versions of the weights (delayed gradients), `bucket_elements` of a
    gradient bucket (None: as many as the stage has weights), and how many `buckets`. `fused_step`: the optimizer takes
    all tensors at once, as on a GPU, and needs a temporary of every weight; else it goes tensor by tensor and needs
    `step_temporaries` of one.
    """

    weight_bytes: int
    gradient_bytes: int
    master_bytes: int
    moments: int
    step_temporaries: int
    zero_stage: int = 0
    replicas: int = 1
    versions: int = 0
    bucket_elements: int | None = 0
    buckets: int = 1
    fused_step: bool = False


def stage_state(stage: StageTensors, how: Precision) -> StageState:
    """The bytes of a stage's weights and what belongs to them; buffers as DeepSpeed 0.19.8 was seen to make them."""
    if not stage.trained:
        return StageState(stage.weights * how.weight_bytes, 0, 0, stage.copy_bytes, 0)
    zero, size = how.zero_stage, stage.weights
    own = -(-size // how.replicas)  # the share of a replica
    weights = (own if zero == 3 else size) * how.weight_bytes
    moments = how.moments * how.master_bytes
    if zero == 0:
        step = size * how.master_bytes if how.fused_step else stage.largest * how.step_temporaries * how.master_bytes
        averaged = size * how.gradient_bytes if how.replicas > 1 else 0  # flattened for the all-reduce
        return StageState(
            weights,
            size * how.gradient_bytes,
            size * (moments + how.versions * how.master_bytes),
            stage.copy_bytes,
            max(step, averaged),
        )
    # The optimizer's tensors are flat: one for the weights that decay, one for the others.
    flat = max(stage.decaying, size - stage.decaying) / size * own
    temporaries = own if how.fused_step else how.step_temporaries * flat
    # Gradients as the step takes them: of the own share at once, at ZeRO 3 of one flat tensor at a time.
    cast = int(flat if zero == 3 else own) * 4
    partitioned = own * how.gradient_bytes
    return StageState(
        weights=weights,
        gradients=partitioned if zero > 1 else size * how.gradient_bytes,
        optimizer=own * (how.master_bytes + moments),
        copies=stage.copy_bytes,
        step=int(temporaries * how.master_bytes) + cast + (partitioned if zero == 1 and how.replicas > 1 else 0),
        zero_stage=zero,
        bucket=(bucket_elements(size) if how.bucket_elements is None else how.bucket_elements)
        * how.buckets
        * how.weight_bytes,
        gathered=size * how.weight_bytes if zero == 3 else 0,
    )


@dataclass(frozen=True)
class RankMemory:
    """Of one process of a pipeline rank, in bytes.

    `activations` are what is alive at the peak beyond all else that is named here: saved tensors, hidden states,
    logits, and what a pass or a step needs for a moment. `buckets` are ZeRO's, at the peak. `messages` are the buffers
    of the channels. `peak` is less than the sum where gradients are not all there at the peak. `held` are the
    micro-batches that wait for their backward pass at once, in the stage that holds most.
    """

    weights: int
    gradients: int
    optimizer: int
    copies: int
    activations: int
    buckets: int
    messages: int
    peak: int
    held: int


@dataclass
class _Walk:
    """What is alive while the actions of a rank are walked, beyond what is always there."""

    states: Mapping[int, StageState]
    passes: Mapping[int, PassBytes]
    duty: Sequence[Duty]
    stages: Sequence[StagePlan]
    hidden: int
    batch: int
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

    def __post_init__(self) -> None:
        for index, state in self.states.items():
            if state.gradients_stay:
                self.take_gradients(index, state.gradients)
                self.take_bucket(state.bucket)

    def reach(self, more: int, gradients: int = 0) -> None:
        """For a moment `more` is alive, of which so much are new gradients of weights."""
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
        """Somebody begins (1) or ends (-1) to hold the output of a stage."""
        key = stage, micro_batch
        before = self._holders[key] > 0
        self._holders[key] += change
        self.now += self.hidden * ((self._holders[key] > 0) - before)

    def do(self, action: Action) -> None:
        index, number = action.stage, -1 if action.micro_batch is None else action.micro_batch
        plan, state = self.stages[index], self.states[index]
        if action.op == RECV_F:
            self.hold(index - 1, number, 1)
        elif action.op == SEND_F:
            self.hold(index, number, -1)
        elif action.op == RECV_B:
            self.now += self.hidden
        elif action.op == SEND_B:
            self.now -= self.hidden
        elif action.op == "F":
            self._forward(plan, number)
        elif action.op == "I":
            self.reach(self.passes[index].pull)
            self.now += self.hidden
        elif action.op == "B":
            self._backward(plan, number)
        elif action.op == "U":
            if state.zero_stage == 1:
                self.take_bucket(-state.bucket)
            self.reach(state.step)
            if not state.gradients_stay:
                self.take_gradients(index, -state.gradients)
        self.reach(0)

    def _forward(self, plan: StagePlan, number: int) -> None:
        if number not in self._begun:
            self._begun.add(number)
            self.now += self.batch
        one = self.passes[plan.index]
        self.reach(one.forward)
        if not plan.is_last:
            self.hold(plan.index, number, 1)  # for who comes next
        if plan.trained:
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
        self.now -= one.kept + self.hidden * len(own.above)
        self.now += self.hidden * (own.down is not None)
        self.hold(index, number, -1)
        self.held[index] -= 1
        if not plan.is_first:
            self.hold(index - 1, number, -1)


def predict(
    objective: Objective,
    stages: Sequence[StagePlan],
    pipeline_rank: int,
    states: Mapping[int, StageState],
    passes: Sequence[Mapping[int, PassBytes]],
    *,
    rounds: int,
    micro_batch_tokens: int,
    hidden_bytes: int,
    in_flight: int,
) -> RankMemory:
    """The memory of one process of a pipeline rank; `states` and `passes` (of every phase) are by local stage.

    `rounds` are the micro-batches of a replica in an update; `hidden_bytes` are those of the hidden states of one,
    [b, T, H] in the dtype of training. `in_flight` receives are posted ahead.
    """
    local = [stage.index for stage in stages if stage.pipeline_rank == pipeline_rank]
    walks = []
    for phase, of_phase in zip(objective.phases, passes, strict=True):
        pattern = one_update(stages, phase, pipeline_rank, rounds, objective.delayed)
        walk = _Walk(states, of_phase, duties(phase, stages), stages, hidden_bytes, micro_batch_tokens * TOKEN_BYTES)
        for action in (*pattern.fill, *pattern.body, *(pattern.goes_on or pattern.drains), *pattern.updates):
            walk.do(action)
        walks.append(walk)
    worst = max(walks, key=lambda walk: walk.peak)
    messages = hidden_bytes * _messages(objective, stages, local, in_flight)
    weights, gradients, optimizer, copies = (
        sum(getattr(states[index], name) for index in local) for name in ("weights", "gradients", "optimizer", "copies")
    )
    return RankMemory(
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        copies=copies,
        activations=worst.peak - sum(worst.at_peak),
        buckets=worst.at_peak[1],
        messages=messages,
        peak=weights + optimizer + copies + messages + worst.peak,
        held=max(walk.most_held for walk in walks),
    )


def _messages(objective: Objective, stages: Sequence[StagePlan], local: Sequence[int], in_flight: int) -> int:
    """Message buffers of a rank: receives posted ahead, and one message on its way in every channel that sends."""
    of_phases = [flows(phase, stages) for phase in objective.phases]
    below, above = local[0] > 0, local[-1] + 1 < len(stages)
    down = max(len(crossing(one, local[0])) for one in of_phases)
    coming = max(len(crossing(one, local[-1] + 1)) for one in of_phases)
    return in_flight * (below + coming) + above + down
