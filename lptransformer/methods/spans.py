"""Spans and phases: which head's loss reaches which blocks, as plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Span:
    """The head after block `last` trains blocks `first..last`; its gradient stops at the input of `first`.

    With `first` = `last` + 1 it trains no block: the head learns from the hidden states and changes nothing below it.
    """

    first: int
    last: int

    def __contains__(self, block: int) -> bool:
        return self.first <= block <= self.last


@dataclass(frozen=True)
class Phase:
    """What is trained in an update: one span for every head, in order of `last`.

    A block adds up the gradients of all spans that it is in. With `own_weight` (between 0 and 1) it takes their
    weighted mean instead: the furthest head's loss with 1 - own_weight, the nearer ones share own_weight equally, and
    a single one has weight 1. A head's own weights always have the full gradient of its loss. `clip_at` are blocks at
    which another clip group begins although spans connect them with those below.
    """

    spans: tuple[Span, ...]
    own_weight: float | None = None
    clip_at: tuple[int, ...] = ()

    def weight(self, span: Span, block: int) -> float:
        """The weight of a span's loss in the gradient of a block; 0 where the block is outside the span."""
        if block not in span:
            return 0.0
        reaching = [other for other in self.spans if block in other]
        if self.own_weight is None or len(reaching) == 1:
            return 1.0
        if span == reaching[-1]:
            return 1.0 - self.own_weight
        return self.own_weight / (len(reaching) - 1)
