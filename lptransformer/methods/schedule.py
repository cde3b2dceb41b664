"""Schedules: the actions of one update on one pipeline rank, in order, as plain data.

One list, several readers: the engine executes it, planning simulates it, people read it as text. The text form of an
action is `<stage><op><micro-batch>` in the letters of torch.distributed.pipelining, with `.<flow>` behind it where a
gradient is meant, for example `1RECV_F3 1F3 1SEND_F3 1I3.0 1SEND_B3.0 1RECV_B2.1 1B2 1U`:

    RECV_F  receive the hidden states of a micro-batch from the stage below
    F       forward, and the loss of the stage's own head
    SEND_F  send the hidden states to the stage above
    I       pull: the gradient of a flow at the stage's input, by a backward that takes no gradient of weights
    RECV_B  receive a flow's gradient at the stage's output from the stage above
    B       backward
    SEND_B  send a flow's gradient at the stage's input to the stage below
    U       update: clip, optimizer step, next learning rate

Micro-batches are numbered within the update and the replica. Sending comes before the local backward, or the next
stage would wait for it, and so does pulling. A rank takes the gradient of a flow as many micro-batches after its own
forward as there are pipeline ranks between it and the flow's highest head: within one span that is 1F1B.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lptransformer.methods.gradient_flow import Duty, duty, flows
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan

RECV_F, SEND_F, RECV_B, SEND_B = "RECV_F", "SEND_F", "RECV_B", "SEND_B"
SENDS, RECEIVES = (SEND_F, SEND_B), (RECV_F, RECV_B)


@dataclass(frozen=True)
class Action:
    stage: int
    op: str
    micro_batch: int | None = None
    flow: int | None = None

    def __str__(self) -> str:
        number = "" if self.micro_batch is None else str(self.micro_batch)
        return f"{self.stage}{self.op}{number}" + ("" if self.flow is None else f".{self.flow}")


def parse(text: str) -> list[Action]:
    """Actions from their text, separated by white space. Raises ValueError for a word that is no action."""
    actions = []
    for word in text.split():
        match = re.fullmatch(r"(\d+)(?:(U)|(F|B|RECV_F|SEND_F)(\d+)|(I|RECV_B|SEND_B)(\d+)\.(\d+))", word)
        if match is None:
            raise ValueError(
                f"{word!r} is no action: expected <stage>U, <stage><op><micro-batch> with op F, B, RECV_F or SEND_F, "
                "or <stage><op><micro-batch>.<flow> with op I, RECV_B or SEND_B"
            )
        stage, update, op, micro_batch, flow_op, flow_micro_batch, flow = match.groups()
        if update:
            actions.append(Action(int(stage), "U"))
        elif op:
            actions.append(Action(int(stage), op, int(micro_batch)))
        else:
            actions.append(Action(int(stage), flow_op, int(flow_micro_batch), int(flow)))
    return actions


@dataclass(frozen=True)
class Pattern:
    """The actions of an update on one pipeline rank, the same in every update.

    All but the updates are in `body`, unless gradients are delayed. Then an update begins with forward passes that the
    one before has already made: `fill` has them for where it could not. After the body, `goes_on` makes those of the
    next update (its micro-batches are numbered on), `drains` makes none. `updates` come last.
    """

    body: tuple[Action, ...]
    updates: tuple[Action, ...]
    fill: tuple[Action, ...] = ()
    goes_on: tuple[Action, ...] = ()
    drains: tuple[Action, ...] = ()

    @property
    def alone(self) -> list[Action]:
        """The actions of an update with nothing before and behind it."""
        return [*self.fill, *self.body, *self.drains, *self.updates]


# A micro-batch to run forward, and (flow, micro-batch) of the gradients to receive after it.
Round = tuple[int | None, list[tuple[int, int]]]


def one_update(
    stages: Sequence[StagePlan], phase: Phase, pipeline_rank: int, micro_batches: int, delayed: bool = False
) -> Pattern:
    """The pattern of one pipeline rank, for `micro_batches` micro-batches of this replica in an update."""
    local = [stage for stage in stages if stage.pipeline_rank == pipeline_rank]
    of_phase = flows(phase, stages)
    duty_of = {stage.index: duty(stage, phase, of_phase) for stage in local}
    coming = [flow for flow in of_phase if flow.bottom <= local[-1].index < flow.top]
    lags = sorted((stages[flow.top].pipeline_rank - pipeline_rank, flow.number) for flow in coming)
    furthest = max((lag for lag, _ in lags), default=0)

    def part(rounds: Iterable[Round]) -> tuple[Action, ...]:
        return tuple(_actions(local, duty_of, rounds))

    updates = tuple(Action(stage.index, "U") for stage in local if stage.trained)
    if not delayed:
        return Pattern(part(_rounds(micro_batches, lags, step) for step in range(micro_batches + furthest)), updates)
    # As many micro-batches in flight as in 1F1B, but never all of an update: what follows it is known with its last.
    ahead = min(furthest, micro_batches - 1)

    def late(forward: range, backward: range) -> tuple[Action, ...]:
        pairs = itertools.zip_longest(forward, backward)
        return part((f, [(flow, b) for _, flow in lags if b is not None]) for f, b in pairs)

    rest = range(micro_batches - ahead, micro_batches)
    return Pattern(
        body=late(range(ahead, micro_batches), range(micro_batches - ahead)),
        updates=updates,
        fill=late(range(ahead), range(0)),
        goes_on=late(range(micro_batches, micro_batches + ahead), rest),
        drains=late(range(0), rest),
    )


def _rounds(micro_batches: int, lags: Sequence[tuple[int, int]], step: int) -> Round:
    received = [(flow, step - lag) for lag, flow in lags if 0 <= step - lag < micro_batches]
    return step if step < micro_batches else None, received


def _actions(local: Sequence[StagePlan], duty_of: Mapping[int, Duty], rounds: Iterable[Round]) -> list[Action]:
    bottom, top = local[0], local[-1]
    actions: list[Action] = []
    here: set[tuple[int, int, int]] = set()  # (stage, micro-batch, flow): the gradient at the stage's output is here
    done: set[Action] = set()  # pulls and backwards

    def do(action: Action, hands_down: int | None) -> None:
        done.add(action)
        actions.append(action)
        if hands_down is None:
            return
        assert action.micro_batch is not None
        if action.stage == bottom.index:
            actions.append(Action(action.stage, SEND_B, action.micro_batch, hands_down))
        else:
            here.add((action.stage - 1, action.micro_batch, hands_down))

    def settle(stage: StagePlan, micro_batch: int) -> None:
        """All that can be done now for a micro-batch in a stage and, with what it hands down, in those below."""
        own = duty_of[stage.index]
        missing = [flow for flow, _ in own.above if (stage.index, micro_batch, flow) not in here]
        pulls = [Action(stage.index, "I", micro_batch, flow) for flow in own.pulls if flow not in missing]
        for pull in pulls:
            if pull not in done:
                do(pull, pull.flow)
        backward = Action(stage.index, "B", micro_batch)
        if stage.trained and not missing and backward not in done:
            do(backward, own.down)
        if own.below and stage is not bottom:
            settle(local[stage.index - 1 - bottom.index], micro_batch)

    for forward, received in rounds:
        if forward is not None:
            for stage in local:
                if stage is bottom and not stage.is_first:
                    actions.append(Action(stage.index, RECV_F, forward))
                actions.append(Action(stage.index, "F", forward))
                if stage is top and not stage.is_last:
                    actions.append(Action(stage.index, SEND_F, forward))
                settle(stage, forward)
        for flow, micro_batch in received:
            actions.append(Action(top.index, RECV_B, micro_batch, flow))
            here.add((top.index, micro_batch, flow))
            settle(top, micro_batch)
    return actions
