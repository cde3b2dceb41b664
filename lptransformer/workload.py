"""What is to be trained, ways to train it on a cluster, and which of them is the fastest that fits. Plain arithmetic.

What is assumed everywhere: a pass takes its FLOPs over what the device achieves, whatever the size of the micro-batch;
embeddings and norms take no time; a step of the optimizer takes what it reads and writes over the memory's bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lptransformer.cost import ModelCosts
from lptransformer.devices import Cluster, Device, Wire
from lptransformer.rank_memory import ActivationBytes, Precision, RankMemory
from lptransformer.simulate import Link


@dataclass(frozen=True)
class Work:
    """What is trained: sizes, the update, and how this program is told to do it.

    `micro_batches` are those of an update over all replicas. `activations` are of a micro-batch of `micro_batch_size`
    windows; `logit_bytes` of one row of logits; `token_bytes` of one token's hidden states in a message that may be
    rounded (train.border_dtype); `update_bytes` what the optimizer reads and writes per weight. `channel` limits what a
    border has, where it is slower than the link.
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
    head_blocks: int = 0
    token_fraction: float = 1.0
    channel: Wire | None = None

    @property
    def tokens(self) -> int:
        """Of an update."""
        return self.micro_batches * self.micro_batch_tokens

    @property
    def micro_batch_tokens(self) -> int:
        return self.micro_batch_size * self.sequence_length

    @property
    def rounded_bytes(self) -> float:
        """Of the hidden states of a micro-batch where this program rounds them; elsewhere `activations.rows`."""
        return self.micro_batch_tokens * self.token_bytes

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


@dataclass(frozen=True)
class RankRow:
    """One pipeline rank in the partition table. FLOPs are those of a forward pass, per token."""

    pipeline_rank: int
    blocks: str
    head: str
    parameters: int
    forward_flops: float
    memory: RankMemory
    idle_share: float


@dataclass(frozen=True)
class Prediction:
    """A candidate and what it comes to. Bytes are per update: over the busiest border, and per process in the ring."""

    method: str
    local: bool  # whether it changes what is trained
    pipeline: int
    data: int
    micro_batch_size: int
    micro_batches: int  # of a replica
    zero_stage: int
    recompute: float  # share of the blocks whose activations are made again
    memory_bytes: float
    fits: bool
    step_seconds: float
    tokens_per_second: float
    idle_shares: list[float]
    up_bytes: float
    down_bytes: float
    reduced_bytes: float
    reduction_seconds: float
    update_seconds: float
    ranks: list[RankRow] = field(default_factory=list)

    @property
    def idle_share(self) -> float:
        """The mean over the pipeline ranks."""
        return sum(self.idle_shares) / len(self.idle_shares)


@dataclass(frozen=True)
class Candidate:
    """A way to run a method: `bound` is a time below which it cannot be, `evaluate` simulates it."""

    fits: bool
    memory_bytes: float
    bound: float
    evaluate: Callable[[], Prediction]


# What a device has for the program: the rest is for its own context, buffers and holes between tensors.
USABLE_MEMORY = 0.9  # assumed
CPUS = ("cpu", "laptop-core")  # devices that take an optimizer's step tensor by tensor


def fits(memory_bytes: float, cluster: Cluster) -> bool:
    return memory_bytes <= USABLE_MEMORY * cluster.device.memory_bytes


def fused_step(device: Device) -> bool:
    """Whether the optimizer takes all tensors at once: rank_memory.Precision."""
    return device.key not in CPUS


def predicted(
    work: Work, cluster: Cluster, data: int, *, memory_bytes: float, step_seconds: float, **others: Any
) -> Prediction:
    """A prediction with what follows from its split, memory and time; `others` are its other fields."""
    return Prediction(
        data=data,
        micro_batch_size=work.micro_batch_size,
        micro_batches=work.micro_batches // data,
        memory_bytes=memory_bytes,
        fits=fits(memory_bytes, cluster),
        step_seconds=step_seconds,
        tokens_per_second=work.tokens / step_seconds,
        **others,
    )


def balanced_sizes(num_blocks: int, parts: int, block: float, last_head: float, other_head: float = 0.0) -> list[int]:
    """Blocks of every part with the smallest costliest part; the last one has `last_head`, the others `other_head`.

    Blocks are alike, so all but the last differ by one at most, the longer ones first.
    """
    assert 1 <= parts <= num_blocks
    if parts == 1:
        return [num_blocks]

    def costliest(last: int) -> float:
        return max(last * block + last_head, -(-(num_blocks - last) // (parts - 1)) * block + other_head)

    last = min(range(1, num_blocks - parts + 2), key=costliest)
    rest, others = num_blocks - last, parts - 1
    return [rest // others + (i < rest % others) for i in range(others)] + [last]


def splits(cluster: Cluster, work: Work, num_blocks: int) -> list[tuple[int, int, Work]]:
    """(pipeline, data, the work in micro-batches that so many replicas can share) for all processes of a cluster."""
    found = []
    sizes = [size for size in range(work.micro_batch_size, 0, -1) if work.micro_batch_size % size == 0]
    for data in range(1, cluster.size + 1):
        pipeline = cluster.size // data
        if pipeline * data != cluster.size or pipeline > num_blocks or not cluster.suits(data):
            continue
        for size in sizes:
            smaller = work.cut_smaller(size)
            if smaller.micro_batches % data == 0:
                found.append((pipeline, data, smaller))
    return found


def update_seconds(weights: float, work: Work, cluster: Cluster, data: int, zero_stage: int) -> float:
    share = weights / data if zero_stage > 0 else weights
    return cluster.device.update_seconds(share, work.update_bytes)


def border_links(cluster: Cluster, data: int, messages: Sequence[float], channel: Wire | None = None) -> list[Link]:
    """A link per border, where a micro-batch's hidden states have `messages` bytes; no faster than the `channel`."""
    links = []
    for wire, size in zip(cluster.borders(len(messages) + 1, data), messages, strict=True):
        slowest = wire
        if channel is not None and channel.bytes_per_second < wire.bytes_per_second:
            slowest = replace(channel, latency_seconds=max(channel.latency_seconds, wire.latency_seconds))
        links.append(Link(slowest.latency_seconds, size / slowest.bytes_per_second))
    return links


def best(candidates: Sequence[Candidate]) -> Prediction | None:
    """The fastest that fits, else what needs least memory. What cannot be the fastest is not simulated.

    Of candidates that are equal to within a thousandth the first counts.
    """
    if not candidates:
        return None
    fitting = sorted((one for one in candidates if one.fits), key=lambda one: one.bound)
    if not fitting:
        return min(candidates, key=lambda one: one.memory_bytes).evaluate()
    found: Prediction | None = None
    for candidate in fitting:
        if found is not None and candidate.bound >= 0.999 * found.step_seconds:
            break
        prediction = candidate.evaluate()
        if found is None or prediction.step_seconds < 0.999 * found.step_seconds:
            found = prediction
    return found
