"""Executes the actions of a schedule on the stages of one pipeline rank: what is computed, kept, sent and received.

One phase of the objective after another may need another schedule; the engine decides which one an update takes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.profiler import record_function

from lptransformer.data.token_set import Batch
from lptransformer.engine.clipping import ClipGroup, local_clip_groups
from lptransformer.engine.deepspeed_stage import FrozenStage, StepResult, TrainedStage
from lptransformer.engine.p2p import Control, Header, Kind, Neighbours
from lptransformer.engine.process_groups import World
from lptransformer.engine.transfers import Batches, on_device
from lptransformer.errors import DataError
from lptransformer.methods.gradient_flow import Duty
from lptransformer.methods.schedule import RECV_B, RECV_F, SEND_B, SEND_F, Action, Pattern, one_update
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.border_codec import BorderCodec, as_received, make_codec
from lptransformer.models.head import LossBatch, token_positions
from lptransformer.models.stage import StageOutput, add, backward_loss
from lptransformer.run_folder.trace import Tracer

LocalStage = TrainedStage | FrozenStage


@dataclass
class Pass:
    """A forward pass that waits for its backward."""

    inputs: Tensor
    output: StageOutput
    pulled: int = 0


@dataclass
class Update:
    """The results of an update so far; the sums of its losses, by stage and micro-batch, are on the host when it is
    made."""

    number: int
    control: Control = Control.NOTHING
    loss_sums: dict[int, Tensor] = field(default_factory=dict)
    step_results: dict[int, StepResult] = field(default_factory=dict)

    def losses(self, index: int) -> list[float]:
        """The sum of a stage's losses for each micro-batch, in nats; none of a stage without a head."""
        return self.loss_sums[index].tolist() if index in self.loss_sums else []


@dataclass(frozen=True)
class PhaseWork:
    """The schedule of a phase on this pipeline rank, and on the one below, and what its actions need to know."""

    pattern: Pattern
    below: Pattern | None
    duties: Sequence[Duty]
    clip_groups: dict[int, ClipGroup]
    slots_below: list[int]  # the flows that cross the border below this rank: which channel each one takes
    slots_above: list[int]

    @property
    def is_alone(self) -> bool:
        """Whether the ranks below make such an update, and begin the next one, without anything from this one."""
        return not self.slots_below and all(group.group is None for group in self.clip_groups.values())


def plan_phases(world: World, blueprint: Blueprint, local: Mapping[int, LocalStage]) -> list[PhaseWork]:
    """The work of every phase on this pipeline rank."""
    trained = {index: stage for index, stage in local.items() if isinstance(stage, TrainedStage)}
    stages, delayed, rank = blueprint.stages, blueprint.objective.delayed, world.pipeline_rank
    return [
        PhaseWork(
            one_update(stages, plan.phase, rank, blueprint.rounds, delayed),
            one_update(stages, plan.phase, rank - 1, blueprint.rounds, delayed) if rank > 0 else None,
            plan.duties,
            local_clip_groups(world, stages, plan.clip_groups, trained, str(number)),
            plan.crossing(min(local)),
            plan.crossing(max(local) + 1),
        )
        for number, plan in enumerate(blueprint.phases)
    ]


