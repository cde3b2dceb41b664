"""What an update takes under the methods of others: pipelines of backprop, and data parallel training.

They sum gradients over replicas while the last backward pass runs (rivals.exposed_reduction), messages never wait for
their receiver, and where their activations do not fit they may make those of some blocks again in the backward pass (a
forward pass more of these blocks). This program does not do that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lptransformer import memory, objective, partition, rivals
from lptransformer.cost import ModelCosts
from lptransformer.devices import Cluster
from lptransformer.memory import RankBytes
from lptransformer.objective import Objective
from lptransformer.rivals import ChunkSeconds
from lptransformer.workload import (
    USABLE_MEMORY,
    Candidate,
    Prediction,
    Work,
    balanced_sizes,
    border_links,
    update_seconds,
)


@dataclass(frozen=True)
class Rival:
    """A schedule of others: so many chunks per rank, and its tasks for a number of micro-batches.

    Of one `family` the fastest is shown.
    """

    family: str
    name: str
    chunks: int
    make: Callable[[int, int], rivals.Schedule]  # (ranks, micro-batches)
    whole_groups: bool = False  # micro-batches must be a multiple of the ranks


RIVALS = (
    Rival("1F1B", "backprop, 1F1B", 1, rivals.one_f_one_b),
    Rival("interleaved", "backprop, interleaved x 2", 2, lambda p, m: rivals.interleaved(p, m, 2), True),
    Rival("interleaved", "backprop, interleaved x 4", 4, lambda p, m: rivals.interleaved(p, m, 4), True),
    Rival("zero bubble", "backprop, zero bubble H1", 1, rivals.zero_bubble_h1),
    Rival("zero bubble", "backprop, zero bubble V", 2, rivals.zero_bubble_v),
)


def of_rival(
    rival: Rival, work: Work, cluster: Cluster, pipeline: int, data: int, *, zero_stage: int, recompute: float
) -> Candidate | None:
    """A pipeline of others, or None where it cannot be: too few blocks, micro-batches that do not come in groups."""
    rounds = work.micro_batches // data
    parts = pipeline * rival.chunks
    if pipeline == 1 or parts > work.num_blocks or (rival.whole_groups and rounds % pipeline):
        return None
    costs, tokens = work.costs, work.micro_batch_tokens
    sizes = balanced_sizes(work.num_blocks, parts, costs.block_flops, costs.head_flops)
    block = cluster.device.compute_seconds(tokens * costs.block_flops, work.dtype)
    head = cluster.device.head_seconds(tokens * costs.head_flops, work.dtype)
    seconds = [
        ChunkSeconds(n * block + on * head, n * block * (1 + recompute) + on * head, n * block + on * head)
        for n, on in zip(sizes, [False] * (parts - 1) + [True], strict=True)
    ]
    # Which chunks are on which rank, and how many passes wait, does not depend on how many micro-batches follow.
    sample = rival.make(pipeline, min(rounds, 4 * pipeline))
    chunks = [sorted({chunk for _, chunk, _ in tasks}) for tasks in sample]
    weights = [_rival_weights(own, sizes, costs) for own in chunks]
    of_ranks = [
        _rival_bytes(
            work, [sizes[c] for c in own], parts - 1 in own, held, weight, zero_stage, data, recompute, own[0] > 0
        )
        for own, held, weight in zip(chunks, rivals.held_passes(sample), weights, strict=True)
    ]
    most = max(rank.total for rank in of_ranks)
    busy = [rounds * sum(seconds[c].forward + seconds[c].of("B") for c in own) for own in chunks]

    def evaluate() -> Prediction:
        links = border_links(work, cluster, pipeline, data, channel=False)
        outcome = rivals.replay_many(lambda m: rival.make(pipeline, m), rounds, pipeline, seconds, links)
        tails, seen = [], 0.0
        for own, weight in zip(chunks, weights, strict=True):
            reduction = cluster.ring_seconds(weight * work.states.gradients, data)
            backward = sum(seconds[c].of("B") for c in own)
            exposed = rivals.exposed_reduction(reduction, backward, sum(sizes[c] for c in own))
            seen = max(seen, exposed)
            tails.append(exposed + update_seconds(weight, work, cluster, data, zero_stage))
        step = outcome.seconds + max(tails)
        idle = [1 - (of_rank + tail) / step for of_rank, tail in zip(outcome.busy, tails, strict=True)]
        traffic = work.micro_batches * work.activations.rows * rival.chunks
        heaviest = max(weights)
        return Prediction(
            method=rival.name,
            local=False,
            pipeline=pipeline,
            data=data,
            micro_batch_size=work.micro_batch_size,
            micro_batches=rounds,
            zero_stage=zero_stage,
            recompute=recompute,
            memory_bytes=most,
            fits=most <= USABLE_MEMORY * cluster.device.memory_bytes,
            step_seconds=step,
            tokens_per_second=work.tokens / step,
            idle_shares=idle,
            up_bytes=traffic,
            down_bytes=traffic,
            reduced_bytes=2 * (data - 1) / data * heaviest * work.states.gradients,
            reduction_seconds=seen,
            update_seconds=update_seconds(heaviest, work, cluster, data, zero_stage),
        )

    return Candidate(most <= USABLE_MEMORY * cluster.device.memory_bytes, most, max(busy), evaluate)


def _rival_weights(chunks: Sequence[int], sizes: Sequence[int], costs: ModelCosts) -> int:
    weights = sum(sizes[chunk] for chunk in chunks) * costs.block_parameters
    return weights + (0 in chunks) * costs.embedding_parameters + (len(sizes) - 1 in chunks) * costs.head_parameters


def _rival_bytes(
    work: Work,
    sizes: Sequence[int],
    head: bool,
    held: int,
    weights: int,
    zero_stage: int,
    data: int,
    recompute: float,
    inner: bool,
) -> RankBytes:
    """Of one process: `held` passes of a chunk as long as the mean one, the head's loss once, two messages each way."""
    of = work.activations
    blocks = sum(sizes) / len(sizes)
    kept = held * blocks * (recompute * of.rows + (1 - recompute) * of.block) + (of.block if recompute else 0.0)
    kept += head * (of.norm + of.rows + work.costs.head_flops / 2 * of.readout_weight)
    states = memory.of_states(weights, 0, 0, work.states, memory.BYTES[work.dtype], zero_stage, data)
    messages = 2 * of.rows * (1 + inner)
    return RankBytes(**states, activations=kept, messages=messages, logits=head * of.logits, held=held)


