"""What an update takes on given machines: the seconds of every action, replayed, and lower bounds of others' schedules.

A pass takes its FLOPs over what the device achieves, whatever the size of the micro-batch; embeddings and norms take no
time; a step of the optimizer takes what it reads and writes over the memory's bandwidth. Plain arithmetic, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from lptransformer.methods import recomputing
from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.gradient_flow import crossing, flows
from lptransformer.methods.heads import HeadOptions, blocks_like
from lptransformer.methods.objectives import Objective
from lptransformer.methods.stages import StagePlan, trained_of, weights_of
from lptransformer.planning.devices import Cluster, Link
from lptransformer.planning.rank_memory import ActivationBytes
from lptransformer.planning.simulate import LinkSeconds, StageSeconds
from lptransformer.planning.stage_state import Precision

if TYPE_CHECKING:
    from lptransformer.planning.stage_memory import EmptyStages


@dataclass(frozen=True)
class Work:
    """What is trained: sizes, the update, and how this program is configured to do it.

    `micro_batches` are those of an update over all replicas. `activations` are of a micro-batch of `micro_batch_size`
    windows; `logit_bytes` of one row of logits; `token_bytes` of one token's hidden states in a message that may be
    encoded (border.codec); `update_bytes` what the optimizer reads and writes per weight. Of this program's methods:
    the options of the auxiliary `head`, and which blocks compute their activations again. `channel` limits what a
    border has, where it is slower than the link. `empty` are the model's stages on any split; without them
    nothing is said of memory.
    """

    costs: ModelCosts
    num_blocks: int
    hidden_size: int
    vocab_size: int
    sequence_length: int
    micro_batch_size: int
    micro_batches: int
    dtype: str
    activations: ActivationBytes
    logit_bytes: float
    token_bytes: float
    chunk_tokens: int
    states: Precision
    update_bytes: float
    in_flight: int = 2
    head: HeadOptions = field(default_factory=HeadOptions)
    activation_checkpointing: str = recomputing.KEPT
    whole_weights: bool = False  # ZeRO 3 is refused, whatever the objective (config/checks.needs_whole_weights)
    channel: Link | None = None
    empty: EmptyStages | None = None

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.micro_batches * self.micro_batch_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length

    def cut_smaller(self, micro_batch_size: int) -> Work:
        """The same update in more, smaller micro-batches."""
        share = micro_batch_size / self.micro_batch_size
        of = self.activations
        rows = min(self.chunk_tokens, micro_batch_size * self.sequence_length)
        smaller = ActivationBytes(
            of.block * share, of.norm * share, of.rows * share, rows * self.logit_bytes, of.readout_weight
        )
        micro_batches = self.micro_batches * self.micro_batch_size // micro_batch_size
        return replace(self, micro_batch_size=micro_batch_size, micro_batches=micro_batches, activations=smaller)


def stage_seconds(
    stages: Sequence[StagePlan],
    work: Work,
    cluster: Cluster,
    data: int,
    zero_stage: int,
    *,
    ours: bool = True,
    recompute: float = 0.0,
) -> tuple[list[StageSeconds], list[float]]:
    """Of every stage what its actions take, and the seconds of an update in which it waits for its replicas.

    Gradients are summed over the replicas before the update; ZeRO 2 scatters them after every backward pass; ZeRO 3
    gathers weights and scatters gradients in every micro-batch, beside the compute. A block that computes its
    activations again does so in every backward pass and in every pull; in a head's extra blocks it counts with the
    head. Programs of others (not `ours`) sum beside the last backward pass, take the gradients of the loss in the
    backward pass, and may recompute the activations of a share of the blocks (`recompute`), one more forward pass of
    these.
    """

    def again(blocks: Iterable[int]) -> float:
        """Seconds in which blocks run forward once more."""
        passes = ours * sum(recomputing.forwards_again(work.activation_checkpointing, block) for block in blocks)
        return device.compute_seconds(work.micro_batch_tokens * passes * costs.block_flops, work.dtype)

    costs, device, rounds = work.costs, cluster.device, work.micro_batches // data
    found, waits = [], []
    for stage in stages:
        body = device.compute_seconds(work.micro_batch_tokens * stage.num_blocks * costs.block_flops, work.dtype)
        own_again = again(range(stage.first_block, stage.last_block + 1))
        head_flops = costs.after(stage.last_block).head_training_flops(stage.is_last)
        head = device.compute_seconds(work.micro_batch_tokens * head_flops, work.dtype)
        if stage.has_head and not stage.is_last:
            head += again(blocks_like(work.head, stage.last_block, work.num_blocks))
        head *= stage.has_head
        forward = body + (head if ours else head / 3)
        below = any(other.trained for other in stages[: stage.index])
        flops = costs.backward_flops(stage.first_block, stage.last_block, below)
        backward = device.compute_seconds(work.micro_batch_tokens * flops, work.dtype)
        backward += own_again + recompute * body + (0.0 if ours else head * 2 / 3)
        trained, pieces = trained_of(stage, costs), stage.num_blocks
        weights, gradients = weights_of(stage, costs)[0] * work.states.weights, trained * work.states.gradients
        in_forward = in_backward = in_update = 0.0
        if zero_stage == 3:
            gather = cluster.ring_seconds(weights, data, 1, pieces)
            both = gather + cluster.ring_seconds(gradients, data, 1, pieces)
            in_forward = exposed_seconds(gather, forward, pieces)
            in_backward = exposed_seconds(both, backward, pieces)
        elif not ours:
            in_update = exposed_seconds(cluster.ring_seconds(gradients, data), backward, pieces)
        elif zero_stage == 2:
            in_backward = cluster.ring_seconds(gradients, data, 1)
            in_update = cluster.ring_seconds(weights, data, 1)
        else:
            in_update = cluster.ring_seconds(gradients, data)
        step = device.update_seconds(trained / data if zero_stage > 0 else trained, work.update_bytes)
        update = (step + in_update) * stage.trained
        found.append(StageSeconds(forward + in_forward, backward + in_backward, body + own_again, update))
        waits.append(rounds * in_forward + stage.trained * (rounds * in_backward + in_update))
    return found, waits


def exposed_seconds(communication: float, compute: float, pieces: int) -> float:
    """What a sum or a gather adds to a pass when it runs beside it, in `pieces`.

    A piece can leave as soon as it is there, so the last one is always seen; the rest is where it is longer than the
    pass.
    """
    return max(communication / pieces, communication - compute)


def by_rank(stages: Sequence[StagePlan], of_stages: Iterable[float]) -> list[float]:
    """Numbers of stages, added up for every pipeline rank."""
    sums = [0.0] * (stages[-1].pipeline_rank + 1)
    for stage, number in zip(stages, of_stages, strict=True):
        sums[stage.pipeline_rank] += number
    return sums


def message_bytes(objective: Objective, stages: Sequence[StagePlan], work: Work) -> tuple[list[float], list[int]]:
    """Of every border between pipeline ranks: bytes of a micro-batch's hidden states, and how many gradients come back.

    Hidden states are rounded behind a head whose border never carries a gradient (docs/design.md), and nowhere else.
    """
    of_phases = [flows(phase, stages) for phase in objective.phases]
    up, down = [], []
    for below, above in zip(stages, stages[1:], strict=False):
        if below.pipeline_rank != above.pipeline_rank:
            down.append(max(len(crossing(one, above.index)) for one in of_phases))
            rounded = below.has_head and down[-1] == 0
            up.append(work.micro_batch_tokens * work.token_bytes if rounded else work.activations.rows)
    return up, down


def border_seconds(
    cluster: Cluster, data: int, messages: Sequence[float], channel: Link | None = None
) -> list[LinkSeconds]:
    """The times of every border, where a micro-batch's hidden states have `messages` bytes; no link is faster than the
    `channel`."""
    found = []
    for link, size in zip(cluster.borders(len(messages) + 1, data), messages, strict=True):
        slowest = link
        if channel is not None and channel.bytes_per_second < link.bytes_per_second:
            slowest = replace(channel, latency_seconds=max(channel.latency_seconds, link.latency_seconds))
        found.append(LinkSeconds(slowest.latency_seconds, size / slowest.bytes_per_second))
    return found


@dataclass(frozen=True)
class Bound:
    """What a schedule of others takes at best: no prediction, and never recommended. `source` is its paper."""

    method: str
    source: str
    pipeline: int
    data: int
    step_seconds: float


def bounds(work: Work, cluster: Cluster, pipeline: int, data: int, recompute: float = 0.0) -> list[Bound]:
    """The schedules of others that need at least the memory of 1F1B, in closed form.

    With t the forward and backward pass of a micro-batch on a rank, m of them on p ranks take at best

        interleaved 1F1B   (m + (p - 1) / v) t   v chunks on each rank, as many as there are blocks; p divides m
        zero bubble        m t                   where the passes and both halves of the backward pass take the same

    Blocks are divided among the ranks in any way; links, sums over replicas and the optimizer take no time.
    """
    rounds, chunks = work.micro_batches // data, work.num_blocks // pipeline
    flops = (3 + recompute) * work.num_blocks * work.costs.block_flops / pipeline
    each = cluster.device.compute_seconds(work.micro_batch_tokens * flops, work.dtype)
    each += cluster.device.compute_seconds(work.micro_batch_tokens * 3 * work.costs.head_flops / pipeline, work.dtype)
    found = [Bound("zero bubble", "2401.10241, 2405.15362", pipeline, data, rounds * each)]
    if rounds % pipeline == 0:
        seconds = (rounds + (pipeline - 1) / chunks) * each
        found.append(Bound("interleaved 1F1B", "2104.04473, section 2.2", pipeline, data, seconds))
    return found
