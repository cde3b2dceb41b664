"""FLOPs against numbers worked out by hand: 8 equal blocks of forward cost 1, heads of 10 (30 in all)."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lptransformer.methods import flops, objectives
from lptransformer.methods.cost import ModelCosts, TrainedWeights
from lptransformer.planning.simulate import pipeline_flops

COSTS = ModelCosts(block_flops=1.0, head_flops=10.0, auxiliary_flops=10.0, auxiliary_backward_flops=20.0)
OVERLAPPING = {"chunks": 4, "overlap": 1, "own_weight": 0.5, "first_head": False}


def usual(name: str, costs: ModelCosts = COSTS, num_blocks: int = 8, **options: Any) -> tuple[float, float]:
    built = objectives.build(num_blocks, name, **options)
    found = flops.of_phase(built, built.usual, costs)
    return found.total, found.serial


@pytest.mark.parametrize(
    ("name", "options", "total", "serial"),
    [
        ("backprop", {}, 24 + 30, 24 + 30),  # all of it, one after another
        ("chunked", {"chunks": 1}, 24 + 30, 24 + 30),
        ("chunked", {"chunks": 2}, 24 + 60, 12 + 30),
        ("chunked", {"chunks": [2, 6]}, 24 + 60, 18 + 30),  # the longest chunk decides
        ("greedy", {}, 24 + 8 * 30, 3 + 30),
        ("last", {"trained_blocks": 2}, 6 + 3 * 2 + 30, 6 + 30),  # 6 frozen blocks: forward only, and never waited for
        ("deep_supervision", {"chunks": 4}, 24 + 4 * 30, 24 + 30),
        ("delayed", {"chunks": 4}, 24 + 30, (24 + 30) / 2),
        # Runs 1 to 4 of 2 blocks: {1,2} {2,3} {3,4}. Pulls in runs 2 and 3; run 4 has no other loss and needs none.
        # Serial: forward of 3 and 4, the head, the ordinary backward of 4, then of 3.
        ("overlapping", OVERLAPPING, 24 + 2 * 2 + 3 * 30, 2 + 2 + 30 + 4 + 4),
        # own_weight 1: every run has a head of its own and listens to no other, as in chunked.
        ("overlapping", {**OVERLAPPING, "own_weight": 1.0, "first_head": True}, 24 + 4 * 30, 6 + 30),
        ("overlapping", {**OVERLAPPING, "overlap": 0}, 24 + 4 * 30, 6 + 30),
    ],
)
def test_an_update(name: str, options: dict[str, Any], total: float, serial: float) -> None:
    assert usual(name, **options) == (total, serial)


def test_the_overlapping_cycle_that_pulls() -> None:
    """Runs of 4, 6 and 1 blocks: {1,2} and {2,3}. Run 2 pulls the loss of head 2."""
    total, serial = usual("overlapping", num_blocks=11, **{**OVERLAPPING, "chunks": [4, 6, 1]})
    assert total == 33 + 6 + 2 * 30
    through_run_1 = 4 + 6 + 30 + 6 + 8  # forward of 1 and 2, head 2, pull of 2, backward of 1
    through_run_3 = 6 + 1 + 30 + 2 + 12  # forward of 2 and 3, head 3, backward of 3 and of 2
    assert serial == through_run_1 > through_run_3


def test_a_turn_above_the_bottom_can_be_the_costliest() -> None:
    """Runs of 1 and 7 with a head behind each: the pull of run 2 is cheaper than its own backward, run 1 is short."""
    _, serial = usual("overlapping", chunks=[1, 7], overlap=1, own_weight=0.5, first_head=True)
    down_to_run_1 = 1 + 7 + 30 + 14 + 2  # run 2 has no other loss: its ordinary backward hands down
    assert serial == down_to_run_1
    _, serial = usual("overlapping", num_blocks=9, chunks=[1, 7, 1], overlap=1, own_weight=0.5, first_head=True)
    turn_at_run_2 = 7 + 30 + 14
    assert serial == max(turn_at_run_2, 1 + 7 + 30 + 7 + 2, 7 + 1 + 30 + 2 + 14) == 54


def test_what_a_cheap_head_saves() -> None:
    shared = ModelCosts(1.0, 10.0, auxiliary_flops=10.0, auxiliary_backward_flops=10.0)
    assert usual("chunked", shared, chunks=2) == (24 + 30 + 20, 12 + 30)


def frozen(blocks: str, embedding: int = 0, head: int = 5, auxiliary: int = 5) -> ModelCosts:
    """Blocks of 10 weights, of which a digit trains; heads of 5 weights."""
    trained = TrainedWeights(embedding, tuple(map(int, blocks)), head, {3: auxiliary})
    sizes = {"block_parameters": 10, "head_parameters": 5, "auxiliary_parameters": 5}
    return dataclasses.replace(COSTS, **sizes, trained=trained)


@pytest.mark.parametrize(
    ("name", "costs", "total", "serial"),
    [
        # Forward 8; gradients of half the weights of each block, and at the inputs of all of them.
        ("chunked", frozen("55555555"), 8 + 4 + 8 + 60, 4 + 2 + 4 + 30),
        # Nothing below block 2 trains: no backward pass there. Above it the one at the inputs goes all the way.
        ("backprop", frozen("00050000"), 8 + 0.5 + 5 + 30, 8 + 0.5 + 5 + 30),
        ("backprop", frozen("00050000", embedding=1), 8 + 0.5 + 8 + 30, 8 + 0.5 + 8 + 30),
        # The lower chunk has nothing to train: two forward passes of it and its head, and nobody waits for them.
        ("chunked", frozen("00005555", auxiliary=0), 8 + 2 + 4 + 10 + 30, 4 + 2 + 4 + 30),
        # A frozen readout: half of its backward pass.
        ("backprop", frozen("55555555", head=1), 8 + 4 + 8 + 20, 8 + 4 + 8 + 20),
        ("chunked", frozen("55555555", auxiliary=1), 8 + 4 + 8 + 30 + 22, 4 + 2 + 4 + 30),
    ],
)
def test_frozen_weights(name: str, costs: ModelCosts, total: float, serial: float) -> None:
    options = {"chunks": 2} if name == "chunked" else {}
    assert usual(name, costs, **options) == (total, serial)


@pytest.mark.parametrize("costs", [COSTS, frozen("55555555"), frozen("00050000"), frozen("00050000", embedding=1)])
def test_one_pipeline_rank_takes_all_of_the_flops(costs: ModelCosts) -> None:
    whole = objectives.build(8, "backprop")
    (alone,) = pipeline_flops(whole, costs, ranks=1, micro_batches=1)
    assert alone == pytest.approx(flops.of_phase(whole, whole.usual, costs).total)


def test_hybrid_is_the_mean_over_its_phases() -> None:
    """Global updates: all blocks by the last head; the auxiliary heads learn and move no block."""
    hybrid = objectives.build(8, "chunked", chunks=2, backprop_every=5)
    local, whole = (flops.of_phase(hybrid, phase, COSTS) for phase in hybrid.phases)
    assert (local.total, local.serial) == (24 + 60, 12 + 30)
    assert (whole.total, whole.serial) == (24 + 60, 24 + 30)
    spent = flops.spent(hybrid, COSTS, updates=10, steps=100)
    assert (spent.total, spent.serial) == (10 * 84, 8 * 42 + 2 * 54)
    late = objectives.build(8, "chunked", chunks=2, backprop_share=0.25)
    assert flops.spent(late, COSTS, updates=7, steps=8).serial == 6 * 42 + 1 * 54  # the last 2 of 8 are global


def test_spent_counts_updates() -> None:
    backprop = objectives.build(8, "backprop")
    assert flops.spent(backprop, COSTS, updates=7, steps=100) == flops.UpdateFlops(7 * 54, 7 * 54)
