"""Ways to train something on a cluster: every method on every split, and of each the fastest that fits. No torch.

Our methods compute again what the configuration says (`train.activation_checkpointing`). Backprop is what other
programs do: 1F1B replayed as this program runs it, or data parallel training; both may recompute some activations to
fit, sum gradients beside the last backward pass, and have messages that wait for no receiver.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lptransformer.methods import objectives
from lptransformer.methods.gradient_flow import borders_carry_gradients
from lptransformer.methods.objectives import Objective
from lptransformer.methods.stages import StagePlan, cut, trained_of, weights_of
from lptransformer.planning.devices import Cluster
from lptransformer.planning.rank_memory import RankMemory
from lptransformer.planning.simulate import StageSeconds, steady
from lptransformer.planning.stage_state import Precision, StageTensors, stage_state
from lptransformer.planning.step_time import (
    Bound,
    Work,
    border_seconds,
    bounds,
    by_rank,
    message_bytes,
    stage_seconds,
)

# What a device has for the program: the rest is for its own context, buffers and holes between tensors.
USABLE_MEMORY = 0.9  # assumed
# Shares of the blocks whose activations others may recompute, where all of them do not fit.
RECOMPUTE = (0.0, 0.25, 0.5, 0.75, 1.0)
# How many times as fast a local method has to be before its other training result is worth a trial; less is within the
# error of this prediction.
WORTH = 1.1


@dataclass(frozen=True)
class RankRow:
    """One pipeline rank in the partition table."""

    pipeline_rank: int
    blocks: str
    head: str
    parameters: int
    memory: RankMemory
    idle_share: float


@dataclass(frozen=True)
class Prediction:
    """A candidate and what it comes to. Bytes are per update: over the busiest border, and per process in the ring.

    `reduction_seconds` are those of an update in which the sums over replicas are waited for.
    """

    method: str
    local: bool  # whether it changes what is trained
    pipeline: int
    data: int
    micro_batch_size: int
    micro_batches: int  # of a replica
    zero_stage: int
    recompute: float  # share of the blocks whose activations are recomputed
    memory_bytes: float
    fits: bool
    step_seconds: float
    tokens_per_second: float
    idle_shares: list[float]
    up_bytes: float
    down_bytes: float
    reduced_bytes: float
    reduction_seconds: float
    ranks: list[RankRow] = field(default_factory=list)

    @property
    def idle_share(self) -> float:
        """The mean over the pipeline ranks."""
        return sum(self.idle_shares) / len(self.idle_shares)


@dataclass(frozen=True)
class Candidate:
    """A method on a split: `objective` on pipeline ranks of `stages`, run by this program (`ours`) or as others run it.

    In a run of `steps` updates; `head` names its auxiliary heads. `evaluate` predicts the time; the memory is known
    before.
    """

    method: str
    objective: Objective
    stages: Sequence[StagePlan]
    work: Work
    cluster: Cluster
    data: int
    zero_stage: int
    ours: bool = True
    recompute: float = 0.0
    head: str = "private"
    steps: int = 1000

    @property
    def pipeline(self) -> int:
        return self.stages[-1].pipeline_rank + 1

    @property
    def rounds(self) -> int:
        """Micro-batches of a replica."""
        return self.work.micro_batches // self.data

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= USABLE_MEMORY * self.cluster.device.memory_bytes

    @cached_property
    def memory_bytes(self) -> float:
        """Of the process that needs most."""
        if self.ours:
            return max(of_rank.peak for of_rank in self.rank_bytes)
        return max(self._bytes_of_others(stage) for stage in self.stages)

    @cached_property
    def rank_bytes(self) -> list[RankMemory]:
        """Of a process of every pipeline rank, as this program runs it."""
        if self.work.empty is None:
            return [RankMemory()] * self.pipeline
        size = self.work.micro_batch_size
        return self.work.empty.ranks(
            self.objective, self.stages, self._precision, micro_batch_size=size, rounds=self.rounds
        )

    @property
    def _precision(self) -> Precision:
        on_gpu = not self.cluster.device.is_cpu
        return replace(self.work.states, zero_stage=self.zero_stage, replicas=self.data, on_gpu=on_gpu)

    def _bytes_of_others(self, stage: StagePlan) -> float:
        """Of one process of a rank of 1F1B at its peak, which keeps a pass for every rank from its own on.

        At ZeRO 3 it has the weights of the block at work and of the next one: DeepSpeed's own linear layers let them go
        in between, where ours, whose autograd keeps them, cannot.
        """
        of, costs, states, how = self.work.activations, self.work.costs, self.work.states, self._precision
        blocks = min(self.rounds, self.pipeline - stage.pipeline_rank) * stage.num_blocks
        readout = stage.is_last * int(costs.head_flops / 2)
        kept = blocks * (self.recompute * of.rows + (1 - self.recompute) * of.block) + (self.recompute > 0) * of.block
        kept += stage.is_last * (of.norm + of.rows + of.logits) + readout * of.readout_weight
        # The largest tensor is a third of a block (one of its MLP's two or three), or at one of the ends.
        largest = max(costs.block_parameters // 3, stage.is_first * costs.embedding_parameters, readout)
        weights, trained = weights_of(stage, costs)[0], trained_of(stage, costs)
        state = stage_state(StageTensors(True, weights, largest, trained, 0, frozen=weights - trained), how)
        messages = (self.pipeline > 1) * 2 * of.rows * (2 - stage.is_first)
        stays = state.weights + state.gradients + state.optimizer + messages
        if how.zero_stage < 3:
            return stays + max(kept + state.bucket, state.step)
        gathered = 2 * max(costs.block_parameters, costs.head_parameters) * states.weights
        return stays + state.bucket + max(kept + gathered, state.step)

    @cached_property
    def _seconds(self) -> tuple[list[StageSeconds], list[float]]:
        work, moved = self.work, 2 * self.work.states.weights
        # An update copies one version of the weights to the other (engine/deepspeed_stage.py).
        if self.objective.delayed:
            work = replace(work, update_bytes=work.update_bytes + moved)
        return stage_seconds(
            self.stages, work, self.cluster, self.data, self.zero_stage, ours=self.ours, recompute=self.recompute
        )

    @property
    def at_least(self) -> float:
        """A time below which it cannot be: what the busiest rank computes."""
        busy = [
            self.rounds * (one.forward + stage.trained * one.backward) + one.update
            for stage, one in zip(self.stages, self._seconds[0], strict=True)
        ]
        return max(by_rank(self.stages, busy))

    def evaluate(self) -> Prediction:
        """Replay it. Programs of others have a receive posted for every micro-batch of 1F1B."""
        work, data, stages = self.work, self.data, self.stages
        seconds, waits = self._seconds
        up, down = message_bytes(self.objective, stages, work)
        found = steady(
            self.objective,
            stages,
            seconds,
            micro_batches=self.rounds,
            in_flight=work.in_flight if self.ours else self.pipeline,
            link=border_seconds(self.cluster, data, up, work.channel if self.ours else None),
            steps=self.steps,
        )
        step, reductions = found.update_seconds, by_rank(stages, waits)
        idle = [share + wait / step for share, wait in zip(found.idle_shares, reductions, strict=True)]
        weights = by_rank(stages, (trained_of(stage, work.costs) for stage in stages))
        passes = {2: self.rounds + 1 if self.ours else 2, 3: 3 * self.rounds}.get(self.zero_stage, 2)
        return Prediction(
            method=self.method,
            local=not self.objective.is_backprop,
            pipeline=self.pipeline,
            data=data,
            micro_batch_size=work.micro_batch_size,
            micro_batches=self.rounds,
            zero_stage=self.zero_stage,
            recompute=self.recompute,
            memory_bytes=self.memory_bytes,
            fits=self.fits,
            step_seconds=step,
            tokens_per_second=work.tokens / step,
            idle_shares=idle,
            up_bytes=work.micro_batches * max(up, default=0.0),
            down_bytes=work.micro_batches * max(down, default=0) * work.activations.rows,
            reduced_bytes=passes * (data - 1) / data * max(weights) * work.states.gradients,
            reduction_seconds=max(reductions),
            ranks=[self._row(rank, share) for rank, share in enumerate(idle)] if self.ours else [],
        )

    def _row(self, rank: int, idle: float) -> RankRow:
        local = [stage for stage in self.stages if stage.pipeline_rank == rank]
        heads = ["the model's own" if stage.is_last else self.head for stage in local if stage.has_head]
        blocks = f"{local[0].first_block}-{local[-1].last_block}"
        parameters = sum(weights_of(stage, self.work.costs)[0] for stage in local)
        head = " + ".join(dict.fromkeys(heads)) or "none"
        return RankRow(rank, blocks, head, parameters, self.rank_bytes[rank], idle)


def of_backprop(work: Work, cluster: Cluster, pipeline: int, data: int, zero_stage: int, recompute: float) -> Candidate:
    """1F1B as others run it; on one pipeline rank data parallel training, or one process."""
    objective = Objective(work.num_blocks, objectives.backprop(work.num_blocks))
    sizes = balanced_sizes(work.num_blocks, pipeline, work.costs.block_flops, work.costs.head_flops)
    stages = cut(objective, pipeline, work.costs, sizes)
    method = "backprop, 1F1B" if pipeline > 1 else "data parallel" if data > 1 else "one process"
    return Candidate(method, objective, stages, work, cluster, data, zero_stage, ours=False, recompute=recompute)


def balanced_sizes(num_blocks: int, parts: int, block: float, last_head: float, other_head: float = 0.0) -> list[int]:
    """Blocks of every part so that the costliest part is as cheap as possible; the last one has `last_head`, the others
    `other_head`.

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


