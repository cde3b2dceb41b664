"""What each replica owns of the optimizer's tensors, by the names of the weights, at any ZeRO stage.

0        every parameter whole, the same on all replicas
1, 2     a range of all of a group's parameters, laid end to end: DeepSpeed steps one flat tensor per group
3        of every parameter a range, padded at its end; these too lie in flat tensors
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

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
    return {
        kind: piece.of(tensor)
        for kind, tensor in state.items()
        if torch.is_tensor(tensor) and tensor.shape == piece.flat.shape and kind != "step"
    }


def step(optimizer: torch.optim.Optimizer, piece: Owned) -> float | None:
    """How many steps the optimizer has made there; None where it does not count, or has made none."""
    counted = optimizer.state.get(piece.flat, {}).get("step")
    return None if counted is None else float(counted)


def load(optimizer: torch.optim.Optimizer, pieces: list[Owned], saved: SavedFor) -> None:
    """Give the optimizer the saved tensors and steps of what this replica owns.

    Raises RunError where parameters that share a count of steps were saved after different numbers of them.
    """
    counted: dict[int, tuple[str, float | None]] = {}
    for piece in pieces:
        part = saved.of(piece.name)
        kinds = [] if part is None else [one for one in part.kinds(piece.name) if one not in OF_WEIGHTS]
        steps = None if part is None else part.step(piece.name)
        other, before = counted.setdefault(id(piece.flat), (piece.name, steps))
        if before != steps:
            raise RunError(
                f"{other} was saved after {before or 0:g} steps of the optimizer, {piece.name} after {steps or 0:g}: "
                "at ZeRO 1 to 3 they share one count, unless the run is started with --resume"
            )
        if part is None or not kinds:
            optimizer.state.pop(piece.flat, None)
            continue
        state = optimizer.state[piece.flat]
        if steps is not None:
            own = isinstance(optimizer, DeepSpeedCPUAdam)
            state["step"] = int(steps) if own else torch.tensor(steps, dtype=torch.float32)
        for kind in kinds:
            if kind not in state:
                state[kind] = torch.zeros_like(piece.flat)
            piece.of(state[kind]).copy_(part.part(kind, piece.name, piece.start, piece.numel))


def saved_steps(stage: Stage, saved: SavedFor) -> dict[nn.Parameter, float | None]:
    """How many steps the optimizer that saved had made with each parameter of a stage; None for new ones."""
    found = {one: saved.of(saved_name(name)) for name, one in stage.named_parameters() if one.requires_grad}
    names = {one: saved_name(name) for name, one in stage.named_parameters()}
    return {one: None if part is None else part.step(names[one]) for one, part in found.items()}
