"""What an update takes under an objective of this program: the engine's own schedules, replayed with costs.

The gradients of a stage are summed over its replicas when all of them are there, before its update; ZeRO 2 scatters
them after every backward pass; ZeRO 3 gathers weights and scatters gradients in every micro-batch, beside the compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lptransformer import partition, rivals, simulate, wavefront
from lptransformer.cost import ModelCosts
from lptransformer.devices import Cluster
from lptransformer.gradients import crossing, flows
from lptransformer.objective import Objective
from lptransformer.partition import StagePlan
from lptransformer.rank_memory import RankMemory
from lptransformer.simulate import Link, StageSeconds
from lptransformer.workload import (
    Candidate,
    Prediction,
    RankRow,
    Work,
    border_links,
    fits,
    fused_step,
    predicted,
    update_seconds,
)

if TYPE_CHECKING:
    from lptransformer.stage_memory import EmptyStages


def stage_seconds(
    stages: Sequence[StagePlan], work: Work, cluster: Cluster, data: int, zero_stage: int
) -> list[StageSeconds]:
    """What the engine's actions take. The update has the sum of gradients over the replicas with it."""
    costs, device = work.costs, cluster.device
    tokens = work.micro_batch_tokens
    found = []
    for stage in stages:
        blocks = stage.num_blocks * costs.block_flops
        head = costs.head_training_flops(stage.is_last)
        forward = device.compute_seconds(tokens * blocks, work.dtype)
        forward += device.head_seconds(tokens * stage.has_head * head, work.dtype)
        pull = device.compute_seconds(tokens * blocks, work.dtype)
        own, _ = partition.weights_of(stage, costs)
        backward, reduction = 2 * pull, own * work.states.gradients
        if zero_stage == 3:
            gather = cluster.ring_seconds(own * work.states.weights, data, 1, stage.num_blocks)
            forward += rivals.exposed_reduction(gather, forward, stage.num_blocks)
            both = gather + cluster.ring_seconds(reduction, data, 1, stage.num_blocks)
            backward += rivals.exposed_reduction(both, backward, stage.num_blocks)
        update = update_seconds(own, work, cluster, data, zero_stage)
        if zero_stage == 2:  # gradients are scattered in every backward pass, weights gathered once
            backward += cluster.ring_seconds(reduction, data, 1)
            update += cluster.ring_seconds(own * work.states.weights, data, 1)
        elif zero_stage < 2:
            update += cluster.ring_seconds(reduction, data)
        found.append(StageSeconds(forward, backward, pull, update if stage.trained else 0.0))
    return found


def of_objective(
    method: str,
    goal: Objective,
    work: Work,
    cluster: Cluster,
    pipeline: int,
    data: int,
    *,
    zero_stage: int,
    sizes: Sequence[int] | None = None,
    head: str = "private",
    steps: int = 1000,
    empty: EmptyStages | None = None,
) -> Candidate:
    """A method of this program: `goal` on pipeline ranks of `sizes` blocks (None: as partition.py balances them).

    Without the `empty` stages nothing is said of memory.
    """
    stages = partition.cut(goal, pipeline, work.costs, "balanced" if sizes is None else list(sizes))
    rounds = work.micro_batches // data
    if goal.delayed:  # every update copies one version of the weights to the other (versions.py)
        moved = 2 * work.states.weights
        work = replace(work, update_bytes=work.update_bytes + moved)
    of_ranks = [RankMemory()] * pipeline
    if empty is not None:
        how = replace(work.states, zero_stage=zero_stage, replicas=data, fused_step=fused_step(cluster.device))
        size = work.micro_batch_size
        of_ranks = empty.ranks(goal, stages, how, micro_batch_size=size, rounds=rounds, in_flight=work.in_flight)
    seconds = stage_seconds(stages, work, cluster, data, zero_stage)
    most = max(rank.peak for rank in of_ranks)

    def busy(rank: int) -> float:
        mine = [(stage, time) for stage, time in zip(stages, seconds, strict=True) if stage.pipeline_rank == rank]
        return sum(rounds * (time.forward + stage.trained * time.backward) + time.update for stage, time in mine)

    def evaluate() -> Prediction:
        messages, down = _messages(goal, stages, work)
        links = border_links(cluster, data, messages, work.channel)
        step, idle = _replayed(goal, stages, seconds, links, rounds, work.in_flight, steps)
        weights = [partition.weights_of(stage, work.costs)[0] * stage.trained for stage in stages]
        of_rank = [
            sum(w for w, s in zip(weights, stages, strict=True) if s.pipeline_rank == r) for r in range(pipeline)
        ]
        reduced = max(of_rank) * work.states.gradients
        passes = {3: 3 * rounds, 2: rounds + 1}.get(zero_stage, 2)
        rows = []
        for rank in range(pipeline):
            local = [stage for stage in stages if stage.pipeline_rank == rank]
            kinds = [_head_name(stage, head) for stage in local]
            rows.append(
                RankRow(
                    rank,
                    f"{local[0].first_block}-{local[-1].last_block}",
                    " + ".join(dict.fromkeys(kind for kind in kinds if kind)) or "none",
                    sum(partition.weights_of(stage, work.costs)[0] for stage in local),
                    sum(_forward_flops(stage, work.costs) for stage in local),
                    of_ranks[rank],
                    idle[rank],
                )
            )
        return predicted(
            work,
            cluster,
            data,
            method=method,
            local=not _is_backprop(goal),
            pipeline=pipeline,
            zero_stage=zero_stage,
            recompute=0.0,
            memory_bytes=most,
            step_seconds=step,
            idle_shares=idle,
            up_bytes=work.micro_batches * max(messages, default=0.0),
            down_bytes=work.micro_batches * max(down, default=0) * work.activations.rows,
            reduced_bytes=passes * (data - 1) / data * reduced,
            reduction_seconds=cluster.ring_seconds(reduced, data, passes),
            update_seconds=update_seconds(max(of_rank), work, cluster, data, zero_stage),
            ranks=rows,
        )

    return Candidate(fits(most, cluster), most, max(busy(rank) for rank in range(pipeline)), evaluate)


