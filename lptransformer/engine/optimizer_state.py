"""What each replica owns of the optimizer's tensors, by the names of the weights, at any ZeRO stage; and the second
version of the weights where gradients are delayed.

0        every parameter whole, the same on all replicas
1, 2     a range of all of a group's parameters, laid end to end: DeepSpeed steps one flat tensor per group
3        of every parameter a range, padded at its end; these too lie in flat tensors
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam
from torch import Tensor, nn

from lptransformer.errors import RunError
from lptransformer.models.adapters import saved_name
from lptransformer.models.stage import Stage
from lptransformer.run_folder.saved_stage import FP32, SavedFor

BEFORE = "before"  # of a parameter: its weight one update before
IN_8_BITS = {"exp_avg": 1, "exp_avg_sq": 2}  # moments of AdamW, and their numbers in bitsandbytes' state
BLOCK = 256  # elements of a tensor that have one scale there
OF_WEIGHTS = (FP32, BEFORE)  # what is saved beside the optimizer's own tensors


@dataclass(frozen=True)
class Owned:
    """Elements `start` to `start + numel` of a flattened parameter: where the optimizer steps them, in `flat` from
    `offset` on."""

    name: str
    parameter: nn.Parameter
    start: int
    numel: int
    flat: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Its elements of `flat`, or of a tensor of the optimizer that is shaped like it: a view [numel]."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.numel]


def owned(engine: deepspeed.DeepSpeedEngine, names: Mapping[str, nn.Parameter]) -> list[Owned]:
    """What this replica owns of these parameters; at ZeRO 0 all of them, on every replica."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    if stage == 0:
        return [Owned(name, weight, 0, weight.numel(), weight, 0) for name, weight in names.items()]
    return list(_of_partition_3(optimizer, names) if stage == 3 else _of_partition(optimizer, names))


def _of_partition(optimizer: Any, names: Mapping[str, nn.Parameter]) -> Iterator[Owned]:
    for name, weight in names.items():
        mapping = weight._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:  # this replica owns something of it
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            yield Owned(name, weight, here.start, here.numel, flat, there.start)


def _of_partition_3(optimizer: Any, names: Mapping[str, nn.Parameter]) -> Iterator[Owned]:
    for name, weight in names.items():
        group, offset, padded = optimizer.grad_position[optimizer.get_param_id(weight)]
        start = padded * dist.get_rank()
        numel = min(padded, weight.ds_numel - start)  # type: ignore[attr-defined]
        if numel > 0:
            yield Owned(name, weight, start, numel, optimizer.fp32_partitioned_groups_flat[group], offset)


def tensors(optimizer: torch.optim.Optimizer, piece: Owned) -> dict[str, Tensor]:
    """The optimizer's tensors of what is owned, by kind, as views; nothing before its first step."""
    state = optimizer.state.get(piece.flat, {})
    if "state1" in state:
        return {kind: _dequantised(state, number, piece) for kind, number in IN_8_BITS.items()}
    return {
        kind: piece.of(tensor)
        for kind, tensor in state.items()
        if torch.is_tensor(tensor) and tensor.shape == piece.flat.shape and kind != "step"
    }


def steps(optimizer: torch.optim.Optimizer, pieces: Iterable[Owned]) -> dict[str, float]:
    """How many steps the optimizer has made with each, by name, where it counts them and has made one.

    The counts of AdamW's kernel for GPUs are there: all come at once, in one copy that waits for the device.
    """
    found = {piece.name: optimizer.state.get(piece.flat, {}).get("step") for piece in pieces}
    counted = {name: torch.as_tensor(count, dtype=torch.float32) for name, count in found.items() if count is not None}
    return dict(zip(counted, torch.stack([*counted.values()]).tolist() if counted else (), strict=True))


def load(optimizer: torch.optim.Optimizer, pieces: list[Owned], saved: SavedFor) -> None:
    """Give the optimizer the saved tensors and steps of what this replica owns.

    Raises RunError where parameters that share a count of steps were saved after different numbers of them.
    """
    in_8_bits, on_gpu = hasattr(optimizer, "init_state"), bool(optimizer.defaults.get("fused"))
    of_flat: dict[int, list[Owned]] = {}
    for piece in pieces:
        of_flat.setdefault(id(piece.flat), []).append(piece)
    for together in of_flat.values():
        flat, other = together[0].flat, together[0].name
        optimizer.state.pop(flat, None)
        state: dict[str, Tensor] = {}
        before: float | None = None
        for piece in together:
            part = saved.of(piece.name)
            kinds = [] if part is None else [one for one in part.kinds(piece.name) if one not in OF_WEIGHTS]
            steps = None if part is None else part.step(piece.name)
            if piece is not together[0] and before != steps:
                raise RunError(
                    f"{other} was saved after {before or 0:g} steps of the optimizer, {piece.name} after "
                    f"{steps or 0:g}: at ZeRO 1 to 3 they share one count, unless the run is started with --resume"
                )
            before = steps
            for kind in kinds:
                assert part is not None
                if kind not in state:
                    # Moments that are brought to 8 bits would take four times that on the device.
                    state[kind] = torch.zeros_like(flat, device="cpu" if in_8_bits else None)
                piece.of(state[kind]).copy_(part.part(kind, piece.name, piece.start, piece.numel))
        if not state:
            continue
        if before is not None:
            device = flat.device if on_gpu else "cpu"
            count = torch.tensor(before, dtype=torch.float32, device=device)
            state["step"] = int(before) if isinstance(optimizer, DeepSpeedCPUAdam) else count  # type: ignore[assignment]
        optimizer.state[flat] = state
        if in_8_bits:
            _quantise(optimizer, flat)


