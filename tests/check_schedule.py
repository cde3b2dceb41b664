"""Schedules of all pipeline ranks, run against each other without computing: are they complete, free of deadlock?"""

from __future__ import annotations

from collections.abc import Sequence

from lptransformer.methods.gradient_flow import duties
from lptransformer.methods.schedule import RECEIVES, RECV_B, RECV_F, SEND_B, SEND_F, SENDS, Action
from lptransformer.methods.spans import Phase
from lptransformer.methods.stages import StagePlan


def to_text(actions: Sequence[Action]) -> str:
    return " ".join(map(str, actions))


def check_schedules(
    schedules: Sequence[Sequence[Action]], stages: Sequence[StagePlan], phase: Phase, in_flight: int
) -> int:
    """Run the schedules of all pipeline ranks in an update of `phase`; returns the most messages that waited at once.

    A message waits in a channel of `in_flight` + 1 places.
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
