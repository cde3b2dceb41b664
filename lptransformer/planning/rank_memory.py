"""Bytes that one process of a pipeline rank takes at its peak, by the actions of its schedule. No torch.

What stages are made of (planning/stage_state.py) and what a micro-batch takes in them (`PassBytes`) comes in:
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
from dataclasses import dataclass, field

from lptransformer.methods.gradient_flow import Duty, Flow, crossing, duties, flows
from lptransformer.methods.objectives import Objective
from lptransformer.methods.schedule import Action, one_update
from lptransformer.methods.stages import StagePlan
from lptransformer.planning.stage_state import Precision, StageState, StageTensors, stage_state

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