def data_parallel(work: Work, cluster: Cluster, data: int, *, zero_stage: int, recompute: float) -> Candidate:
    """The whole model in every process, trained by backprop."""
    goal = Objective(work.num_blocks, objective.backprop(work.num_blocks))
    costs, device = work.costs, cluster.device
    stages = partition.cut(goal, 1, costs, [work.num_blocks])
    rounds = work.micro_batches // data
    (rank,) = memory.predict(
        stages,
        costs,
        work.activations,
        work.states,
        goal.phases,
        micro_batches=rounds,
        dtype=work.dtype,
        zero_stage=zero_stage,
        replicas=data,
        recompute=recompute,
    )
    if zero_stage == 3:  # the weights of one block at work and of the next one are gathered
        gathered = 2 * max(costs.block_parameters, costs.head_parameters) * work.states.weights
        rank = replace(rank, messages=rank.messages + gathered)
    tokens = work.micro_batch_tokens
    blocks = work.num_blocks * costs.block_flops
    head = device.head_seconds(tokens * costs.head_flops, work.dtype)
    forward = device.compute_seconds(tokens * blocks, work.dtype) + head
    backward = device.compute_seconds(tokens * (2 + recompute) * blocks, work.dtype) + 2 * head
    compute = rounds * (forward + backward)
    weights, _ = memory.weights_of(stages[0], costs)
    update = update_seconds(weights, work, cluster, data, zero_stage)
    fits = rank.total <= USABLE_MEMORY * device.memory_bytes

    def evaluate() -> Prediction:
        gradients = weights * work.states.gradients
        if zero_stage == 3:
            gather = cluster.ring_seconds(weights * work.states.weights, data, 1, work.num_blocks)
            both = gather + cluster.ring_seconds(gradients, data, 1, work.num_blocks)
            each = rivals.exposed_reduction(gather, forward, work.num_blocks)
            each += rivals.exposed_reduction(both, backward, work.num_blocks)
            seen = rounds * each
        else:
            seen = rivals.exposed_reduction(cluster.ring_seconds(gradients, data), backward, work.num_blocks)
        step = compute + seen + update
        passes = 3 * rounds if zero_stage == 3 else 2
        return Prediction(
            method="data parallel" if data > 1 else "one process",
            local=False,
            pipeline=1,
            data=data,
            micro_batch_size=work.micro_batch_size,
            micro_batches=rounds,
            zero_stage=zero_stage,
            recompute=recompute,
            memory_bytes=rank.total,
            fits=fits,
            step_seconds=step,
            tokens_per_second=work.tokens / step,
            idle_shares=[seen / step],
            up_bytes=0.0,
            down_bytes=0.0,
            reduced_bytes=passes * (data - 1) / data * gradients,
            reduction_seconds=seen,
            update_seconds=update,
        )

    return Candidate(fits, rank.total, compute, evaluate)
