"""A kind of head from outside: two maps one after the other."""

from __future__ import annotations

from pydantic import Field

from lptransformer.methods.heads import HEADS, HeadKind, HeadOptions, ReadoutCost, register
from lptransformer.models.head import BuiltReadout, Material, Readout
from lptransformer.section import Count


class SquareOptions(HeadOptions):
    width: Count = Field(default=8, description="square: numbers between the two maps")


def cost(options: SquareOptions, hidden_size: int, vocab_size: int) -> ReadoutCost:
    weights = options.width * (hidden_size + vocab_size)
    return ReadoutCost(multiplied=weights, trained=weights, vocabulary=options.width * vocab_size)


def build(options: SquareOptions, material: Material) -> BuiltReadout:
    sizes = (material.hidden_size, options.width), (options.width, material.vocab_size)
    down, up = material.new(*sizes)
    return BuiltReadout(Readout(up.weight, material.chunk_tokens, material.rule), down)


if "square" not in HEADS:
    register("square", HeadKind(SquareOptions, cost, "outside_head:build", lambda options: f"square {options.width}"))
