"""The other processes of a run, which only pretend: a store with their entries, groups whose members agree at once.

What comes from other pipeline ranks are the headers that the schedule expects, over empty tensors; what is sent to them
goes nowhere. Only names of torch.distributed are replaced, so nothing here depends on where the project keeps what.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch
import torch.distributed as dist
from device import BACKENDS, LOG, replace
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from lptransformer.engine import process_groups
from lptransformer.store import Meeting

HIDDEN_STATES, GRADIENT = 0, 2  # the first number of a message's header


class NamedStore(dist.PrefixStore):
    """A prefix store that can say what its prefix is."""

    def __init__(self, name: str, store: dist.Store) -> None:
        super().__init__(name, store)
        self.name = name


class Message:
    """One that has arrived, or left. What is received comes `late`: so many seconds after somebody waits for it."""

    late = 0.0

    def __init__(self, buffer: Tensor | None = None, header: list[int] | None = None) -> None:
        self.buffer, self.header = buffer, header

    def wait(self, *args: Any) -> bool:
        if self.header is not None and self.buffer is not None:
            time.sleep(self.late)
            if self.buffer.dtype == torch.int64:  # over NCCL a header is a message by itself
                self.buffer.copy_(torch.tensor(self.header))
            elif self.buffer.device.type == "cpu":
                self.buffer[: 8 * len(self.header)].view(torch.int64).copy_(torch.tensor(self.header))
        return True


class Group:
    """A channel, or a group over pipeline ranks; made like ProcessGroupGloo and ProcessGroupNCCL."""

    backend, rounds, replicas, replica = "gloo", 1, 1, 0

    class Options:
        _timeout: Any = None

    def __init__(self, store: NamedStore, rank: int, size: int, options: Any = None) -> None:
        self.rank, self.name, self.received = rank, store.name, 0
        self.kind = HIDDEN_STATES if "/hidden/" in self.name else GRADIENT if "/gradient/" in self.name else None

    def send(self, buffers: list[Tensor], peer: int, tag: int) -> Message:
        self._note("send", buffers[0])
        return Message()

    def recv(self, buffers: list[Tensor], peer: int, tag: int) -> Message:
        self._note("receive", buffers[0])
        if self.kind is None:  # copies of weights have no header
            return Message()
        update, micro_batch = divmod(self.received, self.rounds)
        header = [self.kind, update, micro_batch * self.replicas + self.replica, 0, 0, 0, 0, 0]
        self.received += 1
        return Message(buffers[0], header)

    def allreduce(self, tensors: list[Tensor], op: Any) -> Message:
        self._note("all_reduce", tensors[0])
        return Message()

    def allgather(self, out: list[list[Tensor]], given: list[Tensor]) -> Message:
        self._note("all_gather", given[0])
        for tensor in out[0]:
            tensor.copy_(given[0])
        return Message()

    def eager_connect_single_device(self, device: torch.device) -> None: ...

    def _note(self, what: str, tensor: Tensor) -> None:
        num_bytes = tensor.numel() * tensor.element_size()
        LOG.note("message", f"{what} over {self.backend} of a {tensor.device.type} tensor", num_bytes)


class NcclGroup(Group):
    backend = "nccl"


def pretend(rank: int, size: int, replicas: int, rounds: int, shared_heads: list[int], last_stage: int) -> None:
    """This process is `rank` of `size`, with `rounds` micro-batches per update and replica; nobody else is there.

    `shared_heads` are the stages of other processes whose heads hold copies of the last stage's readout: their
    processes would have said so in the store.
    """
    store = dist.HashStore()
    store.set("hub commits", "decided {}")
    store.set("prepared", "decided {}")
    store.set("isolation", "decided ")
    store.set("micro_batch_size", "decided 0")
    for other in range(size):
        store.set(f"memory/{other}", json.dumps([[f"GPU {other}", 2**50]]))
    for stage in shared_heads:
        store.set(f"copies/{stage}", json.dumps({last_stage: [["head.readout.weight", "head.readout.weight"]]}))

    real = dist.init_process_group

    def init_process_group(backend: str, *, rank: int, world_size: int, **options: Any) -> None:
        BACKENDS["world"] = backend
        real("fake", store=FakeStore(), rank=rank, world_size=world_size)

    Group.rounds, Group.replicas, Group.replica = rounds, replicas, rank % replicas
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    replace(process_groups, meet=lambda timeout: Meeting(store, rank, size))
    replace(dist, init_process_group=init_process_group)
    replace(dist, PrefixStore=NamedStore, ProcessGroupGloo=Group, ProcessGroupNCCL=NcclGroup)