def splits(cluster: Cluster, work: Work) -> list[tuple[int, int, Work]]:
    """(pipeline, data, the work in micro-batches that `data` replicas can share) for all processes of a cluster."""
    found = []
    sizes = [size for size in range(work.micro_batch_size, 0, -1) if work.micro_batch_size % size == 0]
    for data in range(1, cluster.size + 1):
        pipeline = cluster.size // data
        if pipeline * data != cluster.size or pipeline > work.num_blocks or not cluster.suits(data):
            continue
        for size in sizes:
            smaller = work.cut_smaller(size)
            if smaller.micro_batches % data == 0:
                found.append((pipeline, data, smaller))
    return found


def methods(
    work: Work, cluster: Cluster, own: str | None, objective: Objective, *, zero_stage: int, head: str, steps: int
) -> tuple[list[Prediction], list[Bound]]:
    """Every method at its best split, size of micro-batch and ZeRO stage, the fastest that fits first; and the bounds
    of schedules that are not replayed.

    `own` names the `objective` of the configuration (None: leave it out), `zero_stage` is the least of ZeRO.
    """
    found: dict[str, list[Candidate]] = {}
    at_best: dict[str, Bound] = {}

    def add(options: Iterable[Candidate]) -> Candidate | None:
        """The first of some options of a method, from the plainest on, that fits; all of them where none does."""
        tried = []
        for option in options:
            tried.append(option)
            if option.fits:
                found.setdefault(option.method, []).append(option)
                return option
        found.setdefault(tried[0].method, []).extend(tried)
        return None

    def add_ours(
        method: str, objective: Objective, work: Work, pipeline: int, data: int, sizes: str | Sequence[int]
    ) -> None:
        """A method of this program on a split, where training would take it (config/checks.py)."""
        if work.dtype == "fp64" and data > 1:
            return
        stages = cut(objective, pipeline, work.costs, sizes)
        most = 2 if work.whole_weights or objective.delayed or borders_carry_gradients(objective, stages) else 3
        zeros = {min(zero_stage, most), *(range(max(1, zero_stage), most + 1) if data > 1 else ())}
        add(
            Candidate(method, objective, stages, work, cluster, data, zero, head=head, steps=steps)
            for zero in sorted(zeros)
        )

    for pipeline, data, smaller in splits(cluster, work):
        if own is not None:
            add_ours(own, objective, smaller, pipeline, data, "balanced")
        if pipeline == 1:
            for zero in [zero_stage] if data == 1 else [1, 3]:  # 3 is for what does not fit otherwise
                whole = add(of_backprop(smaller, cluster, 1, data, zero, share) for share in RECOMPUTE)
                if whole is not None and whole.recompute == 0.0:
                    break
            continue
        sizes = _chunks(smaller, pipeline)
        chunked = Objective(work.num_blocks, objectives.chunked(work.num_blocks, sizes))
        add_ours("chunked, one per rank", chunked, smaller, pipeline, data, sizes)
        pairs = Objective(work.num_blocks, objectives.overlapping(work.num_blocks, sizes, 1, 0.5, first_head=False))
        add_ours("overlapping, one per rank", pairs, smaller, pipeline, data, sizes)
        zero = min(zero_stage if data == 1 else max(1, zero_stage), 2)
        piped = add(of_backprop(smaller, cluster, pipeline, data, zero, share) for share in RECOMPUTE)
        for bound in bounds(smaller, cluster, pipeline, data, piped.recompute) if piped else []:
            before = at_best.setdefault(bound.method, bound)
            at_best[bound.method] = min(before, bound, key=lambda one: one.step_seconds)
    predictions = [best(candidates) for candidates in found.values()]
    predictions.sort(key=lambda one: (not one.fits, one.step_seconds))
    return predictions, sorted(at_best.values(), key=lambda one: one.step_seconds)


