"""Objectives: which head's loss reaches which blocks, as plain data.

A new objective is one function here and one row in OBJECTIVES.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lptransformer.errors import ConfigError


@dataclass(frozen=True, order=True)
class Span:
    """The head after block `last` trains blocks `first..last`; its gradient stops at the input of `first`."""

    first: int
    last: int


def chunked(num_blocks: int, chunks: int | Sequence[int]) -> tuple[Span, ...]:
    """A partition of the blocks into runs that train themselves (2012.03837, section 3, "chunked local").

    `chunks` is the number of runs, made as equal as possible with the longer ones first, or the length of every run.
    """
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
    spans, first = [], 0
    for size in sizes:
        spans.append(Span(first, first + size - 1))
        first += size
    return tuple(spans)


def greedy(num_blocks: int) -> tuple[Span, ...]:
    """Every block trains itself (2012.03837, section 3, "greedy local")."""
    return chunked(num_blocks, num_blocks)


OBJECTIVES: dict[str, Callable[..., tuple[Span, ...]]] = {"chunked": chunked, "greedy": greedy}
