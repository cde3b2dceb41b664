"""Between host and device without waiting: a thread for what has to wait for a GPU, so that the main thread need not,
copies on a stream beside the computation, the micro-batches of an update, and a clock that knows when a GPU got there.

On a CPU all of it is immediate.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from lptransformer.data.token_set import Batch

T = TypeVar("T")


class Later(Generic[T]):
    """What a call of the thread gives, or raises, when it is done."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._done = call, threading.Event()
        self._result: T
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._done.set()

    def wait(self) -> T:
        """Raises what the call has raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class HelperThread:
    """Makes calls one after another, in the order in which they were given. A daemon: the process ends without it."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Later] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def begin(self, call: Callable[[], T]) -> Later[T]:
        later = Later(call)
        self._calls.put(later)
        return later

    def _work(self) -> None:
        while True:
            self._calls.get().run()


class SideStream:
    """A stream of a GPU beside that of the computation; on a CPU nothing is put off."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        """What follows is queued behind all that the computation has been given so far, and holds up nothing of it."""
        self._inside = contextlib.ExitStack()
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            self._inside.enter_context(torch.cuda.stream(self.stream))

    def __exit__(self, *error: object) -> None:
        self._inside.close()

    def event(self) -> Event:
        """What is done when all that is queued here is done."""
        return Event(None if self.stream is None else self.stream.record_event())

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy, inside of this. `source` may be freed before it is made."""
        target.copy_(source, non_blocking=True)
        if self.stream is not None and source.is_cuda:
            source.record_stream(self.stream)


class Event:
    """A point in the work of a GPU. On a CPU it has always come."""

    def __init__(self, event: torch.cuda.Event | None = None) -> None:
        self._event = event

    @classmethod
    def now(cls, device: torch.device) -> Event:
        """The computation as it is queued so far."""
        return cls(torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None)

    def wait(self) -> None:
        """The host waits: for a helper thread."""
        if self._event is not None:
            self._event.synchronize()

    def precede(self, device: torch.device) -> None:
        """What the computation is given from here on waits, and the host does not."""
        if self._event is not None:
            torch.cuda.current_stream(device).wait_event(self._event)


class Clock:
    """What happens when in an update, and how long the computation of this process waits for others in it.

    A moment is a time of perf_counter.
    """

    def __init__(self) -> None:
        self.waited_seconds = 0.0  # in all updates, as far as it is known
        self.waits: list[tuple[Any, Any]] = []  # from and to which moment; those that are not counted yet
        self._in_update = False

    def now(self) -> Any:
        """A moment: this one."""
        return time.perf_counter()

    def has_come(self, moment: Any) -> bool:
        return True

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two moments that have come."""
        return end - begin

    def settle(self) -> Callable[[Any], float]:
        """Let all moments come; what gives their times of perf_counter."""
        return lambda moment: moment

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around a wait for another process: in an update it counts as idle time."""
        if not self._in_update:
            yield
            return
        begin = self.now()
        yield
        self.waits.append((begin, self.now()))

    def begin(self) -> None:
        """An update begins."""
        self._in_update = True

    def end(self) -> float:
        """An update ends: the seconds that it has waited, with those of the one before that were not known then."""
        self._in_update = False
        known = list(takewhile(lambda wait: self.has_come(wait[1]), self.waits))
        del self.waits[: len(known)]
        waited = sum((self.seconds(*wait) for wait in known), 0.0)
        self.waited_seconds += waited
        return waited


class EventClock(Clock):
    """Of a GPU: a moment is an event on the stream of the computation, which comes when all before it is done.

    So a wait of the host counts only as far as the computation had nothing left to do. Nobody waits for an event but
    `settle`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device

    def now(self) -> Any:
        return torch.cuda.current_stream(self._device).record_event(torch.cuda.Event(enable_timing=True))

    def has_come(self, moment: Any) -> bool:
        return moment.query()

    def seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1e3

    def settle(self) -> Callable[[Any], float]:
        last = self.now()
        last.synchronize()
        came = time.perf_counter()
        return lambda moment: came - self.seconds(moment, last)


def clock_of(device: torch.device) -> Clock:
    return EventClock(device) if device.type == "cuda" else Clock()


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; on a GPU the host does not wait for that."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class Batches:
    """Micro-batches by their number since the start of the run, over all replicas: each is brought to the device once,
    for all stages of the process. On a GPU a thread has the next one ready."""

    def __init__(self, load: Callable[[int], Batch], device: torch.device) -> None:
        self._load, self._device = load, device
        self._here: dict[int, tuple[Batch, Batch]] = {}  # on the host, on the device
        self._thread = HelperThread() if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: dict[int, Later[tuple[Batch, Batch, Event]]] = {}

    def get(self, number: int, following: int | None) -> Batch:
        """A micro-batch on the device; `following` is the one that will be wanted next (None: none)."""
        if number not in self._here:
            if self._thread is None:
                batch = self._load(number)
                self._here[number] = batch, batch.to(self._device)
            else:
                later = self._coming.pop(number, None) or self._thread.begin(lambda: self._bring(number))
                batch, there, arrived = later.wait()
                arrived.precede(self._device)
                for tensor in there.tensors:  # made on another stream than it is used on
                    tensor.record_stream(torch.cuda.current_stream(self._device))
                self._here[number] = batch, there
                if following is not None and following not in self._coming:
                    self._coming[following] = self._thread.begin(lambda: self._bring(following))
        return self._here[number][1]

    def on_host(self, number: int) -> Batch:
        """One that `get` has given."""
        return self._here[number][0]

    def forget(self, before: int) -> None:
        """Those below a number are not wanted any more."""
        self._here = {number: batches for number, batches in self._here.items() if number >= before}

    def _bring(self, number: int) -> tuple[Batch, Batch, Event]:
        batch = self._load(number)
        with torch.cuda.stream(self._stream):
            there = batch.to(self._device)
            return batch, there, Event.now(self._device)
