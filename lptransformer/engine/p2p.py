"""Channels: hidden states (or gradients) from one pipeline rank to the next, with the control that travels in band.

A message is a header of eight int64 and one tensor, of fixed size. Over gloo both are one flat buffer in the host's
memory (pinned, beside a GPU); over NCCL the tensor travels from device to device, and the header through the host. A
sender keeps one message of its own on the way, and that message leaves when the receiver has posted its receive; the
receiver posts up to `in_flight` ahead. That bounds how far a pipeline rank can run ahead: `in_flight` + 1 messages.

Over gloo a posted receive holds up nothing, so there are always `in_flight`. Over NCCL it is work on the device:
whatever waits for the device (a synchronisation, memory that is freed) waits for it, and the operations of a device may
run one after another. So there a receive is posted only when its message will come even if this process sends nothing
more: hidden states by what the pipeline rank below does (`Receiver.expect`), up to the end of an update or of the one
after it, and gradients, which follow from what this process sends, when their turn has come. So are the messages of an
evaluation.
"""

from __future__ import annotations

import contextlib
import enum
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lptransformer.engine.process_groups import World
from lptransformer.engine.transfers import Event, HelperThread, Later, SideStream
from lptransformer.errors import LostProcessError
from lptransformer.methods.schedule import RECV_B, SEND_F, Action
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


class Message(NamedTuple):
    """The memory of a message: header int64 [8] and payload uint8 on their own, and what holds both over gloo."""

    header: Tensor
    payload: Tensor
    flat: Tensor | None


@dataclass(frozen=True)
class Frame:
    """Shape, dtype and device of the tensor in every message, the backend that carries it, and how it is encoded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    backend: str = "gloo"
    codec: BorderCodec = AsTheyAre()

    def message(self) -> Message:
        num_bytes = len(self.codec.encode(torch.zeros(self.shape, dtype=self.dtype)))
        if self.backend == "nccl":
            payload = torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)
            return Message(torch.zeros(HEADER_INTS, dtype=torch.int64), payload, None)
        pinned = self.device.type == "cuda"
        flat = torch.zeros(HEADER_BYTES + num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return Message(flat[:HEADER_BYTES].view(torch.int64), flat[HEADER_BYTES:], flat)

    def encode(self, tensor: Tensor) -> Tensor:
        assert (tuple(tensor.shape), tensor.dtype) == (self.shape, self.dtype), f"{tensor.shape} {tensor.dtype}: {self}"
        return self.codec.encode(tensor)

    def decode(self, payload: Tensor) -> Tensor:
        """The tensor of a message, in memory of its own."""
        own = payload.to(self.device, non_blocking=True, copy=True)
        return self.codec.decode(own, self.shape, self.dtype)


class Waitable(Protocol):
    def wait(self) -> Any: ...


class Posted:
    """A receive that the helper thread posts."""

    def __init__(self, work: Later) -> None:
        self._work = work

    def wait(self) -> None:
        self._work.wait().wait()


class Link:
    """One direction of a border, for one replica: what carries its messages, and what waits for a GPU there."""

    def __init__(self, world: World, name: str, rank: int, frame: Frame, says: str) -> None:
        self.clock = world.clock
        self.frame, self.peer, self.name = frame, 1 - rank, f"{says} {name.split('/')[1]}"
        self.group = world.group(name, rank, 2, frame.backend)
        self.headers = self.group
        if frame.backend == "nccl":
            self.headers = world.group(f"{name}/headers", rank, 2)
            # The first message would make the communicator otherwise, and wait for the peer to come so far.
            self.group.eager_connect_single_device(frame.device)
        self.side = SideStream(frame.device)
        beside = frame.backend == "gloo" and frame.device.type == "cuda"
        self.thread = HelperThread() if beside else None

    def send(self, message: Message) -> list[Waitable]:
        """Begin to send what is queued on the side stream."""
        if message.flat is None:
            with self.side:
                payload = self.group.send([message.payload], self.peer, 0)
            return [self.headers.send([message.header], self.peer, 0), payload]
        buffers, written = [message.flat], self.side.event()
        if self.thread is None:
            return [self.group.send(buffers, self.peer, 0)]

        def begin() -> None:
            written.wait()
            self.group.send(buffers, self.peer, 0).wait()

        return [self.thread.begin(begin)]

    def receive(self, message: Message, read: Event) -> list[Waitable]:
        """Post a receive into memory whose last message has been `read`."""
        if message.flat is None:
            with self.side:
                payload = self.group.recv([message.payload], self.peer, 0)
            return [self.headers.recv([message.header], self.peer, 0), payload]
        buffers = [message.flat]
        if self.thread is None:
            return [self.group.recv(buffers, self.peer, 0)]

        def post() -> Any:
            read.wait()
            return self.group.recv(buffers, self.peer, 0)

        return [Posted(self.thread.begin(post))]


class Sender:
    """The sending end of one direction of a border, for one replica."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.message = link.frame.message()
        self.under_way: list[Waitable] = []

    def send(self, header: Header, tensor: Tensor) -> None:
        """Start sending; returns once the message before this one has left."""
        self.flush()
        ints = [header.kind, header.update, header.micro_batch, header.control, header.digest]
        self.message.header.copy_(torch.tensor(ints + [0] * (HEADER_INTS - len(ints))))
        encoded = self.link.frame.encode(tensor)
        with self.link.side:
            self.link.side.copy(self.message.payload, encoded)
        with translate_broken_channel(self.link.name):
            self.under_way = self.link.send(self.message)

    def flush(self) -> None:
        """Wait until the message on the way has left; the wait counts as idle time."""
        if self.under_way:
            with self.link.clock.waiting(), translate_broken_channel(self.link.name), self.link.side:
                for work in self.under_way:
                    work.wait()
            self.under_way = []


