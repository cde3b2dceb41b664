"""Processes: one torch.distributed world per pipeline rank, and the store that joins them.

The default process group of a process holds the data-parallel replicas of its pipeline rank and nothing else, so no
collective of DeepSpeed can reach another pipeline rank. What crosses pipeline ranks are links (groups of two processes
for channel.py), groups over the pipeline ranks of one span, and the store.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from lptransformer.errors import TrainingError
from lptransformer.processes import launched_size

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed chooses anyway, with a warning
import deepspeed  # noqa: E402


@dataclass
class World:
    """Where this process stands. `global_rank` = `pipeline_rank` x `data_size` + `data_rank`."""

    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int
    device: torch.device
    store: dist.Store
    timeout: timedelta
    groups: list[dist.ProcessGroup] = field(default_factory=list)

    @property
    def global_rank(self) -> int:
        return self.pipeline_rank * self.data_size + self.data_rank

    @property
    def size(self) -> int:
        return self.pipeline_size * self.data_size

    def group(self, name: str, rank: int, size: int, backend: str = "gloo") -> dist.ProcessGroup:
        """A process group outside the default one; all its members call this with the same name."""
        store = dist.PrefixStore(f"group/{name}/{self.data_rank}", self.store)
        if backend == "nccl":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.timeout
            group: Any = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            group = dist.ProcessGroupGloo(store, rank, size, self.timeout)
        self.groups.append(group)
        return group


def join(pipeline: int, data: int, timeout_seconds: float) -> World:
    """Join the world of this process's pipeline rank. Works under `deepspeed`, `torchrun`, and without a launcher.

    The world size that the launcher says must be `pipeline` x `data` (config.check_world_size is the user's message).
    """
    timeout = timedelta(seconds=timeout_seconds)
    size = launched_size()
    assert size == pipeline * data, f"{size} processes for {pipeline} pipeline ranks x {data} replicas"
    if size == 1:
        store, global_rank = dist.HashStore(), 0
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        store, global_rank, _ = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    pipeline_rank, data_rank = divmod(global_rank, data)
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's shared-memory extension needs a compiler, leaks, and can wait for ever: never build it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if cuda and data > 1 else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"pipeline_rank/{pipeline_rank}", store),
        rank=data_rank,
        world_size=data,
        timeout=timeout,
    )
    # ZeRO 3 refuses a group that is smaller than what the launcher's variable says: here the group is the world.
    os.environ["WORLD_SIZE"] = str(data)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return World(pipeline_rank, pipeline, data_rank, data, device, store, timeout)


def any_replica(flag: bool, world: World) -> bool:
    """Whether the flag is set on any replica of this pipeline rank."""
    if world.data_size == 1:
        return flag
    value = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def gather_over_span(group: dist.ProcessGroup, rows: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Every member's vector (member i has sizes[i] elements) on every member, in the order of the pipeline ranks.

    Raises TrainingError when a member has gone.
    """
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=rows.dtype)
    padded[: rows.numel()] = rows.cpu()
    out = [torch.zeros(longest, dtype=rows.dtype) for _ in sizes]
    try:
        group.allgather([out], [padded]).wait()
    except RuntimeError as error:
        raise TrainingError(f"another stage of this span has gone: {str(error).splitlines()[0]}") from error
    return [vector[:size].to(rows.device) for vector, size in zip(out, sizes, strict=True)]


def leave(world: World | None = None) -> None:
    """Leave all groups and forget DeepSpeed's module state, so that the process can join another world."""
    if world is not None:
        world.groups.clear()
        os.environ["WORLD_SIZE"] = str(world.size)
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    groups = deepspeed.utils.groups
    for name in [name for name in vars(groups) if name.isupper() and isinstance(vars(groups)[name], dist.ProcessGroup)]:
        setattr(groups, name, None)
