"""A method from outside: pairs of blocks train themselves, every second one by its neighbour's loss too."""

from __future__ import annotations

from pydantic import Field

from lptransformer.methods.objectives import METHODS, HybridOptions, Method, register
from lptransformer.methods.spans import Phase, Span
from lptransformer.section import Count, Share


class LadderOptions(HybridOptions):
    rung: Count = Field(default=2, description="ladder: blocks of a rung")
    near: Share = Field(default=0.5, description="ladder: weight of the nearer loss")


def ladder(num_blocks: int, rung: int, near: float) -> Phase:
    ends = [min(start + rung, num_blocks) - 1 for start in range(0, num_blocks, rung)]
    return Phase(tuple(Span(max(0, end - 2 * rung + 1), end) for end in ends), own_weight=near)


if "ladder" not in METHODS:  # workers are used again
    register("ladder", Method(ladder, LadderOptions, "ladder"))
