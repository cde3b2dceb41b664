"""Channels: hidden states (or gradients) from one pipeline rank to the next, with the control that travels in band.

A message is one flat buffer of fixed size: a header of eight int64, then the tensor. The receiver posts `in_flight`
receives ahead and posts one again as soon as it has taken a message; a sender keeps one message of its own on the way.
That bounds how far a pipeline rank can run ahead: `in_flight` + 1 messages. A gloo send finishes only when the
receiver has posted, so this is all the flow control there is.
"""

from __future__ import annotations

import contextlib
import enum
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from lptransformer.engine.process_groups import World
from lptransformer.errors import LostProcessError
from lptransformer.models.border_codec import AsTheyAre, BorderCodec

HEADER_INTS = 8
HEADER_BYTES = HEADER_INTS * 8


class Kind(enum.IntEnum):
    """What a message belongs to."""

    TRAIN = 0
    EVALUATE = 1
    GRADIENT = 2


class Control(enum.IntFlag):
    """What follows the update: decided by pipeline rank 0, carried by the header of the update's last micro-batch."""

    NOTHING = 0
    EVALUATE = 1
    SAVE = 2
    STOP = 4


@dataclass(frozen=True)
class Header:
    kind: Kind
    update: int
    micro_batch: int
    control: Control = Control.NOTHING
    digest: int = 0  # of the micro-batch's rows (data/token_set.Batch.digest), 0 where none is told


