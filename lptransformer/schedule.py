"""Schedules: the actions of one update on one pipeline rank, in order, as plain data.

One list, several readers: the engine executes it, tests replay it, people read it as text. The text form of an action
is `<stage><op><micro-batch>`, for example `0R3 0F3 0S3 0B3 0U`:

    R  receive the hidden states of a micro-batch from the stage below
    F  forward
    S  send the hidden states to the stage above
    RG receive the gradient at the stage's output from the stage above
    B  backward
    SG send the gradient at the stage's input to the stage below
    U  update: clip, optimizer step, next learning rate

Micro-batches are numbered within the update and the replica. Sending comes before the local backward, or the next
stage would wait for it. A stage whose output needs a gradient from above keeps one micro-batch in flight for every
pipeline rank that its span has above it: 1F1B within the span.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lptransformer.partition import StagePlan

OPS = ("R", "F", "S", "RG", "B", "SG", "U")


@dataclass(frozen=True)
class Action:
    stage: int
    op: str
    micro_batch: int | None = None

    def __str__(self) -> str:
        return f"{self.stage}{self.op}{'' if self.micro_batch is None else self.micro_batch}"


def to_text(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))


def parse(text: str) -> list[Action]:
    """The inverse of to_text. Raises ValueError for a word that is no action."""
    actions = []
    for word in text.split():
        match = re.fullmatch(r"(\d+)(RG|SG|[RFSBU])(\d*)", word)
        if match is None or (match[2] == "U") != (match[3] == ""):
            raise ValueError(f"{word!r} is no action: expected <stage><op><micro-batch>, op one of {', '.join(OPS)}")
        actions.append(Action(int(match[1]), match[2], int(match[3]) if match[3] else None))
    return actions


def one_update(stages: Sequence[StagePlan], pipeline_rank: int, micro_batches: int) -> list[Action]:
    """The actions of one update on one pipeline rank, for `micro_batches` micro-batches of this replica."""
    local = [stage for stage in stages if stage.pipeline_rank == pipeline_rank]
    actions: list[Action] = []

    def backward(stage: StagePlan, micro_batch: int) -> None:
        if stage.gradient_above:
            actions.append(Action(stage.index, "RG", micro_batch))
        actions.append(Action(stage.index, "B", micro_batch))
        if stage.gradient_below:
            actions.append(Action(stage.index, "SG", micro_batch))

    waiting = [(stage, _ranks_above(stages, stage)) for stage in local if stage.gradient_above]
    for micro_batch in range(micro_batches):
        for stage in local:
            if stage is local[0] and not stage.is_first:
                actions.append(Action(stage.index, "R", micro_batch))
            actions.append(Action(stage.index, "F", micro_batch))
            if stage is local[-1] and not stage.is_last:
                actions.append(Action(stage.index, "S", micro_batch))
            if not stage.gradient_above:
                backward(stage, micro_batch)
        for stage, ahead in waiting:
            if micro_batch >= ahead:
                backward(stage, micro_batch - ahead)
    for stage, ahead in waiting:
        for micro_batch in range(max(0, micro_batches - ahead), micro_batches):
            backward(stage, micro_batch)
    return actions + [Action(stage.index, "U") for stage in local]


def _ranks_above(stages: Sequence[StagePlan], stage: StagePlan) -> int:
    """How many pipeline ranks the stage's span still has above this stage."""
    return len({other.pipeline_rank for other in stages if other.span == stage.span and other.index > stage.index})


def replay(schedules: Sequence[Sequence[Action]], stages: Sequence[StagePlan], in_flight: int) -> int:
    """Run the schedules of all pipeline ranks against each other without computing anything.

    A message waits in a channel of `in_flight` + 1 places. Returns the greatest number of messages that waited at once.
    Raises AssertionError, with what every rank was about to do, when no rank can go on, when a message is taken in an
    order other than it was sent, and when an action comes before what it needs.
    """
    position = [0] * len(schedules)
    channels: dict[tuple[int, str], list[int | None]] = {}
    done: set[Action] = set()
    most = 0

    def feasible(action: Action) -> bool:
        plan = stages[action.stage]
        if action.op in ("R", "RG"):
            source = (action.stage - 1, "S") if action.op == "R" else (action.stage + 1, "SG")
            waiting = channels.get(source, [])
            assert not waiting or waiting[0] == action.micro_batch, f"{action}: the message waiting is {waiting[0]}"
            return bool(waiting)
        if action.op in ("S", "SG"):
            needs = Action(action.stage, "F" if action.op == "S" else "B", action.micro_batch)
            assert needs in done, f"{action} before {needs}"
            return len(channels.get((action.stage, action.op), [])) <= in_flight
        if action.op == "F" and not plan.is_first:
            below = stages[action.stage - 1]
            needs = (
                Action(below.index, "F", action.micro_batch)
                if below.pipeline_rank == plan.pipeline_rank
                else Action(action.stage, "R", action.micro_batch)
            )
            assert needs in done, f"{action} before {needs}"
        if action.op == "B":
            ops = ("F", "RG") if plan.gradient_above else ("F",)
            missing = [need for op in ops if (need := Action(action.stage, op, action.micro_batch)) not in done]
            assert not missing, f"{action} before {to_text(missing)}"
        if action.op == "U":
            forwards = [other for other in done if (other.stage, other.op) == (action.stage, "F")]
            backwards = [Action(forward.stage, "B", forward.micro_batch) for forward in forwards]
            missing = [need for need in backwards if need not in done]
            assert not missing, f"{action} before {to_text(missing)}"
        return True

    while any(position[rank] < len(schedule) for rank, schedule in enumerate(schedules)):
        moved = False
        for rank, schedule in enumerate(schedules):
            while position[rank] < len(schedule) and feasible(action := schedule[position[rank]]):
                assert action not in done, f"{action} twice"
                assert Action(action.stage, "U") not in done, f"{action} after {Action(action.stage, 'U')}"
                if action.op in ("S", "SG"):
                    channels.setdefault((action.stage, action.op), []).append(action.micro_batch)
                elif action.op in ("R", "RG"):
                    channels[(action.stage - 1, "S") if action.op == "R" else (action.stage + 1, "SG")].pop(0)
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
