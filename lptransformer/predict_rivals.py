"""What an update takes under the methods of others: pipelines of backprop, and data parallel training.

They sum gradients over replicas while the last backward pass runs (rivals.exposed_reduction), messages never wait for
their receiver, and where their activations do not fit they may make those of some blocks again in the backward pass (a
forward pass more of these blocks). This program does not do that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from lptransformer import rivals
from lptransformer.cost import ModelCosts
from lptransformer.devices import Cluster
from lptransformer.rank_memory import Precision, StageTensors, stage_state
from lptransformer.rivals import ChunkSeconds
from lptransformer.workload import (
    Candidate,
    Prediction,
    Work,
    balanced_sizes,
    border_links,
    fits,
    fused_step,
    predicted,
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
    most = max(
        _bytes(
            work,
            cluster,
            weight,
            held * sum(sizes[c] for c in own) / len(own),
            zero_stage,
            data,
            recompute,
            first=0 in own,
            last=parts - 1 in own,
            messages=2 * work.activations.rows * (1 + (own[0] > 0)),
        )
        for own, held, weight in zip(chunks, rivals.held_passes(sample), weights, strict=True)
    )
    busy = [rounds * sum(seconds[c].forward + seconds[c].of("B") for c in own) for own in chunks]

    def evaluate() -> Prediction:
        links = border_links(cluster, data, [work.activations.rows] * (pipeline - 1))
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
        return predicted(
            work,
            cluster,
            data,
            method=rival.name,
            local=False,
            pipeline=pipeline,
            zero_stage=zero_stage,
            recompute=recompute,
            memory_bytes=most,
            step_seconds=step,
            idle_shares=idle,
            up_bytes=traffic,
            down_bytes=traffic,
            reduced_bytes=2 * (data - 1) / data * heaviest * work.states.gradients,
            reduction_seconds=seen,
            update_seconds=update_seconds(heaviest, work, cluster, data, zero_stage),
        )

    return Candidate(fits(most, cluster), most, max(busy), evaluate)


def _rival_weights(chunks: Sequence[int], sizes: Sequence[int], costs: ModelCosts) -> int:
    weights = sum(sizes[chunk] for chunk in chunks) * costs.block_parameters
    return weights + (0 in chunks) * costs.embedding_parameters + (len(sizes) - 1 in chunks) * costs.head_parameters


def _bytes(
    work: Work,
    cluster: Cluster,
    weights: int,
    blocks: float,
    zero_stage: int,
    data: int,
    recompute: float,
    *,
    first: bool,
    last: bool,
    messages: float = 0.0,
) -> float:
    """Of one process at its peak, which keeps the passes of so many `blocks`, and the head's loss once.

    At ZeRO 3 it has the weights of the block at work and of the next one: DeepSpeed's own linear layers let them go in
    between, where ours, whose autograd keeps them, cannot.
    """
    of, costs = work.activations, work.costs
    readout = last * int(costs.head_flops / 2)
    kept = blocks * (recompute * of.rows + (1 - recompute) * of.block) + (of.block if recompute else 0.0)
    kept += last * (of.norm + of.rows) + readout * of.readout_weight
    return of_others(
        weights,
        largest_tensor(int(blocks), costs, first, readout),
        replace(work.states, zero_stage=zero_stage, replicas=data, fused_step=fused_step(cluster.device)),
        kept=kept,
        logits=last * of.logits,
        messages=messages,
        gathered=2 * max(costs.block_parameters, costs.head_parameters) * work.states.weights,
    )


def data_parallel(work: Work, cluster: Cluster, data: int, *, zero_stage: int, recompute: float) -> Candidate:
    """The whole model in every process, trained by backprop."""
    costs, device = work.costs, cluster.device
    rounds = work.micro_batches // data
    weights = _rival_weights([0], [work.num_blocks], costs)
    most = _bytes(work, cluster, weights, work.num_blocks, zero_stage, data, recompute, first=True, last=True)
    tokens = work.micro_batch_tokens
    blocks = work.num_blocks * costs.block_flops
    head = device.head_seconds(tokens * costs.head_flops, work.dtype)
    forward = device.compute_seconds(tokens * blocks, work.dtype) + head
    backward = device.compute_seconds(tokens * (2 + recompute) * blocks, work.dtype) + 2 * head
    compute = rounds * (forward + backward)
    update = update_seconds(weights, work, cluster, data, zero_stage)

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
        return predicted(
            work,
            cluster,
            data,
            method="data parallel" if data > 1 else "one process",
            local=False,
            pipeline=1,
            zero_stage=zero_stage,
            recompute=recompute,
            memory_bytes=most,
            step_seconds=step,
            idle_shares=[seen / step],
            up_bytes=0.0,
            down_bytes=0.0,
            reduced_bytes=passes * (data - 1) / data * gradients,
            reduction_seconds=seen,
            update_seconds=update,
        )

    return Candidate(fits(most, cluster), most, compute, evaluate)


def of_others(
    weights: int,
    largest: int,
    how: Precision,
    *,
    kept: float,
    logits: float,
    messages: float = 0.0,
    gathered: float = 0.0,
) -> float:
    """Bytes of a process of somebody else's program that trains so many weights, at its peak.

    `kept` is what waits for its backward pass, `gathered` what ZeRO 3 has of the other replicas' weights meanwhile.
    """
    zero_3 = how.zero_stage == 3
    state = stage_state(StageTensors(True, weights, largest, weights, 0), how)
    stays = state.weights + state.gradients + state.optimizer + messages
    return stays + state.bucket * zero_3 + max(kept + logits + (gathered if zero_3 else state.bucket), state.step)


def largest_tensor(num_blocks: int, costs: ModelCosts, embedding: bool, readout: int) -> int:
    """Weights of the largest tensor: a third of a block (one of its MLP's two or three), or at one of the ends."""
    return max((num_blocks > 0) * costs.block_parameters // 3, embedding * costs.embedding_parameters, readout)