def _chunks(work: Work, parts: int) -> list[int]:
    """Blocks of every chunk, a chunk per pipeline rank, with the heads counted."""
    heads = (work.costs.head_training_flops(True), work.costs.head_training_flops(False))
    return balanced_sizes(work.num_blocks, parts, 3 * work.costs.block_flops, *heads)


def best(candidates: Sequence[Candidate]) -> Prediction:
    """The fastest that fits, else what needs least memory. What cannot be the fastest is not replayed.

    Of candidates that are equal to within a thousandth the first counts.
    """
    fitting = sorted((one for one in candidates if one.fits), key=lambda one: one.at_least)
    if not fitting:
        return min(candidates, key=lambda one: one.memory_bytes).evaluate()
    found = fitting[0].evaluate()
    for candidate in fitting[1:]:
        if candidate.at_least >= 0.999 * found.step_seconds:
            break
        prediction = candidate.evaluate()
        if prediction.step_seconds < 0.999 * found.step_seconds:
            found = prediction
    return found


def fastest(predictions: Iterable[Prediction], local: bool) -> Prediction | None:
    """Of those that fit, with local updates or without."""
    fitting = [one for one in predictions if one.fits and one.local == local]
    return min(fitting, key=lambda one: one.step_seconds, default=None)


def recommend(predictions: Sequence[Prediction]) -> Prediction | None:
    """The fastest that fits; a method with local updates only where it is `WORTH` times as fast as all others."""
    exact, local = fastest(predictions, False), fastest(predictions, True)
    if exact is None or local is None:
        return exact or local
    return local if exact.step_seconds >= WORTH * local.step_seconds else exact