def _dequantised(state: Mapping[str, Tensor], number: int, piece: Owned) -> Tensor:
    """A moment in fp32, on the host: on the device those of a save would take four times what the run has for them."""
    codes = piece.of(state[f"state{number}"]).cpu()
    if codes.dtype != torch.uint8:
        return codes  # of small tensors they are in fp32
    first, last = piece.offset // BLOCK, (piece.offset + piece.numel - 1) // BLOCK
    scales = state[f"absmax{number}"][first : last + 1].cpu().repeat_interleave(BLOCK)[piece.offset % BLOCK :]
    return state[f"qmap{number}"].cpu()[codes.int()] * scales[: piece.numel]


def _quantise(optimizer: Any, flat: Tensor) -> None:
    """Give bitsandbytes its tensors in place of the moments in fp32."""
    from bitsandbytes.functional import quantize_blockwise

    loaded = optimizer.state.pop(flat)
    (place,) = [
        (number, index, group)
        for number, group in enumerate(optimizer.param_groups)
        for index, one in enumerate(group["params"])
        if one is flat
    ]
    optimizer.init_state(place[2], flat, *place[:2])
    state = optimizer.state[flat]
    state["step"] = int(loaded["step"])
    for kind, number in IN_8_BITS.items():
        if state[f"state{number}"].dtype == torch.uint8:
            codes, scales = quantize_blockwise(
                loaded[kind].view(-1).to(flat.device), code=state[f"qmap{number}"], blocksize=BLOCK
            )
            state[f"state{number}"].view(-1).copy_(codes)
            state[f"absmax{number}"].copy_(scales.absmax)
        else:
            state[f"state{number}"].copy_(loaded[kind])


def saved_steps(stage: Stage, saved: SavedFor) -> dict[nn.Parameter, float | None]:
    """How many steps the optimizer that saved had made with each parameter of a stage; None for new ones."""
    found = {one: saved.of(saved_name(name)) for name, one in stage.named_parameters() if one.requires_grad}
    names = {one: saved_name(name) for name, one in stage.named_parameters()}
    return {one: None if part is None else part.step(names[one]) for one, part in found.items()}


class Version(NamedTuple):
    """The weights as of some update: what is stored, of every parameter its own part of that, and DeepSpeed's views of
    the replicas' shares."""

    stored: list[Tensor]
    shown: list[Tensor]
    partitions: list[list[Tensor]]


class TwoVersions:
    """The current weights and those of one update before, in storages of their own; the parameters show one of them.

    A forward pass that was made before an update is followed by its backward after it, at the same weights: so an
    update never writes into a storage that a forward pass may have read, and what was `now` becomes `before`. At ZeRO 1
    and 2 the weights are parts of DeepSpeed's flat tensors, into which it writes the updated ones: it is given others.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], engine: deepspeed.DeepSpeedEngine) -> None:
        self.parameters = list(parameters)
        assert engine.zero_optimization_stage() < 3, "no replica has all weights of a version"
        self._zero = engine.optimizer if engine.zero_optimization_stage() else None
        shown = [parameter.data for parameter in self.parameters]
        if self._zero is None:
            self.now = Version(shown, shown, [])
            copied = [one.clone() for one in shown]
            self.before = Version(copied, copied, [])
            return
        flat, split = list(self._zero.bit16_groups_flat), self._zero.get_data_parallel_partitions
        self.now = Version(flat, shown, list(self._zero.parallel_partitioned_bit16_groups))
        group_of = {one: group for group, members in enumerate(self._zero.bit16_groups) for one in members}
        copied = [one.clone() for one in flat]
        parts = []
        for parameter, data in zip(self.parameters, shown, strict=True):
            group = group_of[parameter]
            offset = data.storage_offset() - flat[group].storage_offset()
            parts.append(copied[group].narrow(0, offset, data.numel()).view(data.shape))
        self.before = Version(copied, parts, [split(one, group) for group, one in enumerate(copied)])

    def show(self, before: bool) -> None:
        """Let the parameters be the weights of one update before, or the current ones."""
        for parameter, data in zip(self.parameters, (self.before if before else self.now).shown, strict=True):
            parameter.data = data

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around the optimizer's step, which works in place: it gets a copy of `now`."""
        for old, new in zip(self.now.stored, self.before.stored, strict=True):
            new.copy_(old)
        self.now, self.before = self.before, self.now
        if self._zero is not None:
            self._zero.bit16_groups_flat[:] = self.now.stored
            self._zero.parallel_partitioned_bit16_groups[:] = self.now.partitions
        self.show(before=False)
        # The passes under way saved weights of another storage: autograd need not see that a step was made.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            yield

    def before_of(self, parameter: nn.Parameter) -> Tensor:
        """A weight as it was one update before."""
        return next(data for one, data in zip(self.parameters, self.before.shown, strict=True) if one is parameter)

    def load(self, before: Mapping[nn.Parameter, Tensor]) -> None:
        """The weights of one update before; the current ones are loaded with the stage."""
        self.show(before=False)
        for parameter, data in zip(self.parameters, self.before.shown, strict=True):
            data.copy_(before.get(parameter, parameter))
