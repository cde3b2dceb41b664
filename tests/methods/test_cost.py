"""Counted costs against what torch counts when a tiny stage runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_blueprint import small_blueprint
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from lptransformer.methods.cost import ModelCosts, loss_positions
from lptransformer.models.head import CROSS_ENTROPY, Head, LossBatch, token_positions
from lptransformer.models.stage import make_stage

VOCAB, HIDDEN, LENGTH, ROWS = 320, 64, 16, 2
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "max_position_embeddings": LENGTH}
CONFIG = LlamaConfig(**SIZES, num_hidden_layers=4, num_attention_heads=4, intermediate_size=160)
CONFIG._attn_implementation = "eager"  # plain products, which torch counts
HEADS: dict[str, dict[str, Any]] = {
    "private": {},
    "shared": {"kind": "shared"},
    "low rank": {"kind": "low_rank", "rank": 8},
    "private, a third": {"token_fraction": 0.3},
    "shared, a third": {"kind": "shared", "token_fraction": 0.3},
    "private, 2 blocks": {"blocks": 2},
    "shared, 1 block, a third": {"kind": "shared", "blocks": 1, "token_fraction": 0.3},
    "fitted, a third": {"kind": "fitted", "token_fraction": 0.3},
    "fitted, 1 block": {"kind": "fitted", "blocks": 1},
    "fitted, 3 trained blocks, 2 above": {"kind": "fitted", "blocks": 3, "train_blocks": True, "token_fraction": 0.3},
    "low rank, 2 averaged blocks": {"kind": "low_rank", "rank": 8, "blocks": 2, "ema_decay": 0.5},
}


def head(**options: Any) -> Head:
    blueprint = small_blueprint(CONFIG, head=options, length=LENGTH, chunks=[2, 2])
    found = make_stage(blueprint.stages[0], blueprint, seed=0).head
    assert found is not None
    return found


def costs(**options: Any) -> ModelCosts:
    """With the head after the second of four blocks."""
    return small_blueprint(CONFIG, head=options, length=LENGTH, chunks=[2, 2]).costs.after(1)


def measured(one: Head, fraction: float) -> tuple[float, float]:
    """FLOPs per token of a forward pass without gradients, and of what training takes on top of it."""
    hidden_states = torch.randn(ROWS, LENGTH, HIDDEN, requires_grad=True)
    labels = torch.randint(0, VOCAB, (ROWS, LENGTH))
    positions = None if fraction == 1.0 else token_positions(0, 1, 0, ROWS, LENGTH, fraction)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        one(hidden_states, LossBatch(labels, 1.0, positions))
    with FlopCounterMode(display=False) as both:
        one(hidden_states, LossBatch(labels, 1.0, positions))[CROSS_ENTROPY].loss.backward()
    tokens = ROWS * LENGTH
    return forward.get_total_flops() / tokens, (both.get_total_flops() - forward.get_total_flops()) / tokens


@pytest.mark.parametrize("name", HEADS)
def test_flops_of_a_head(name: str) -> None:
    """To the last one: torch counts all pairs of positions in attention where half of them count, and no norms."""
    options = HEADS[name]
    counted, blocks = costs(**options), min(options.get("blocks", 0), 2)
    forward, backward = measured(head(**options), options.get("token_fraction", 1.0))
    half_of_attention, norms = blocks * 2 * LENGTH * HIDDEN, blocks * 2 * 2 * HIDDEN
    assert forward == counted.auxiliary_flops + half_of_attention - norms
    passes = 1 if "ema_decay" in options or (options.get("kind") == "fitted" and "train_blocks" not in options) else 2
    assert backward == counted.auxiliary_backward_flops + 2 * half_of_attention - passes * norms


@pytest.mark.parametrize("name", HEADS)
def test_weights_of_a_head(name: str) -> None:
    options = HEADS[name]
    one, counted = head(**options), costs(**options)
    assert counted.auxiliary_parameters == sum(parameter.numel() for parameter in one.parameters())
    read_only = {copied.target.removeprefix("head.") for copied in one.copies} | set(one.frozen)
    assert counted.auxiliary_copied == sum(one.get_buffer(name).numel() for name in read_only)


def test_weights_of_the_model() -> None:
    counted = costs()
    blueprint = small_blueprint(CONFIG)
    stages = [make_stage(plan, blueprint, seed=0) for plan in blueprint.stages]
    whole = 4 * counted.block_parameters + counted.embedding_parameters
    assert sum(p.numel() for stage in stages for p in stage.body.parameters()) == whole
    assert stages[-1].head is not None
    assert sum(p.numel() for p in stages[-1].head.parameters()) == counted.head_parameters


def test_cheap_heads_are_cheaper_in_the_order_that_one_expects() -> None:
    full, shared, third, low = (costs(**HEADS[name]) for name in ("private", "shared", "private, a third", "low rank"))
    assert full.auxiliary_flops == shared.auxiliary_flops == full.head_flops == 2 * HIDDEN * VOCAB
    assert full.auxiliary_backward_flops == 2 * shared.auxiliary_backward_flops
    assert low.auxiliary_flops < third.auxiliary_flops < full.auxiliary_flops
    assert full.head_flops == low.head_flops and full.block_flops == third.block_flops


@pytest.mark.parametrize(("fraction", "count"), [(1.0, 15), (0.5, 8), (0.3, 4), (1e-9, 1)])
def test_positions_that_count(fraction: float, count: int) -> None:
    assert loss_positions(LENGTH, fraction) == count
