"""What one micro-batch takes in one stage, to the byte, from an empty stage: nothing is allocated, nothing computed.

The stage's own forward and backward passes run on tensors that have a shape and no memory (torch's FakeTensorMode), and
every storage is counted from its birth to its end. So any family and any head is counted as it is, whatever it keeps.
What a kernel takes for itself for a moment is not seen.

    ranks = EmptyStages(blueprint).ranks(blueprint.objective, blueprint.stages, precision("fp32"))
    [rank.peak for rank in ranks]                              # bytes of a process, by pipeline rank
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lptransformer.methods import cost, recomputing
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.gradient_flow import Duty, copy_lags, duties
from lptransformer.methods.heads import blocks_like, followed
from lptransformer.methods.objectives import Objective
from lptransformer.methods.stages import StagePlan
from lptransformer.models import cross_entropy, hf_parts
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import LossBatch
from lptransformer.models.stage import (
    Stage,
    StageOutput,
    backward_loss,
    block_matrices,
    for_training,
    make_stage,
)
from lptransformer.planning import rank_memory
from lptransformer.planning.rank_memory import ActivationBytes, PassBytes, RankMemory
from lptransformer.planning.stage_state import Precision, StageTensors

MOST_CHUNKS = 64  # of the loss that are counted one by one
ENDS = 2  # blocks: the first and the last that a pass comes to are not like the others


class EmptyStages:
    """The stages of a model on the meta device, each counted once.

    With `alike` blocks count as equal: of a longer stage the last three are counted, and what the one in the middle
    adds is added again for the others. Where every N-th block computes its activations again, N stand in the middle.
    That is how a large model is planned for many splits.
    """

    def __init__(self, blueprint: Blueprint, *, alike: bool = False) -> None:
        # Others of the library's keep as much as sdpa, and run on GPUs alone.
        attention = blueprint.attention if blueprint.attention in ("auto", "eager") else "sdpa"
        self.blueprint, self.alike = replace(blueprint, attention=attention), alike
        self.dtype: torch.dtype = getattr(torch, DTYPES[blueprint.dtype].name)
        self._period = recomputing.period(blueprint.activation_checkpointing)
        self._stages: dict[Hashable, tuple[Stage, StageTensors, StageTensors]] = {}
        self._counts: dict[Hashable, _Count] = {}

    def ranks(
        self,
        objective: Objective,
        stages: Sequence[StagePlan],
        how: Precision,
        *,
        micro_batch_size: int | None = None,
        rounds: int | None = None,
    ) -> list[RankMemory]:
        """The memory of a process of every pipeline rank, at `rounds` micro-batches of a replica in an update.

        Both numbers are by default those of the blueprint.
        """
        blueprint = self.blueprint
        micro_batch_size, rounds = micro_batch_size or blueprint.micro_batch_size, rounds or blueprint.rounds
        tokens, in_flight = micro_batch_size * blueprint.sequence_length, blueprint.in_flight
        passes = [
            [self.passes(stage, duty, micro_batch_size) for stage, duty in zip(stages, of_phase, strict=True)]
            for of_phase in (duties(phase, stages) for phase in objective.phases)
        ]
        return rank_memory.predict(
            objective,
            stages,
            [self.tensors(stage) for stage in stages],
            passes,
            how,
            rounds=rounds,
            micro_batch_tokens=tokens,
            hidden_bytes=tokens * blueprint.parts.hidden_size * self.dtype.itemsize,
            in_flight=in_flight,
            lags=copy_lags(stages, followed(blueprint.head), in_flight, rounds),
            refresh_every=blueprint.head.refresh_every,
        )

    def tensors(self, stage: StagePlan) -> StageTensors:
        _, of_stage, of_block = self._empty(stage)
        more = self._more(stage)
        return replace(
            of_stage,
            weights=of_stage.weights + more * of_block.weights,
            decaying=of_stage.decaying + more * of_block.decaying,
            matrices=of_stage.matrices + more * of_block.matrices,
            frozen=of_stage.frozen + more * of_block.frozen,
            buffer_bytes=of_stage.buffer_bytes + more * of_block.buffer_bytes,
        )

    def passes(self, stage: StagePlan, duty: Duty, micro_batch_size: int) -> PassBytes:
        """The bytes of one micro-batch; `duty` is what the stage does with gradients in the phase."""
        weights = tuple(weight for _, weight in duty.above)
        work = duty.loss_weight, duty.split, len(duty.pulls) > 0, len(duty.below) > 0, weights
        key = self._kind(stage), micro_batch_size, work
        if key not in self._counts:
            self._counts[key] = self._count(self._empty(stage)[0], duty, micro_batch_size)
        return self._counts[key].passes(self._more(stage) // self._period)

    def of_others(self, micro_batch_size: int) -> ActivationBytes:
        """What programs of others keep, by block and head: from the last blocks, with the model's own head and without.

        Of the readout's gradient, which the loss keeps too, no more is said than how large a weight of it is.
        """
        last, size = self.blueprint.objective.num_blocks - 1, self.dtype.itemsize
        assert self.blueprint.activation_checkpointing == recomputing.KEPT
        with_head = StagePlan(0, last, last, 0, has_head=True, is_first=False, is_last=True, trained=True)
        without = replace(with_head, has_head=False, is_last=False)
        whole = self.passes(with_head, Duty(1.0, None, (), (), 0), micro_batch_size)
        above = Duty(None, None, ((0, 1.0),), (), 0)
        longer = replace(without, first_block=max(0, last - 1))
        one, two = (self.passes(stage, above, micro_batch_size).kept for stage in (without, longer))
        rows = micro_batch_size * self.blueprint.sequence_length * self.blueprint.parts.hidden_size * size
        return ActivationBytes(
            block=two - one if last > 0 else one + rows,
            norm=whole.kept - one - self.blueprint.parts.vocab_size * self.blueprint.parts.hidden_size * size,
            rows=rows,
            logits=whole.forward - whole.kept - rows,
            readout_weight=size,
        )

    def _more(self, stage: StagePlan) -> int:
        """Blocks beside those that are counted."""
        periods = max(0, (stage.num_blocks - ENDS) // self._period - 1)
        return periods * self._period if self.alike else 0

    def _kind(self, stage: StagePlan) -> Hashable:
        if not self.alike:
            return stage
        head, of = self.blueprint.head, self.blueprint.costs.trained
        first = stage.first_block + self._more(stage)
        counted = of and (of.blocks[first : stage.last_block + 1], of.auxiliary.get(stage.last_block))
        # A fitted head has no more blocks than are above it.
        of_head = blocks_like(head, stage.last_block, self.blueprint.objective.num_blocks) if stage.has_head else ()
        how = self.blueprint.activation_checkpointing
        again = tuple(
            tuple(recomputing.recomputed(how, block) for block in blocks)
            for blocks in (range(first, stage.last_block + 1), of_head)
        )
        return stage.is_first, stage.is_last, stage.has_head, stage.trained, again, counted

    def _empty(self, stage: StagePlan) -> tuple[Stage, StageTensors, StageTensors]:
        """A stage without memory; what it is made of, and what its last block is."""
        kind = self._kind(stage)
        if kind not in self._stages:
            shorter = replace(stage, first_block=stage.first_block + self._more(stage))
            with torch.device("meta"):
                empty = for_training(make_stage(shorter, self.blueprint, seed=None), self.blueprint)
            if empty.head is not None:
                empty.head.cast_copies(self.dtype)
            copies = tuple(
                (
                    copy.source_block - stage.last_block if copy.target.startswith("head.blocks.") else None,
                    empty.get_buffer(copy.target).nbytes,
                )
                for copy in (empty.head.copies if empty.head is not None else ())
            )
            shared = empty.head.frozen if empty.head is not None else ()
            sizes = {name: empty.get_buffer(f"head.{name}").nbytes for name in shared}
            matrices = block_matrices(empty, self.blueprint.parts)
            whole = replace(_made_of(empty, stage.trained, matrices), copies=copies, shared=sizes)
            self._stages[kind] = empty, whole, _made_of(self._blocks(empty)[-1], stage.trained, matrices)
        return self._stages[kind]

    def _blocks(self, stage: Stage) -> list[nn.Module]:
        blocks = stage.body.get_submodule(self.blueprint.parts.blocks_in_base)
        assert isinstance(blocks, nn.ModuleList)
        return list(blocks[stage.plan.first_block : stage.plan.last_block + 1])

    def _count(self, stage: Stage, duty: Duty, micro_batch_size: int) -> _Count:
        shape, fraction = (micro_batch_size, self.blueprint.sequence_length), self.blueprint.head.token_fraction
        with (
            FakeTensorMode(),
            hf_parts.known_documents(None),
            _few_chunks(),
            _Alive() as alive,
            alive.marked(self._blocks(stage), self._period),
        ):
            _give_tensors(stage, self.dtype)
            labels = torch.zeros(shape, dtype=torch.int64)
            positions = None
            if stage.head is not None and not stage.plan.is_last and fraction < 1.0:
                kept_positions = cost.loss_positions(self.blueprint.sequence_length, fraction)
                positions = torch.zeros(micro_batch_size, kept_positions, dtype=torch.int64)

            def hidden() -> Tensor:
                return torch.zeros(*shape, self.blueprint.parts.hidden_size, dtype=self.dtype)

            def inputs() -> Tensor:
                return labels if stage.plan.is_first else hidden().requires_grad_(bool(duty.below))

            nothing = _Peak((0,), 0)
            if not stage.plan.trained and not duty.pulls:
                given = inputs()
                alive.begin()
                with torch.no_grad():
                    stage(given, LossBatch(labels, 0.0))
                return _Count(alive.end(), 0, nothing, nothing, nothing)
            backward = []
            for _ in range(2):  # at first the weights have no gradients to be added to
                given, pull = inputs(), nothing
                before = alive.begin()
                output: StageOutput | None = stage(given, LossBatch(labels, 0.5, positions), duty.split)
                forward = alive.end()
                assert output is not None
                kept = alive.now - before - output.hidden_states.untyped_storage().nbytes()
                if duty.pulls and output.pull is not None:
                    gradient = hidden()
                    alive.begin()
                    output.pull(gradient)
                    pull = alive.end()
                    del gradient
                if not stage.plan.trained:
                    return _Count(forward, kept, nothing, nothing, pull)
                above = [(hidden(), weight) for _, weight in duty.above]
                alive.begin()
                backward_loss(output, duty, above).backward()
                backward.append(alive.end())
                del output, above, given
        return _Count(forward, kept, backward[0], backward[1], pull)


@dataclass(frozen=True)
class _Peak:
    """The peak of a pass, by its parts, with a border at every block; `grows` is what the last `period` of blocks adds,
    backward but for the one that a pass comes to last.

    Behind a block more can be alive than what stays; then it is so behind all but the first one.
    """

    parts: tuple[int, ...]
    grows: int
    period: int = 1

    def of(self, more: int) -> int:
        """With `more` periods behind that one."""
        if len(self.parts) <= ENDS + self.period:  # the pass comes to no blocks, or to few
            return max(self.parts)
        before, repeated, rest = self.parts[: -self.period - 1], self.parts[-self.period - 1 : -1], self.parts[-1]
        more_bytes = more * self.grows
        return max(*before, *(part + max(0, more_bytes) for part in repeated), rest + more_bytes)


@dataclass(frozen=True)
class _Count:
    forward: _Peak
    kept: int
    first_backward: _Peak
    backward: _Peak
    pull: _Peak

    def passes(self, more: int) -> PassBytes:
        return PassBytes(
            forward=self.forward.of(more),
            kept=self.kept + more * self.forward.grows if self.kept else 0,
            first_backward=self.first_backward.of(more),
            backward=self.backward.of(more),
            pull=self.pull.of(more),
        )


def _made_of(module: nn.Module, trained: bool, matrices: set[nn.Parameter]) -> StageTensors:
    frozen = sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)
    sizes = {parameter: parameter.numel() for parameter in module.parameters() if parameter.requires_grad}
    return StageTensors(
        trained=trained,
        weights=frozen + sum(sizes.values()),
        frozen=frozen,
        largest=max(sizes.values(), default=0),
        decaying=sum(size for parameter, size in sizes.items() if parameter.dim() >= 2),
        matrices=sum(size for parameter, size in sizes.items() if parameter in matrices),
        largest_matrix=max((size for parameter, size in sizes.items() if parameter in matrices), default=0),
        buffer_bytes=sum(buffer.nbytes for buffer in module.buffers()),
    )


def _give_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Tensors without memory, on the CPU, for those that have a shape alone."""
    given: dict[nn.Parameter, nn.Parameter] = {}  # one for a matrix that is embedding and readout
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if parameter not in given:
                empty = torch.empty(parameter.shape, dtype=dtype)
                given[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
            setattr(owner, name, given[parameter])
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _few_chunks() -> Iterator[None]:
    """Of very many chunks of the loss only the first and the last ones: those between repeat what was."""
    starts = cross_entropy.chunk_starts

    def few(rows: int, chunk_tokens: int) -> Sequence[int]:
        found = starts(rows, chunk_tokens)
        return found if len(found) <= MOST_CHUNKS else [*found[:2], *found[-2:]]

    cross_entropy.chunk_starts = few
    try:
        yield
    finally:
        cross_entropy.chunk_starts = starts


class _Alive(TorchDispatchMode):
    """Bytes of all storages that were made in here and still are."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = self._start = 0
        self._period = 1
        self._marks: list[tuple[int, int]] = []  # alive then, and the peak since the mark before
        self._storages: dict[int, Any] = {}

    def begin(self) -> int:
        """A pass begins; the bytes alive now."""
        self._start = self._peak = self.now
        self._marks = []
        return self.now

    def end(self) -> _Peak:
        """What the pass came to, beyond what was alive before it."""
        peaks = tuple(peak - self._start for peak in (*(peak for _, peak in self._marks), self._peak))
        before = self._marks[-1 - self._period : -self._period]
        return _Peak(peaks, self._marks[-1][0] - before[0][0] if before else 0, self._period)

    @contextmanager
    def marked(self, blocks: Sequence[nn.Module], period: int) -> Iterator[None]:
        """Passes in here are counted in parts: a mark behind every block, forward and backward. What they do repeats
        after a `period` of blocks."""
        self._period = period

        def mark(*_: Any) -> None:
            self._marks.append((self.now, self._peak))
            self._peak = self.now

        def behind(block: nn.Module, inputs: Any, output: Any) -> None:
            mark()
            hidden_states = output[0] if isinstance(output, tuple) else output
            if hidden_states.requires_grad:
                hidden_states.register_hook(mark)

        hooks = [block.register_forward_hook(behind) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._born(tensor.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.now += size
        self._peak = max(self._peak, self.now)
