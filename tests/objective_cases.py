"""Objectives and placements for tests over all of them, and what the definitions say of a phase, block by block."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

from lptransformer.methods.cost import ModelCosts
from lptransformer.methods.objectives import METHODS, Objective, build
from lptransformer.methods.spans import Phase, Span
from lptransformer.methods.stages import StagePlan, cut

COSTS = ModelCosts(block_flops=3.0, head_flops=5.0, auxiliary_flops=4.0)
OWN_WEIGHTS = (0.0, 0.3, 0.5, 1.0)
WITH_GLOBAL_UPDATES = ("chunked", "greedy", "overlapping", "deep_supervision")  # what can be hybrid

# A gradient of hidden states or of weights: by the head's block, how much of its loss's gradient is in it.
Gradient = dict[int, float]


# ---------------------------------------------------------------------------------------------- the definitions


def wanted_of_block(phase: Phase, block: int) -> Gradient:
    """What a block's weights are to get: the sum over the heads that reach it, or their weighted mean.

    Of the heads in the mean the furthest counts 1 - own_weight and the nearer ones share own_weight; one alone is 1.
    """
    heads = sorted(span.last for span in phase.spans if span.first <= block <= span.last)
    if phase.own_weight is None or len(heads) < 2:
        return dict.fromkeys(heads, 1.0)
    shares = [phase.own_weight / (len(heads) - 1)] * (len(heads) - 1) + [1.0 - phase.own_weight]
    return {head: share for head, share in zip(heads, shares, strict=True) if share > 0}


def wanted_at_border(phase: Phase, block: int) -> list[Gradient]:
    """The gradients that have to come down from `block` to the one below, as few as can be, sorted by their heads.

    A loss comes down where some block below takes it. In a sum, losses that stop at the same place travel as one; in a
    weighted mean blocks take them in different shares, so that each travels alone.
    """
    taken = {head for below in range(block) for head in wanted_of_block(phase, below) if head >= block}
    if phase.own_weight is not None:
        return [{head: 1.0} for head in sorted(taken)]
    together: dict[int, Gradient] = {}
    for span in phase.spans:
        if span.last in taken:
            together.setdefault(span.first, {})[span.last] = 1.0
    return sorted(together.values(), key=sorted)


# ------------------------------------------------------------------------------------------------ the objectives


def compositions(total: int, parts: int) -> list[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` numbers, each 1 or more, in order."""
    cuts = itertools.combinations(range(1, total), parts - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *c, total))) for c in cuts]


def all_compositions(total: int) -> list[tuple[int, ...]]:
    return [sizes for parts in range(1, total + 1) for sizes in compositions(total, parts)]


def every_objective(num_blocks: int) -> Iterator[Objective]:
    """All objectives of the method over this many blocks, hybrid ones too."""
    for name, options in _every_option(num_blocks):
        yield build(num_blocks, name, **options)
        if name in WITH_GLOBAL_UPDATES:
            yield build(num_blocks, name, backprop_every=2, **options)


def _every_option(num_blocks: int) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "backprop", {}
    yield "greedy", {}
    for trained_blocks in range(1, num_blocks + 1):
        yield "last", {"trained_blocks": trained_blocks}
    for chunks in all_compositions(num_blocks):
        for name in ("chunked", "deep_supervision", "delayed"):
            yield name, {"chunks": chunks}
        for overlap, own_weight, first_head in itertools.product(range(len(chunks)), OWN_WEIGHTS, (False, True)):
            options = {"overlap": overlap, "own_weight": own_weight, "first_head": first_head}
            yield "overlapping", {"chunks": chunks, **options}


def every_placement(objective: Objective) -> Iterator[list[StagePlan]]:
    """Its stages on all numbers of pipeline ranks, cut everywhere."""
    for sizes in all_compositions(objective.num_blocks):
        yield cut(objective, len(sizes), COSTS, sizes)


@st.composite
def sizes_of(draw: st.DrawFn, total: int, most_parts: int) -> list[int]:
    """A composition of `total` into at most `most_parts` parts."""
    parts = draw(st.integers(1, min(total, most_parts)))
    places = st.integers(1, max(total - 1, 1))
    cuts = draw(st.lists(places, min_size=parts - 1, max_size=parts - 1, unique=True))
    return [b - a for a, b in itertools.pairwise((0, *sorted(cuts), total))]


@st.composite
def objectives(draw: st.DrawFn, most_blocks: int = 10, names: tuple[str, ...] = tuple(METHODS)) -> Objective:
    """Any objective, hybrid ones too."""
    num_blocks = draw(st.integers(1, most_blocks))
    name = draw(st.sampled_from(names))
    chunks = draw(st.integers(1, num_blocks) | sizes_of(num_blocks, num_blocks))
    runs = chunks if isinstance(chunks, int) else len(chunks)
    options: dict[str, Any] = {
        "chunks": chunks,
        "overlap": draw(st.integers(0, min(3, runs - 1))),
        "own_weight": draw(st.sampled_from(OWN_WEIGHTS)),
        "first_head": draw(st.booleans()),
        "trained_blocks": draw(st.integers(1, num_blocks)),
    }
    if name in WITH_GLOBAL_UPDATES:
        options["backprop_every"] = draw(st.sampled_from([None, None, 1, 2, 3]))
        options["backprop_share"] = draw(st.sampled_from([0.0, 0.0, 0.1, 0.5, 1.0]))
    return build(num_blocks, name, **options)


@st.composite
def any_spans(draw: st.DrawFn, most_blocks: int = 8) -> Objective:
    """Spans as no objective has them yet: heads anywhere, each loss as far down as it likes, a sum or a mean."""
    num_blocks = draw(st.integers(1, most_blocks))
    heads = {num_blocks - 1, *draw(st.sets(st.integers(0, num_blocks - 1)))}
    spans = tuple(Span(draw(st.integers(0, last)), last) for last in sorted(heads))
    return Objective(num_blocks, Phase(spans, draw(st.sampled_from([None, *OWN_WEIGHTS]))))


@st.composite
def placements(draw: st.DrawFn, objectives_: st.SearchStrategy[Objective]) -> tuple[Objective, list[StagePlan]]:
    """An objective and its stages on up to 5 pipeline ranks, balanced or cut anywhere."""
    objective = draw(objectives_)
    sizes = draw(sizes_of(objective.num_blocks, 5))
    return objective, cut(objective, len(sizes), COSTS, "balanced" if draw(st.booleans()) else sizes)
