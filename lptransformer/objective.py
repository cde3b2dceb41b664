"""Objectives: which head's loss reaches which blocks, as plain data.

A new objective is one function here and one row in OBJECTIVES. What follows from the spans (stages, the borders that
carry a gradient, schedules) is derived in partition.py, gradients.py and schedule.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lptransformer.errors import ConfigError


@dataclass(frozen=True, order=True)
class Span:
    """The head after block `last` trains blocks `first..last`; its gradient stops at the input of `first`.

    With `first` = `last` + 1 it trains no block: the head learns from the hidden states and moves nothing below it.
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


@dataclass(frozen=True)
class Objective:
    """The usual phase; where it is hybrid, also backprop every `every`-th update and for the last `share` of them.

    With `delayed`, gradients are taken at the weights of one update before.
    """

    num_blocks: int
    usual: Phase
    backprop: Phase | None = None
    every: int | None = None
    share: float = 0.0
    delayed: bool = False

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (self.usual,) if self.backprop is None else (self.usual, self.backprop)

    @property
    def heads(self) -> tuple[int, ...]:
        """The blocks with a head behind them."""
        return tuple(sorted({span.last for phase in self.phases for span in phase.spans}))

    @property
    def trained(self) -> frozenset[int]:
        """The blocks that some span trains; the others stay as they were initialised."""
        return frozenset(b for phase in self.phases for span in phase.spans for b in range(span.first, span.last + 1))

    def phase_at(self, update: int, steps: int) -> int:
        """The number of the phase of an update (counted from 0) in a run of `steps` updates."""
        if self.backprop is None:
            return 0
        every = self.every is not None and update % self.every == self.every - 1
        return int(every or update >= steps - round(self.share * steps))


def chunked(num_blocks: int, chunks: int | Sequence[int]) -> Phase:
    """A partition of the blocks into runs that train themselves (2012.03837, section 3, "chunked local").

    `chunks` is the number of runs, made as equal as possible with the longer ones first, or the length of every run.
    """
    return Phase(tuple(Span(run.start, run.stop - 1) for run in _runs(num_blocks, chunks)))


def greedy(num_blocks: int) -> Phase:
    """Every block trains itself (2012.03837, section 3, "greedy local")."""
    return chunked(num_blocks, num_blocks)


def backprop(num_blocks: int) -> Phase:
    """One loss for all blocks: the baseline."""
    return Phase((Span(0, num_blocks - 1),))


def delayed(num_blocks: int, chunks: int | Sequence[int]) -> Phase:
    """Backprop with gradients taken at the weights of one update before: no bubble (PipeDream-2BW, 2006.09503).

    The runs clip and skip by themselves: the norm of all of them would have to be waited for.
    """
    return Phase((Span(0, num_blocks - 1),), clip_at=tuple(run.start for run in _runs(num_blocks, chunks)))


def overlapping(
    num_blocks: int, chunks: int | Sequence[int], overlap: int, own_weight: float, first_head: bool
) -> Phase:
    """Every `overlap` + 1 consecutive runs of a partition train together (2012.03837, section 3, "overlapping local").

    For runs 1 to 4 and overlap 1: {1,2}, {2,3}, {3,4}; with `first_head` also {1}, and what lies between for a greater
    overlap. `own_weight` 0 takes the furthest loss alone (2010.04116), 0.5 at overlap 1 the mean of the paper's
    duplicates. With overlap 0 it is chunked.
    """
    runs = _runs(num_blocks, chunks)
    if overlap >= len(runs):
        raise ConfigError(
            f"objective.overlap is {overlap}: with {len(runs)} runs of blocks (objective.chunks) it can be 0 to "
            f"{len(runs) - 1}"
        )
    last_runs = range(0 if first_head else overlap, len(runs))
    spans = tuple(Span(runs[max(0, number - overlap)].start, runs[number].stop - 1) for number in last_runs)
    return Phase(spans, own_weight if overlap > 0 else None)


def last(num_blocks: int, trained_blocks: int) -> Phase:
    """The last blocks alone are trained; what is below stays as initialised (2012.03837, section 4, baselines)."""
    if trained_blocks > num_blocks:
        raise ConfigError(f"objective.trained_blocks is {trained_blocks}: a model of {num_blocks} blocks has fewer")
    return Phase((Span(num_blocks - trained_blocks, num_blocks - 1),))


def deep_supervision(num_blocks: int, chunks: int | Sequence[int]) -> Phase:
    """A head behind every run, and every loss reaches down to the first block; the losses are added up.

    As in early-exit training (LayerSkip, 2404.16710), with equal weights. The loss is global.
    """
    return Phase(tuple(Span(0, run.stop - 1) for run in _runs(num_blocks, chunks)))


def _runs(num_blocks: int, chunks: int | Sequence[int]) -> list[range]:
    if isinstance(chunks, int):
        if not 1 <= chunks <= num_blocks:
            raise ConfigError(f"objective.chunks is {chunks}: a model of {num_blocks} blocks takes 1 to {num_blocks}")
        sizes = [num_blocks // chunks + (i < num_blocks % chunks) for i in range(chunks)]
    else:
        sizes = list(chunks)
        if min(sizes, default=0) < 1 or sum(sizes) != num_blocks:
            raise ConfigError(
                f"objective.chunks is {sizes}: the lengths must be 1 or more and add up to {num_blocks} blocks"
            )
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


OBJECTIVES: dict[str, Callable[..., Phase]] = {
    "backprop": backprop,
    "chunked": chunked,
    "greedy": greedy,
    "overlapping": overlapping,
    "last": last,
    "deep_supervision": deep_supervision,
    "delayed": delayed,
}
# What each of them is told by the configuration, beside the number of blocks.
OPTIONS: dict[str, tuple[str, ...]] = {
    "chunked": ("chunks",),
    "overlapping": ("chunks", "overlap", "own_weight", "first_head"),
    "last": ("trained_blocks",),
    "deep_supervision": ("chunks",),
    "delayed": ("chunks",),
}


def build(
    num_blocks: int, name: str, backprop_every: int | None = None, backprop_share: float = 0.0, **options: Any
) -> Objective:
    """The objective `name`; hybrid when `backprop_every` or `backprop_share` asks for global updates in between.

    In those, auxiliary heads go on learning and train no block (Sun et al., 2009.01462, alternate likewise). Of
    `options` those that the objective takes are used. Raises ConfigError where they do not fit the number of blocks.
    """
    usual = OBJECTIVES[name](num_blocks, **{key: options[key] for key in OPTIONS.get(name, ())})
    objective = Objective(num_blocks, usual, delayed=name == "delayed")
    if backprop_every == 1 or backprop_share == 1.0:
        return replace(objective, usual=backprop(num_blocks))
    if backprop_every is None and backprop_share == 0.0:
        return objective
    whole = Span(0, num_blocks - 1)
    spans = tuple(whole if span.last == whole.last else Span(span.last + 1, span.last) for span in usual.spans)
    return replace(objective, backprop=Phase(spans), every=backprop_every, share=backprop_share)
