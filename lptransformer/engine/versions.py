"""Two versions of a stage's weights, for gradients that are taken one update late (PipeDream-2BW, 2006.09503)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


class TwoVersions:
    """The weights of now and those of one update before, in storages of their own; the parameters show one of them.

    A forward pass that was made before an update is followed by its backward after it, at the same weights: so an
    update never writes into a storage that a forward pass may have read, and what was `now` becomes `before`.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.now = [parameter.data for parameter in self.parameters]
        self.before = [parameter.data.clone() for parameter in self.parameters]

    def show(self, before: bool) -> None:
        """Let the parameters be the weights of one update before, or those of now."""
        for parameter, data in zip(self.parameters, self.before if before else self.now, strict=True):
            parameter.data = data

    @contextlib.contextmanager
    def updating(self) -> Iterator[None]:
        """Around the optimizer's step, which works in place: it gets a copy of `now`."""
        for old, new in zip(self.now, self.before, strict=True):
            new.copy_(old)
        self.now, self.before = self.before, self.now
        self.show(before=False)
        # The passes under way saved weights of another storage: autograd need not see that a step was made.
        with torch.autograd._unsafe_preserve_version_counter(tuple(self.parameters)):
            yield

    def state(self) -> dict[str, Tensor]:
        """The weights of one update before, by number; those of now are saved with the stage."""
        return {f"before.{number}": data for number, data in enumerate(self.before)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.show(before=False)
        for number, data in enumerate(self.before):
            data.copy_(state[f"before.{number}"])