class Receiver:
    """The receiving end of one direction of a border, for one replica.

    `in_flight` receives are posted at all times; over NCCL at most so many, of messages that are expected.
    """

    def __init__(self, link: Link, in_flight: int) -> None:
        self.link, self._always = link, link.frame.backend == "gloo"
        self.free = deque((link.frame.message(), Event()) for _ in range(in_flight))
        self.posted: deque[tuple[Message, list[Waitable]]] = deque()
        self._coming: deque[int] = deque()  # of every message that is expected: the answers that its sender takes first
        self._taken = self._answered = 0
        self._post_ahead()

    def expect(self, actions: Iterable[Action]) -> None:
        """What the pipeline rank below does next: messages for this one, and answers (gradients) that it takes."""
        for action in actions:
            if action.op == RECV_B:
                self._taken += 1
            elif action.op == SEND_F:
                self._coming.append(self._taken)
        self._post_ahead()

    def answered(self) -> None:
        """This process has sent a gradient to the one below."""
        self._answered += 1
        self._post_ahead()

    def _post_ahead(self) -> None:
        while self.free and (self._always or (self._coming and self._coming[0] <= self._answered)):
            self._post()

    def _post(self) -> None:
        if self._coming:
            self._coming.popleft()
        message, read = self.free.popleft()
        with translate_broken_channel(self.link.name):
            self.posted.append((message, self.link.receive(message, read)))

    def receive(self) -> tuple[Header, Tensor]:
        """The next message, in the order of sending; the wait counts as idle time."""
        if not self.posted:
            self._post()
        message, works = self.posted.popleft()
        with self.link.clock.waiting(), translate_broken_channel(self.link.name):
            for work in works:  # of NCCL this queues what follows behind it
                work.wait()
        kind, update, micro_batch, control, digest, *_ = message.header.tolist()
        tensor = self.link.frame.decode(message.payload)
        self.free.append((message, Event.now(self.link.frame.device)))
        self._post_ahead()
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
        hidden = replace(frame, codec=codec_below)
        neighbours.below = Receiver(Link(world, f"hidden/{border}", 1, hidden, "of hidden states"), in_flight)
        for flow in range(gradients_below):
            link = Link(world, f"gradient/{border}/{flow}", 1, frame, "of gradients")
            neighbours.gradients_below.append(Sender(link))
    if rank < world.pipeline_size - 1:
        border = f"{rank}-{rank + 1}"
        hidden = replace(frame, codec=codec_above)
        neighbours.above = Sender(Link(world, f"hidden/{border}", 0, hidden, "of hidden states"))
        for flow in range(gradients_above):
            link = Link(world, f"gradient/{border}/{flow}", 0, frame, "of gradients")
            neighbours.gradients_above.append(Receiver(link, in_flight))
    return neighbours
