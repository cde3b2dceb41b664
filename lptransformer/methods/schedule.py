"""Schedules: the actions of one update on one pipeline rank, in order, as plain data.

One list, several readers: the engine executes it, tests replay it, people read it as text. The text form of an action
is `<stage><op><micro-batch>` in the letters of torch.distributed.pipelining, with `.<flow>` behind it where a gradient
is meant, for example `1RECV_F3 1F3 1SEND_F3 1I3.0 1SEND_B3.0 1RECV_B2.1 1B2 1U`:

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

from lptransformer.methods.gradient_flow import Duty, duties, duty, flows
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan

RECV_F, SEND_F, RECV_B, SEND_B = "RECV_F", "SEND_F", "RECV_B", "SEND_B"
SENDS, RECEIVES = (SEND_F, SEND_B), (RECV_F, RECV_B)
OPS = (RECV_F, "F", SEND_F, "I", RECV_B, "B", SEND_B, "U")


@dataclass(frozen=True)
class Action:
    stage: int
    op: str
    micro_batch: int | None = None
    flow: int | None = None

    def __str__(self) -> str:
        number = "" if self.micro_batch is None else str(self.micro_batch)
        return f"{self.stage}{self.op}{number}" + ("" if self.flow is None else f".{self.flow}")


def to_text(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))


def parse(text: str) -> list[Action]:
    """The inverse of to_text. Raises ValueError for a word that is no action."""
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


def replay(schedules: Sequence[Sequence[Action]], stages: Sequence[StagePlan], phase: Phase, in_flight: int) -> int:
    """Run the schedules of all pipeline ranks against each other without computing anything.

    A message waits in a channel of `in_flight` + 1 places. Returns the greatest number of messages that waited at once.
    Raises AssertionError, with what every rank was about to do, when no rank can go on, when a message is taken in an
    order other than it was sent, when an action comes before what it needs, and when an update leaves work undone.
    """
    duty_of = duties(phase, stages)
    position = [0] * len(schedules)
    channels: dict[tuple[int, str, int | None], list[int | None]] = {}
    done: set[Action] = set()
    most = 0

    def source(action: Action) -> tuple[int, str, int | None]:
        return (action.stage - 1, SEND_F, None) if action.op == RECV_F else (action.stage + 1, SEND_B, action.flow)

    def gradient_made(stage: int, micro_batch: int | None, flow: int) -> Action:
        """The action that made a flow's gradient at the input of a stage."""
        by_pull = flow in duty_of[stage].pulls
        return Action(stage, "I", micro_batch, flow) if by_pull else Action(stage, "B", micro_batch)

    def gradient_at_output(stage: int, micro_batch: int | None, flow: int) -> Action:
        if stages[stage].pipeline_rank == stages[stage + 1].pipeline_rank:
            return gradient_made(stage + 1, micro_batch, flow)
        return Action(stage, RECV_B, micro_batch, flow)

    def needs(action: Action) -> list[Action]:
        stage, i = action.stage, action.micro_batch
        plan, own = stages[stage], duty_of[stage]
        if action.op == "F" and not plan.is_first:
            here = stages[stage - 1].pipeline_rank == plan.pipeline_rank
            return [Action(stage - 1, "F", i) if here else Action(stage, RECV_F, i)]
        if action.op == SEND_F:
            return [Action(stage, "F", i)]
        if action.op == SEND_B:
            assert action.flow is not None
            return [gradient_made(stage, i, action.flow)]
        if action.op == "I":
            assert action.flow in own.pulls, f"{action}: stage {stage} pulls {own.pulls}"
            passing = [flow for flow, _ in own.above if flow == action.flow]
            return [Action(stage, "F", i), *(gradient_at_output(stage, i, flow) for flow in passing)]
        if action.op == "B":
            pulls = [Action(stage, "I", i, flow) for flow in own.pulls]
            above = [gradient_at_output(stage, i, flow) for flow, _ in own.above]
            return [Action(stage, "F", i), *above, *pulls]  # the ordinary backward frees what pulls need
        if action.op == "U":
            return [Action(stage, "B", other.micro_batch) for other in done if (other.stage, other.op) == (stage, "F")]
        return []

    def feasible(action: Action) -> bool:
        if action.op in RECEIVES:
            waiting = channels.get(source(action), [])
            assert not waiting or waiting[0] == action.micro_batch, f"{action}: the message waiting is {waiting[0]}"
            return bool(waiting)
        missing = [need for need in needs(action) if need not in done]
        assert not missing, f"{action} before {to_text(missing)}"
        return action.op not in SENDS or len(channels.get((action.stage, action.op, action.flow), [])) <= in_flight

    while any(position[rank] < len(schedule) for rank, schedule in enumerate(schedules)):
        moved = False
        for rank, schedule in enumerate(schedules):
            while position[rank] < len(schedule) and feasible(action := schedule[position[rank]]):
                assert action not in done, f"{action} twice"
                assert Action(action.stage, "U") not in done, f"{action} after {Action(action.stage, 'U')}"
                if action.op in SENDS:
                    channels.setdefault((action.stage, action.op, action.flow), []).append(action.micro_batch)
                elif action.op in RECEIVES:
                    channels[source(action)].pop(0)
                most = max(most, *(len(waiting) for waiting in channels.values()), 0)
                done.add(action)
                position[rank] += 1
                moved = True
        blocked = {
            rank: str(schedule[position[rank]])
            for rank, schedule in enumerate(schedules)
            if position[rank] < len(schedule)
        }
        assert moved or not blocked, f"deadlock: pipeline ranks are about to do {blocked}"
    assert all(not waiting for waiting in channels.values()), f"messages nobody received: {channels}"
    return most