def _replayed(
    goal: Objective,
    stages: Sequence[StagePlan],
    seconds: Sequence[StageSeconds],
    links: Sequence[Link],
    rounds: int,
    in_flight: int,
    steps: int,
) -> tuple[float, list[float]]:
    """Seconds of an update in steady state and the idle share of every rank; the mean over the phases of a run."""
    numbers = [goal.phase_at(update, steps) for update in range(steps)] if len(goal.phases) > 1 else [0]
    total, idle = 0.0, [0.0] * (stages[-1].pipeline_rank + 1)
    for number, phase in enumerate(goal.phases):
        share = numbers.count(number) / len(numbers)
        alone = Objective(goal.num_blocks, phase, delayed=goal.delayed)
        ranks = wavefront.rounds(alone, stages, seconds, phase)
        if ranks is not None:
            steady = wavefront.steady(ranks, micro_batches=rounds, in_flight=in_flight, links=links)
            step, shares = steady.update_seconds, steady.idle_shares
        else:
            timeline = simulate.simulate(
                alone, stages, seconds, micro_batches=rounds, updates=6, in_flight=in_flight, link=links
            )
            step, shares = timeline.steady_update_seconds(), timeline.idle_shares()
        total += share * step
        idle = [before + share * step * one for before, one in zip(idle, shares, strict=True)]
    return total, [one / total for one in idle]


def _is_backprop(goal: Objective) -> bool:
    """Whether it trains as plain backprop does: one loss for all blocks, at the weights as they are."""
    whole = all(span.first == 0 and span.last == goal.num_blocks - 1 for span in goal.usual.spans)
    return whole and not goal.delayed


def _messages(goal: Objective, stages: Sequence[StagePlan], work: Work) -> tuple[list[float], list[int]]:
    """Of every border between pipeline ranks: bytes of a micro-batch's hidden states, and how many gradients come back.

    Hidden states are rounded behind a head whose border never carries a gradient (docs/design.md), and nowhere else.
    """
    of_phases = [flows(phase, stages) for phase in goal.phases]
    messages, down = [], []
    for below, above in zip(stages, stages[1:], strict=False):
        if below.pipeline_rank != above.pipeline_rank:
            down.append(max(len(crossing(one, above.index)) for one in of_phases))
            rounded = below.has_head and down[-1] == 0
            messages.append(work.rounded_bytes if rounded else work.activations.rows)
    return messages, down


def _head_name(stage: StagePlan, head: str) -> str:
    return ("the model's own" if stage.is_last else head) if stage.has_head else ""


def _forward_flops(stage: StagePlan, costs: ModelCosts) -> float:
    head = costs.head_flops if stage.is_last else costs.auxiliary_flops
    return stage.num_blocks * costs.block_flops + stage.has_head * head