class Executor:
    """Executes the actions of a phase on the stages of this process."""

    def __init__(
        self,
        world: World,
        blueprint: Blueprint,
        local: Mapping[int, LocalStage],
        neighbours: Neighbours,
        batch: Callable[[int], Batch],
        label_tokens: Callable[[int, float], int],
        decide: Callable[[], Control],
    ) -> None:
        """`batch` gives a micro-batch by its number since the start of the run, over all replicas, `label_tokens` the
        labels of an update that a head with a fraction sees (TrainingEngine.label_tokens).

        `decide` gives what is to follow an update; it is called on pipeline rank 0, once per update.
        """
        self.world = world
        self.blueprint = blueprint
        self.local = local
        self.neighbours = neighbours
        self.rounds = blueprint.rounds
        self.batches = Batches(batch, world.device)
        self.label_tokens = label_tokens
        self.decide = decide
        self.tracer: Tracer | None = None  # while an update is traced
        # A channel encodes what it carries by itself.
        inside = [index for index in blueprint.codecs if index in local and index + 1 in local]
        self._codecs: dict[int, BorderCodec] = {index: make_codec(blueprint.codecs[index]) for index in inside}
        self._actions: dict[str, Callable[[LocalStage, Action], None]] = {
            RECV_F: self._receive,
            "F": self._forward,
            SEND_F: self._send,
            "I": self._pull,
            RECV_B: self._receive_gradient,
            "B": self._backward,
            SEND_B: self._send_gradient,
            "U": self._update,
        }
        # Keyed by the number of the micro-batch since the start of the run.
        self._hidden: dict[tuple[int, int], Tensor] = {}  # (stage, micro-batch): its output, detached
        self._passes: dict[tuple[int, int], Pass] = {}
        self._gradients: dict[tuple[int, int, int], Tensor] = {}  # (stage, micro-batch, flow): at the stage's output
        self._norms: dict[int, Tensor | None] | None = None  # of the clip groups, when they are known
        self._expected = -1  # the newest update whose first messages from below are expected
        self._next: Update | None = None  # the update whose first forward passes were made in the one before

    @property
    def between_updates(self) -> bool:
        """Whether nothing of the next update has begun; only with delayed gradients it begins early."""
        return self._next is None

    def run(self, work: PhaseWork, number: int, following: PhaseWork | None) -> Update:
        """All actions of update `number` (counted from 0), in the order of the schedule. `following` is the work of the
        update after it, None where the run ends."""
        pattern, self._work, self._following = work.pattern, work, following
        self._now = self._next or Update(number)
        assert self._now.number == number
        if self._expected < number:
            self._expect(number, work, "fill", "body")
        self._do(pattern.body if self._next else (*pattern.fill, *pattern.body))
        self._next = None
        if pattern.goes_on and not self._now.control and following is not None:
            self._next = Update(number + 1)
            self._do(pattern.goes_on)
        else:
            self._do(pattern.drains)
        self._do(pattern.updates)
        self._bring_results()
        ended = (number + 1) * self.rounds
        left = [key for kept in (self._hidden, self._passes, self._gradients) for key in kept if key[1] < ended]
        assert not left, f"an update left something behind: {left}"
        self.batches.forget(self._number(ended))
        self._norms = None
        return self._now

    def _expect(self, number: int, work: PhaseWork, *parts: str) -> None:
        """What the rank below does in these parts of its pattern, up to the updates of update `number`."""
        self._expected = max(self._expected, number)
        for part in parts if work.below is not None else ():
            assert self.neighbours.below is not None
            self.neighbours.below.expect(getattr(work.below, part))

    def _do(self, actions: Sequence[Action]) -> None:
        profiled = torch.autograd._profiler_enabled()
        for action in actions:
            if self.tracer is None and not profiled:
                self._actions[action.op](self.local[action.stage], action)
                continue
            with contextlib.ExitStack() as watched:
                if profiled:
                    watched.enter_context(record_function(str(action)))
                if self.tracer is not None:
                    watched.enter_context(self.tracer.action(str(action)))
                self._actions[action.op](self.local[action.stage], action)

    def index(self, micro_batch: int) -> int:
        """The number within the update of this replica's `micro_batch`-th micro-batch."""
        return micro_batch % self.rounds * self.world.data_size + self.world.data_rank

    def _of(self, action: Action) -> tuple[Update, int]:
        """The update that an action belongs to, and its micro-batch counted from the start, on this replica."""
        assert action.micro_batch is not None, f"{action} is of no micro-batch"
        update = self._now if action.micro_batch < self.rounds else self._next
        assert update is not None
        return update, self._now.number * self.rounds + action.micro_batch

    def _number(self, micro_batch: int) -> int:
        """The number since the start of the run, over all replicas."""
        return micro_batch * self.world.data_size + self.world.data_rank

    def _batch(self, micro_batch: int) -> Batch:
        """On the device."""
        is_last = self._following is None and micro_batch + 1 == (self._now.number + 1) * self.rounds
        return self.batches.get(self._number(micro_batch), None if is_last else self._number(micro_batch + 1))

    def _digest(self, micro_batch: int) -> int:
        self._batch(micro_batch)
        return self.batches.on_host(self._number(micro_batch)).digest

    def _show_weights(self, stage: LocalStage, update: Update) -> None:
        """Delayed gradients: an update runs at the weights of one update before, what begins early at the current
        ones."""
        if isinstance(stage, TrainedStage) and stage.versions is not None:
            stage.versions.show(before=update is self._now)

    # ------------------------------------------------------------------------------------------ compute

    def _forward(self, stage: LocalStage, action: Action) -> None:
        update, micro_batch = self._of(action)
        plan, duty, batch = stage.plan, self._work.duties[stage.plan.index], self._batch(micro_batch)
        if plan.is_first:
            inputs = batch.input_ids
        else:
            inputs = self._hidden.pop((plan.index - 1, micro_batch)).requires_grad_(bool(duty.below))
        self._show_weights(stage, update)
        output = stage.forward(inputs, self._loss_batch(plan.index, batch, self._number(micro_batch)), duty.split)
        if (loss := output.nll_sum) is not None:
            if plan.index not in update.loss_sums:
                # A scalar of every micro-batch would lie between what the others leave free in a CPU's heap.
                update.loss_sums[plan.index] = loss.new_full([self.rounds], math.nan)
            update.loss_sums[plan.index][micro_batch % self.rounds] = loss.detach()
        if plan.trained or duty.pulls:
            self._passes[plan.index, micro_batch] = Pass(inputs, output)
        if not plan.is_last:
            self._hidden[plan.index, micro_batch] = self.handed_over(plan.index, output.hidden_states)

    def _loss_batch(self, index: int, batch: Batch, number: int) -> LossBatch:
        """What the loss of a stage sees of the micro-batch `number` since the start of the run."""
        scale, positions = 0.0, None
        fraction = self.blueprint.head_fractions.get(index)
        if fraction is not None:
            seen = self.label_tokens(number // self.blueprint.micro_batches, fraction)
            # DeepSpeed averages gradients over replicas: they have to add up to the mean over tokens. An update without
            # a label has no mean, and is skipped as one whose gradient is not finite.
            scale = self.world.data_size / seen if seen else math.nan
            if fraction < 1.0:
                block, (rows, length, _) = self.local[index].plan.last_block, self.blueprint.hidden_shape
                labels = self.batches.on_host(number).labels
                drawn = token_positions(self.blueprint.seed, block, number, rows, length, fraction, labels)
                positions = on_device(drawn, self.world.device)
        share = 1.0 / self.rounds
        return LossBatch(batch.labels, scale, positions, share, batch.position_ids, batch.document_ids)

    def handed_over(self, index: int, hidden_states: Tensor) -> Tensor:
        """A stage's output as the next stage receives it, detached."""
        hidden_states = hidden_states.detach()
        return as_received(hidden_states, self._codecs[index]) if index in self._codecs else hidden_states

    def _pull(self, stage: LocalStage, action: Action) -> None:
        index, flow, (_, micro_batch) = action.stage, action.flow, self._of(action)
        assert flow is not None
        waiting, duty = self._passes[index, micro_batch], self._work.duties[index]
        parts = [waiting.output.loss_gradient] if duty.own == flow else []
        parts += [self._gradients[index, micro_batch, number] for number, _ in duty.above if number == flow]
        gradient = add(part for part in parts if part is not None)
        assert waiting.output.pull is not None and gradient is not None
        self._gradients[index - 1, micro_batch, flow] = waiting.output.pull(gradient)
        waiting.pulled += 1
        if not stage.plan.trained and waiting.pulled == len(duty.pulls):  # no backward pass follows
            del self._passes[index, micro_batch]
            for number, _ in duty.above:
                del self._gradients[index, micro_batch, number]

    def _backward(self, stage: LocalStage, action: Action) -> None:
        index, (update, micro_batch) = action.stage, self._of(action)
        done, duty = self._passes.pop((index, micro_batch)), self._work.duties[index]
        above = [(self._gradients.pop((index, micro_batch, flow)), weight) for flow, weight in duty.above]
        loss = backward_loss(done.output, duty, above)
        assert isinstance(stage, TrainedStage)
        self._show_weights(stage, update)
        stage.backward(loss)
        if duty.down is not None:
            assert done.inputs.grad is not None
            self._gradients[index - 1, micro_batch, duty.down] = done.inputs.grad

    def _update(self, stage: LocalStage, action: Action) -> None:
        assert isinstance(stage, TrainedStage)
        if self._norms is None:
            self._norms = self._find_norms()
        self._now.step_results[action.stage] = stage.update(self._norms[id(self._work.clip_groups[action.stage])])

    def _find_norms(self) -> dict[int, Tensor | None]:
        """Of all clip groups that update here. With what is known of them the losses come to the host."""
        groups = [self._work.clip_groups[action.stage] for action in self._work.pattern.updates]
        groups = list({id(group): group for group in groups}.values())
        own = [group.own_norms() for group in groups]
        here = self._bring_results([norms for norms in own if norms is not None])
        return {id(g): None if norms is None else g.norm(here.pop(0)) for g, norms in zip(groups, own, strict=True)}

    def _bring_results(self, norms: Sequence[Tensor] = ()) -> list[Tensor]:
        """Bring the losses of the update, and what steps have found of norms, to the host, with these norms, in one
        copy; nothing where all is there. Where there are norms to come (ZeRO 3) the losses wait for them."""
        now = self._now
        if not norms and self._norms is None and self._work.pattern.updates:
            return []
        found = {index: r.grad_norm for index, r in now.step_results.items() if isinstance(r.grad_norm, Tensor)}
        here = to_host([*norms, *now.loss_sums.values(), *found.values()])
        own, rest = here[: len(norms)], iter(here[len(norms) :])
        now.loss_sums = {index: next(rest) for index in now.loss_sums}
        for index in found:
            now.step_results[index] = replace(now.step_results[index], grad_norm=next(rest).item())
        return own

    # ------------------------------------------------------------------------------------------ messages

    def _receive(self, stage: LocalStage, action: Action) -> None:
        assert self.neighbours.below is not None
        update, micro_batch = self._of(action)
        header, hidden_states = self.neighbours.below.receive()
        self._check(header, Kind.TRAIN, update, micro_batch)
        if header.digest not in (0, self._digest(micro_batch)):
            raise DataError(
                f"update {update.number + 1}, micro-batch {header.micro_batch}: pipeline rank "
                f"{self.world.pipeline_rank} (process {self.world.global_rank}) has other rows than the one below: "
                "every process must be given the same training data, in the same order"
            )
        update.control |= header.control
        self._hidden[action.stage - 1, micro_batch] = hidden_states
        if (micro_batch + 1) % self.rounds == 0 and update is self._now:
            self._expect_following(update)

    def _expect_following(self, update: Update) -> None:
        """The last message of the update is here, and with it what the rank below does next. Where gradients are
        delayed it begins the next update; else it does so where nothing else comes first."""
        assert self._work.below is not None
        goes_on = self._following is not None and not update.control
        if self._work.below.goes_on and goes_on:
            self._expect(update.number + 1, self._work, "goes_on", "body")
            return
        self._expect(update.number, self._work, "drains")
        comes_first = update.control & (Control.EVALUATE | Control.STOP) or self._work.below.goes_on
        if self._following is not None and self._work.is_alone and not comes_first:
            self._expect(update.number + 1, self._following, "body")

    def _send(self, stage: LocalStage, action: Action) -> None:
        assert self.neighbours.above is not None
        update, micro_batch = self._of(action)
        if self.world.pipeline_rank == 0 and (micro_batch + 1) % self.rounds == 0:
            update.control = self.decide()
        digest = self._digest(micro_batch)
        header = Header(Kind.TRAIN, update.number, self.index(micro_batch), update.control, digest)
        self.neighbours.above.send(header, self._hidden.pop((action.stage, micro_batch)))

    def _receive_gradient(self, stage: LocalStage, action: Action) -> None:
        assert action.flow is not None
        update, micro_batch = self._of(action)
        header, gradient = self.neighbours.gradients_above[self._work.slots_above.index(action.flow)].receive()
        self._check(header, Kind.GRADIENT, update, micro_batch)
        self._gradients[action.stage, micro_batch, action.flow] = gradient

    def _send_gradient(self, stage: LocalStage, action: Action) -> None:
        assert action.flow is not None
        update, micro_batch = self._of(action)
        header = Header(Kind.GRADIENT, update.number, self.index(micro_batch))
        gradient = self._gradients.pop((action.stage - 1, micro_batch, action.flow))
        self.neighbours.gradients_below[self._work.slots_below.index(action.flow)].send(header, gradient)
        assert self.neighbours.below is not None
        self.neighbours.below.answered()

    def _check(self, header: Header, kind: Kind, update: Update, micro_batch: int) -> None:
        expected = (kind, update.number, self.index(micro_batch))
        assert (header.kind, header.update, header.micro_batch) == expected, f"expected {expected}, received {header}"


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Scalars and vectors on the host, in their dtypes: one copy for all that are not there, for which the host waits.
    Norms are there where the optimizer is offloaded."""
    there = [tensor.detach().reshape(-1).double() for tensor in tensors if tensor.is_cuda]
    parts = iter(torch.cat(there).cpu().split([len(flat) for flat in there]) if there else ())
    return [next(parts).to(one.dtype).view(one.shape) if one.is_cuda else one.detach().clone() for one in tensors]
