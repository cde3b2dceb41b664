"""Objectives: from the number of blocks to the spans of every phase.

A new objective is one row in METHODS, here or by `register` from anywhere: the function that gives its spans, the class
of its options, its label and its flags. What follows from those (stages, the borders that carry a gradient, schedules,
the ZeRO stages that work) is derived, never from the name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from lptransformer.errors import OptionError
from lptransformer.methods.spans import Phase, Span
from lptransformer.section import Count, MaybeCount, Section, Share, Whole


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

    @property
    def is_backprop(self) -> bool:
        """Whether every update is one of backprop, at the current weights."""
        return self.phases == (backprop(self.num_blocks),) and not self.delayed

    def phase_at(self, update: int, steps: int) -> int:
        """The number of the phase of an update (counted from 0) in a run of `steps` updates."""
        if self.backprop is None:
            return 0
        every = self.every is not None and update % self.every == self.every - 1
        return int(every or update >= steps - round(self.share * steps))


# ---------------------------------------------------------------------------------------------------- options

Chunks = Annotated[Count | list[Count], "a whole number or a list of block counts, each 1 or more"]


class ObjectiveOptions(Section):
    """What every objective has. The classes below add keys; their bases are in the order that keys are printed in."""

    name: str = Field(
        default="chunked",
        description="backprop, chunked, greedy, overlapping, last, deep_supervision or delayed: what a loss trains",
    )


class HybridOptions(ObjectiveOptions):
    """Of objectives that may alternate with backprop."""

    backprop_every: MaybeCount = Field(default=None, description="hybrid: updates from one global update to the next")
    backprop_share: Share = Field(default=0.0, description="hybrid: share of the updates, the last, that are global")


class RunsOptions(ObjectiveOptions):
    chunks: Chunks = Field(
        default=2, description="runs of blocks, mostly with a head behind each: how many, or the length of each"
    )


class OverlapOptions(RunsOptions):
    overlap: Whole = Field(default=1, description="overlapping: runs below its own that a head's loss trains too")
    own_weight: Share = Field(
        default=0.5, description="overlapping: weight of the nearer losses of a block (0: the furthest alone)"
    )
    first_head: bool = Field(default=False, description="overlapping: a head behind the first run too")


class ChunkedOptions(HybridOptions, RunsOptions):
    pass


class OverlappingOptions(HybridOptions, OverlapOptions):
    pass


class LastOptions(ObjectiveOptions):
    trained_blocks: Count = Field(default=1, description="last: blocks that are trained, counted from the last one")


# ---------------------------------------------------------------------------------------------------- phases


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
        problem = f"with {len(runs)} runs of blocks (objective.chunks) it can be 0 to {len(runs) - 1}"
        raise OptionError("objective.overlap", overlap, problem, beside=("objective.chunks",))
    last_runs = range(0 if first_head else overlap, len(runs))
    spans = tuple(Span(runs[max(0, number - overlap)].start, runs[number].stop - 1) for number in last_runs)
    return Phase(spans, own_weight if overlap > 0 else None)


def last(num_blocks: int, trained_blocks: int) -> Phase:
    """The last blocks alone are trained; what is below stays as initialised (2012.03837, section 4, baselines)."""
    if trained_blocks > num_blocks:
        raise OptionError("objective.trained_blocks", trained_blocks, f"a model of {num_blocks} blocks has fewer")
    return Phase((Span(num_blocks - trained_blocks, num_blocks - 1),))


def deep_supervision(num_blocks: int, chunks: int | Sequence[int]) -> Phase:
    """A head behind every run, and every loss reaches down to the first block; the losses are added up.

    As in early-exit training (LayerSkip, 2404.16710), with equal weights. The loss is global.
    """
    return Phase(tuple(Span(0, run.stop - 1) for run in _runs(num_blocks, chunks)))


def _runs(num_blocks: int, chunks: int | Sequence[int]) -> list[range]:
    if isinstance(chunks, int):
        if not 1 <= chunks <= num_blocks:
            raise OptionError("objective.chunks", chunks, f"a model of {num_blocks} blocks takes 1 to {num_blocks}")
        sizes = [num_blocks // chunks + (i < num_blocks % chunks) for i in range(chunks)]
    else:
        sizes = list(chunks)
        if min(sizes, default=0) < 1 or sum(sizes) != num_blocks:
            problem = f"that is {sum(sizes)} blocks in all; the lengths must be 1 or more and add up to {num_blocks}"
            raise OptionError("objective.chunks", sizes, problem)
    return [range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]


# ---------------------------------------------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Method:
    """A row: from the number of blocks and the options (by name) to the usual phase; the class of the options.

    `label` is the method in tables and pictures. `delayed`: see Objective.
    """

    phase: Callable[..., Phase]
    options: type[ObjectiveOptions]
    label: str
    delayed: bool = False


METHODS: dict[str, Method] = {
    "backprop": Method(backprop, ObjectiveOptions, "backprop"),
    "chunked": Method(chunked, ChunkedOptions, "chunked"),
    "greedy": Method(greedy, HybridOptions, "greedy"),
    "overlapping": Method(overlapping, OverlappingOptions, "overlapping"),
    "last": Method(last, LastOptions, "last blocks"),
    "deep_supervision": Method(deep_supervision, ChunkedOptions, "deep supervision"),
    "delayed": Method(delayed, RunsOptions, "delayed", delayed=True),
}


def register(name: str, method: Method) -> None:
    """A method from outside, known from here on in this process under `objective.name`."""
    assert name not in METHODS, f"there is a method {name} already"
    METHODS[name] = method


def build(num_blocks: int, name: str, **options: Any) -> Objective:
    """The objective `name`; hybrid when `backprop_every` or `backprop_share` asks for global updates in between.

    In those, auxiliary heads go on learning and train no block (Sun et al., 2009.01462, alternate likewise). Of
    `options` those that the objective takes are used, the others have their defaults. Raises OptionError where they do
    not fit the number of blocks.
    """
    method = METHODS[name]
    fields = method.options.model_fields
    values = {key: options.get(key, field.default) for key, field in fields.items() if key != "name"}
    every, share = values.pop("backprop_every", None), values.pop("backprop_share", 0.0)
    objective = Objective(num_blocks, method.phase(num_blocks, **values), delayed=method.delayed)
    if every == 1 or share == 1.0:
        return replace(objective, usual=backprop(num_blocks))
    if every is None and share == 0.0:
        return objective
    whole = Span(0, num_blocks - 1)
    spans = tuple(
        whole if span.last == whole.last else Span(span.last + 1, span.last) for span in objective.usual.spans
    )
    return replace(objective, backprop=Phase(spans), every=every, share=share)
