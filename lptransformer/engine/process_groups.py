"""Processes: one torch.distributed world per pipeline rank, and the store that joins them.

The default process group of a process holds the data-parallel replicas of its pipeline rank and nothing else, so no
collective of DeepSpeed can reach another pipeline rank; on GPUs it is NCCL's, also where it has one member, or
DeepSpeed's sums would go through the host. What crosses pipeline ranks are channels (groups of two processes,
engine/p2p.py), groups over the pipeline ranks that clip together, and the store. Replicas agree on what is to follow
through the host, so that nobody waits for a GPU.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist

from lptransformer.engine.transfers import Clock, clock_of
from lptransformer.errors import LostProcessError, UserError
from lptransformer.store import INTERFACE_VARIABLE, meet

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed chooses anyway, with a warning
import deepspeed  # noqa: E402

REFUSED = "refused"  # in the store: how many processes cannot start
GRACE_SECONDS = 10.0  # for the others to leave the store, when one cannot start


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
    replicas: dist.ProcessGroup | None = None  # of this pipeline rank, over gloo, where there are several

    @property
    def global_rank(self) -> int:
        return self.pipeline_rank * self.data_size + self.data_rank

    @property
    def size(self) -> int:
        return self.pipeline_size * self.data_size

    @cached_property
    def clock(self) -> Clock:
        """By which this process is timed."""
        return clock_of(self.device)

    def wait_for_all(self, word: str) -> None:
        """Return when every process of the run has called this with the same word."""
        if self.store.add(word, 1) == self.size:
            self.store.set(f"all {word}", "")
        self.store.wait([f"all {word}"])

    def decided_by_the_first(self, key: str, decide: Callable[[], str]) -> str:
        """What `decide` gives on global rank 0, in every process.

        A UserError there ends all of them with its exit code, and only it has a message.
        """
        if self.global_rank != 0:
            self.store.wait([key], timedelta(days=2))  # it may have to prepare text
            failed, _, decided = self.store.get(key).decode().partition(" ")
            if failed == "failed":
                self.store.queue_push("leaving", "")
                raise SystemExit(UserError.exit_code)
            return decided
        try:
            decided = decide()
        except UserError:
            self.store.set(key, "failed")
            self.leave_the_store(self.timeout.total_seconds())
            raise
        self.store.set(key, f"decided {decided}")
        return decided

    @contextlib.contextmanager
    def starting(self, word: str = "started") -> Iterator[None]:
        """Around checks before a run begins; returns when every process has passed them, under this word.

        A UserError in one process ends all of them with its exit code, and only the first has a message.
        """
        try:
            yield
            self.wait_for_all(word)
        except UserError:
            first = self.store.add(REFUSED, 1) == 1
            self.store.set(f"all {word}", "")
            self.leave_the_store()
            if first:
                raise
            raise SystemExit(UserError.exit_code) from None
        except RuntimeError:  # of a replica that waited for another, which has refused
            with translate_lost_processes():
                if not self.store.check([REFUSED]):
                    raise
        if self.store.check([REFUSED]):
            self.leave_the_store()
            raise SystemExit(UserError.exit_code)

    def leave_the_store(self, seconds: float = GRACE_SECONDS) -> None:
        """Global rank 0 keeps the store until the others have left it, or for a while: some may be stuck."""
        if self.global_rank != 0:
            self.store.queue_push("leaving", "")
            return
        deadline = time.monotonic() + seconds
        while self.store.queue_len("leaving") < self.size - 1 and time.monotonic() < deadline:
            time.sleep(0.01)

    def leave_at_the_end(self) -> None:
        """Leave the store, when every process has come to its end; global rank 0 keeps it, so it goes last.

        Nobody leaves before all are done: a connection that closes early can lose what its peer has not read.
        """
        if self.global_rank != 0:
            self.store.queue_push("leaving", "")
            return
        for _ in range(self.size - 1):
            self.store.queue_pop("leaving", True)

    def group(self, name: str, rank: int, size: int, backend: str = "gloo") -> Any:
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


_before: dict[str, str | None] = {}  # variables that join() sets, as they were before


def join(pipeline: int, data: int, timeout_seconds: float, *, together: bool = False) -> World:
    """Join the world of this process's pipeline rank. Works under `deepspeed`, `torchrun`, and without a launcher.

    With `together` all pipeline ranks are one world, and the default group holds every process in the order of its
    global rank: what DeepSpeed's own pipelines need. The world size that the launcher says must be `pipeline` x `data`
    (check_world_size in config/checks.py has the message for the user).
    """
    timeout = timedelta(seconds=timeout_seconds)
    for name in ("WORLD_SIZE", "LOCAL_RANK", INTERFACE_VARIABLE):
        _before.setdefault(name, os.environ.get(name))
    with translate_lost_processes():
        met = meet(timeout)
    size, store, global_rank = met.size, met.store, met.rank
    assert size == pipeline * data, f"{size} processes for {pipeline} pipeline ranks x {data} replicas"
    os.environ.setdefault("LOCAL_RANK", "0")
    pipeline_rank, data_rank = divmod(global_rank, data)
    cuda = deepspeed.accelerator.get_accelerator().device_name() == "cuda"  # not torch's answer: DS_ACCELERATOR decides
    device = torch.device("cpu")
    if cuda:
        # Several pipeline ranks may share a GPU. DeepSpeed takes the device from the variable.
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        os.environ["LOCAL_RANK"] = str(device.index)
        torch.cuda.set_device(device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed's shared-memory extension needs a compiler, leaks, and can wait forever: never build it.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    name, rank, size = ("all", global_rank, size) if together else (f"pipeline_rank/{pipeline_rank}", data_rank, data)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(name, store),
        rank=rank,
        world_size=size,
        timeout=timeout,
        device_id=device if cuda else None,
    )
    # ZeRO 3 refuses a group that is smaller than what the launcher's variable says: here the group is the world.
    os.environ["WORLD_SIZE"] = str(size)
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    world = World(pipeline_rank, pipeline, data_rank, data, device, store, timeout)
    if data > 1:
        inside = dist.PrefixStore(f"replicas/{pipeline_rank}", store)
        replicas: Any = dist.ProcessGroupGloo(inside, data_rank, data, timeout)
        world.replicas = replicas
    return world


@contextlib.contextmanager
def translate_lost_processes() -> Iterator[None]:
    """One TrainingError for the many ways in which the store and the groups fail when another process has gone."""
    try:
        yield
    except dist.DistError as error:
        raise LostProcessError(f"another process of this run has gone: {str(error).splitlines()[0]}") from error


def any_replica(flags: Sequence[bool], world: World) -> list[bool]:
    """Which of the flags are set on any replica of this pipeline rank."""
    if world.replicas is None:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.int32)
    world.replicas.allreduce([values], dist.ReduceOp.MAX).wait()
    return [bool(value) for value in values]


def gather(group: dist.ProcessGroup, rows: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
    """Every member's vector on the host (member i has sizes[i] elements), in the order of the pipeline ranks.

    Raises TrainingError when a member has gone.
    """
    longest = max(sizes)
    padded = torch.zeros(longest, dtype=rows.dtype)
    padded[: rows.numel()] = rows
    out = [torch.zeros(longest, dtype=rows.dtype) for _ in sizes]
    try:
        group.allgather([out], [padded]).wait()
    except RuntimeError as error:
        raise LostProcessError(f"another stage of this clip group has gone: {str(error).splitlines()[0]}") from error
    return [vector[:size] for vector, size in zip(out, sizes, strict=True)]


def leave(world: World | None = None) -> None:
    """Leave all groups and forget DeepSpeed's module state, so that the process can join another world."""
    if world is not None:
        world.groups.clear()
    for name, value in _before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _before.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
    deepspeed.comm.comm.cdb = None
    groups = deepspeed.utils.groups
    groups.mpu = None  # the grid of a pipeline
    for name in [name for name in vars(groups) if name.isupper() and isinstance(vars(groups)[name], dist.ProcessGroup)]:
        setattr(groups, name, None)