@dataclass(frozen=True)
class Frame:
    """Shape, dtype and device of the tensor in every message, the backend that carries it, and how it is encoded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    backend: str = "gloo"
    codec: BorderCodec = AsTheyAre()

    def buffer(self) -> Tensor:
        """One message. gloo moves host memory (pinned, beside a GPU); NCCL moves device memory."""
        num_bytes = HEADER_BYTES + len(self.codec.encode(torch.zeros(self.shape, dtype=self.dtype)))
        if self.backend == "nccl":
            return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
        return torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def write(self, buffer: Tensor, tensor: Tensor) -> None:
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), f"{tensor.shape} {tensor.dtype}: {self}"
        buffer[HEADER_BYTES:].copy_(self.codec.encode(tensor))

    def read(self, buffer: Tensor) -> Tensor:
        """The tensor of a message, in memory of its own."""
        payload = buffer[HEADER_BYTES:].to(self.device, copy=True)
        return self.codec.decode(payload, self.shape, self.dtype)

    def stream(self) -> torch.cuda.Stream | None:
        """NCCL: one stream per direction, so that a transfer never waits for the compute of the other direction."""
        return torch.cuda.Stream(self.device) if self.backend == "nccl" else None


class Sender:
    """The sending end of one direction of a border, for one replica."""

    def __init__(self, group: dist.ProcessGroup, peer: int, frame: Frame, name: str) -> None:
        self.group, self.peer, self.frame, self.name = group, peer, frame, name
        self.buffer = frame.buffer()
        self.work: dist.Work | None = None
        self.stream = frame.stream()
        self.waited_seconds = 0.0

    def send(self, header: Header, tensor: Tensor) -> None:
        """Start sending; returns once the message before this one has left."""
        self.flush()
        ints = [header.kind, header.update, header.micro_batch, header.control, header.digest]
        padded = torch.tensor(ints + [0] * (HEADER_INTS - len(ints)))
        self.buffer[:HEADER_BYTES].view(torch.int64).copy_(padded)
        self.frame.write(self.buffer, tensor)
        with torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext():
            if self.stream:
                self.stream.wait_stream(torch.cuda.current_stream(self.frame.device))
            with translate_broken_channel(self.name):
                self.work = self.group.send([self.buffer], self.peer, 0)

    def flush(self) -> None:
        """Wait until the message on the way has left; the wait counts as idle time."""
        if self.work is not None:
            started = time.perf_counter()
            with translate_broken_channel(self.name):
                self.work.wait()
            if self.stream:
                torch.cuda.current_stream(self.frame.device).synchronize()
            self.waited_seconds += time.perf_counter() - started
            self.work = None


class Receiver:
    """The receiving end of one direction of a border, for one replica."""

    def __init__(self, group: dist.ProcessGroup, peer: int, frame: Frame, in_flight: int, name: str) -> None:
        self.group, self.peer, self.frame, self.name = group, peer, frame, name
        self.stream = frame.stream()
        self.posted: deque[tuple[Tensor, dist.Work]] = deque()
        self.waited_seconds = 0.0
        for _ in range(in_flight):
            self._post(frame.buffer())

    def _post(self, buffer: Tensor) -> None:
        on_stream = torch.cuda.stream(self.stream) if self.stream else contextlib.nullcontext()
        if self.stream:  # the copy out of this buffer is queued on the current stream
            self.stream.wait_stream(torch.cuda.current_stream(self.frame.device))
        with translate_broken_channel(self.name), on_stream:
            self.posted.append((buffer, self.group.recv([buffer], self.peer, 0)))

    def receive(self) -> tuple[Header, Tensor]:
        """The next message, in the order of sending; the wait counts as idle time."""
        buffer, work = self.posted.popleft()
        started = time.perf_counter()
        with translate_broken_channel(self.name):
            work.wait()
        if self.stream:  # wait() has only ordered the current stream behind the transfer
            torch.cuda.current_stream(self.frame.device).synchronize()
        self.waited_seconds += time.perf_counter() - started
        kind, update, micro_batch, control, digest, *_ = buffer[:HEADER_BYTES].cpu().view(torch.int64).tolist()
        tensor = self.frame.read(buffer)
        self._post(buffer)
        return Header(Kind(kind), update, micro_batch, Control(control), digest), tensor


@contextlib.contextmanager
def translate_broken_channel(name: str) -> Iterator[None]:
    """Turns the errors of a peer that has gone into a TrainingError; they come from posting and from waiting alike."""
    try:
        yield
    except RuntimeError as error:
        raise LostProcessError(f"the channel {name} broke: {str(error).splitlines()[0]}") from error


@dataclass
class Neighbours:
    """The channels of one process: hidden states upwards, and gradients downwards, one for each flow at once."""

    below: Receiver | None = None
    above: Sender | None = None
    gradients_below: list[Sender] = field(default_factory=list)
    gradients_above: list[Receiver] = field(default_factory=list)

    @property
    def waited_seconds(self) -> float:
        channels = (self.below, self.above, *self.gradients_below, *self.gradients_above)
        return sum((channel.waited_seconds for channel in channels if channel is not None), 0.0)

    def flush(self) -> None:
        for channel in (self.above, *self.gradients_below):
            if channel is not None:
                channel.flush()


def open_channels(
    world: World,
    frame: Frame,
    in_flight: int,
    *,
    codec_below: BorderCodec,
    codec_above: BorderCodec,
    gradients_below: int,
    gradients_above: int,
) -> Neighbours:
    """Connect this process to the same replica of the pipeline ranks below and above.

    How hidden states are encoded at the two borders, and how many flows of gradients cross them at once. Borders are
    opened in ascending order on every rank, so that the groups of two neighbours meet.
    """
    neighbours, rank = Neighbours(), world.pipeline_rank
    if rank > 0:
        border = f"{rank - 1}-{rank}"
        group = world.group(f"hidden/{border}", 1, 2, frame.backend)
        hidden = replace(frame, codec=codec_below)
        neighbours.below = Receiver(group, 0, hidden, in_flight, f"of hidden states {border}")
        for flow in range(gradients_below):
            group = world.group(f"gradient/{border}/{flow}", 1, 2, frame.backend)
            neighbours.gradients_below.append(Sender(group, 0, frame, f"of gradients {border}"))
    if rank < world.pipeline_size - 1:
        border = f"{rank}-{rank + 1}"
        group = world.group(f"hidden/{border}", 0, 2, frame.backend)
        neighbours.above = Sender(group, 1, replace(frame, codec=codec_above), f"of hidden states {border}")
        for flow in range(gradients_above):
            group = world.group(f"gradient/{border}/{flow}", 0, 2, frame.backend)
            neighbours.gradients_above.append(Receiver(group, 1, frame, in_flight, f"of gradients {border}"))
    return neighbours
