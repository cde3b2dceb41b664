"""What one micro-batch takes in one stage, to the byte, from an empty stage: nothing is allocated, nothing computed.

The stage's own forward and backward passes run on tensors that have a shape and no memory (torch's FakeTensorMode), and
every storage is counted from its birth to its end. So any family and any head is counted as it is, whatever it keeps.
What a kernel takes for itself for a moment is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lptransformer import cost, family
from lptransformer.config_sections import HeadSection
from lptransformer.family import Anatomy
from lptransformer.footprint import PassBytes, StageTensors
from lptransformer.gradients import Duty
from lptransformer.partition import StagePlan
from lptransformer.stage import Output, Stage, make_stage


def empty_stage(plan: StagePlan, config: Any, parts: Anatomy, head: HeadSection) -> Stage:
    """A stage on the meta device: all shapes, no memory."""
    with torch.device("meta"):
        return make_stage(plan, config, parts, seed=None, head=head)


def tensors_of(stage: Stage, dtype: torch.dtype) -> StageTensors:
    """What an empty stage is made of, when it trains in a dtype."""
    if stage.head is not None:
        stage.head.cast_copies(dtype)
    sizes = {parameter: parameter.numel() for parameter in stage.parameters()}
    return StageTensors(
        trained=stage.plan.trained,
        weights=sum(sizes.values()),
        largest=max(sizes.values(), default=0),
        decaying=sum(size for parameter, size in sizes.items() if parameter.dim() >= 2),
        copy_bytes=sum(buffer.nbytes for buffer in stage.buffers()),
    )


def copies_of(stage: Stage, stages: Sequence[StagePlan]) -> dict[int, int]:
    """What a stage's head holds of other stages' weights: bytes by the stage that they come from (after tensors_of)."""
    found: dict[int, int] = {}
    for one in stage.head.copies if stage.head is not None else ():
        source = next(s.index for s in stages if s.first_block <= one.source_block <= s.last_block)
        found[source] = found.get(source, 0) + stage.get_buffer(one.target).nbytes
    return found


def of_stage(
    stage: Stage,
    duty: Duty,
    *,
    micro_batch_size: int,
    sequence_length: int,
    hidden_size: int,
    dtype: torch.dtype,
    token_fraction: float = 1.0,
) -> PassBytes:
    """The bytes of one micro-batch in an empty stage, which is spent afterwards.

    `duty` is what the stage does with gradients in the phase. `token_fraction` is that of an auxiliary head.
    """
    shape = (micro_batch_size, sequence_length)
    with FakeTensorMode(), family.whole_windows(), _Alive() as alive:
        _give_tensors(stage, dtype)
        labels = torch.zeros(shape, dtype=torch.int64)
        positions = None
        if stage.head is not None and not stage.plan.is_last and token_fraction < 1.0:
            kept = cost.loss_positions(sequence_length, token_fraction)
            positions = torch.zeros(micro_batch_size, kept, dtype=torch.int64)

        def hidden() -> Tensor:
            return torch.zeros(*shape, hidden_size, dtype=dtype)

        def inputs() -> Tensor:
            return labels if stage.plan.is_first else hidden().requires_grad_(bool(duty.below))

        if not stage.plan.trained:
            with torch.no_grad():
                given, before = inputs(), alive.restart()
                stage(given, labels, 0.0)
                return PassBytes(alive.peak - before, 0, 0, 0)
        found = []
        for _ in range(2):  # at first the weights have no gradients to be added to
            given, before = inputs(), alive.restart()
            output: Output | None = stage(given, labels, 0.5, positions, duty.split)
            forward, pull = alive.peak - before, 0
            assert output is not None
            handed = output[0].untyped_storage().nbytes()
            kept_bytes = alive.now - before - handed
            if duty.pulls and output[4] is not None:
                gradient, pulling = hidden(), alive.restart()
                output[4](gradient)
                pull = alive.peak - pulling
                del gradient
            above = [(hidden(), weight) for _, weight in duty.above]
            start = alive.restart()
            _backward(output, duty, above)
            found.append((forward, kept_bytes, pull, alive.peak - start))
            del output, above, given
    (forward, kept_bytes, pull, first), (*_, later) = found
    return PassBytes(forward, kept_bytes, first, later, pull)


def _backward(output: Output, duty: Duty, above: Sequence[tuple[Tensor, float]]) -> None:
    """As executor.py takes it."""
    hidden_states, loss, _, loss_gradient, _ = output
    weighed = list(above)
    if loss_gradient is not None and duty.loss_weight is not None:
        weighed.insert(0, (loss_gradient, duty.loss_weight))
    gradient = None
    for part, weight in weighed:
        if weight != 0.0:
            term = part if weight == 1.0 else part * weight
            gradient = term if gradient is None else gradient + term
    terms = [] if loss is None else [loss]
    if gradient is not None:
        terms.append((hidden_states * gradient).sum())
    total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
    total.backward()


def _give_tensors(module: nn.Module, dtype: torch.dtype) -> None:
    """Tensors without memory, on the CPU, for those on the meta device."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=dtype)
                owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Alive(TorchDispatchMode):
    """Bytes of all storages that were made in here and still are."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, Any] = {}

    def restart(self) -> int:
        """A new peak begins; the bytes alive now."""
        self.peak = self.now
        return self.now

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
        self.peak = max(self.peak, self.now)
