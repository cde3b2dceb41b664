"""The micro-batches of an update on the device: each is brought there once, for all stages of a process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lptransformer.data.token_set import Batch
from lptransformer.engine.helper_thread import Event, HelperThread, Later


class Batches:
    """By their number since the start of the run, over all replicas. On a GPU a thread has the next one ready."""

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
