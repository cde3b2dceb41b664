"""What an update takes, by hand: passes, sums over replicas, messages, 1F1B, data parallel, the bounds of others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lptransformer.config.load import load
from lptransformer.methods import objectives
from lptransformer.methods.cost import model_costs
from lptransformer.methods.heads import HeadOptions
from lptransformer.methods.stages import cut
from lptransformer.planning.candidates import Candidate, Prediction, balanced_sizes, of_backprop, splits
from lptransformer.planning.devices import Cluster, load_devices
from lptransformer.planning.plan import make
from lptransformer.planning.rank_memory import ActivationBytes
from lptransformer.planning.stage_state import precision
from lptransformer.planning.step_time import Work, bounds, exposed_seconds, message_bytes, stage_seconds

H, BLOCKS, T, V = 64, 8, 32, 512
BASE: dict[str, Any] = {
    "model": {"hidden_size": H, "num_layers": BLOCKS, "num_heads": 4},
    "data": {"train": "none.txt", "vocab_size": V, "sequence_length": T},
    "train": {"micro_batch_size": 2, "micro_batches_per_update": 8},
    "parallel": {"pipeline": 4},
    "objective": {"chunks": 4},
}
# Every process a pipeline rank: one window for an update leaves no replicas.
ALONE = ["train.micro_batch_size=1", "train.micro_batches_per_update=1"]


def work(micro_batches: int = 8, vocab_size: int = V) -> Work:
    costs = model_costs(
        12 * H * H, H, vocab_size, T, HeadOptions(), embedding_parameters=vocab_size * H, norm_parameters=2 * H
    )
    kept, states = ActivationBytes(1e6, 1e4, 2 * T * H * 4, 64 * vocab_size * 16, 4), precision("fp32")
    sizes = (BLOCKS, H, vocab_size, T, 2, micro_batches)
    return Work(costs, *sizes, "fp32", kept, vocab_size * 16, H * 4, 64, states, 32.0)


def cluster(nodes: int = 1, per_node: int = 4, link: str = "100gbit") -> Cluster:
    return Cluster(load_devices().device("h100"), nodes, per_node, load_devices().link(link))


def ideal(size: int) -> Cluster:
    """Links and updates cost nothing."""
    fast = replace(load_devices().link("nvlink4"), bits_per_second=1e30, latency_seconds=0.0)
    return Cluster(replace(load_devices().device("h100"), intra_link=fast, memory_bandwidth=1e30), 1, size, fast)


def methods(*overrides: str) -> dict[str, Prediction]:
    made = make(load(BASE, list(overrides)), nodes=4, gpus_per_node=1, gpu="h100", link="100mbit")
    return {one.method: one for one in made.methods}


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [((12, 4, 1.0, 0.0), [3, 3, 3, 3]), ((12, 4, 1.0, 3.0), [4, 4, 3, 1]), ((5, 1, 1.0, 9.0), [5])]
    + [((8, 2, 3.0, 2.0, 2.0), [4, 4]), ((4, 4, 1.0, 50.0), [1, 1, 1, 1])],
)
def test_balanced_sizes(arguments: tuple[Any, ...], sizes: list[int]) -> None:
    assert balanced_sizes(*arguments) == sizes


def test_memory_of_somebody_else_s_program_by_hand() -> None:
    one = work()
    of, embedding, body = one.activations, V * H, BLOCKS * 12 * H * H
    weights, rows = body + 2 * embedding + 2 * H, 2 * T * H * 4

    def bytes_of(zero: int, one: Work = one, **how: Any) -> float:
        states = replace(precision("bf16", on_gpu=True), **how)
        return of_backprop(replace(one, states=states), cluster(), 1, 4, zero, 0.0).memory_bytes

    passes = BLOCKS * of.block + of.norm + rows + of.logits + embedding * 4
    assert weights % 4 == 0
    # Weights, gradients, master weights and moments of the own share; activations; the bucket.
    assert bytes_of(1) == pytest.approx(4 * weights + weights / 4 * 12 + passes + 2 * weights)
    # Everything divided, gradients in fp32; the bucket, and the weights of two of the largest pieces on their way.
    assert bytes_of(3) == pytest.approx(
        weights / 4 * (2 + 4) + weights / 4 * 12 + passes + 2 * weights + 2 * 2 * 12 * H * H
    )
    # Nothing kept: the step decides, with gradients in fp32, and at ZeRO 1 the gradients of the own share once more;
    # AdamW's kernel needs nothing for itself.
    nothing = replace(one, activations=ActivationBytes(0.0, 0.0, 0.0, 0.0, 0))
    assert bytes_of(1, nothing, bucket=0) == 4 * weights + weights / 4 * 12 + weights / 4 * (4 + 2)


def test_seconds_of_a_stage() -> None:
    """FLOPs over what the device achieves; the ring of the replicas and the optimizer in the update."""
    one, here = work(), cluster()
    objective = objectives.build(BLOCKS, "chunked", chunks=2)
    stages = cut(objective, 2, one.costs)
    (low, high), waits = stage_seconds(stages, one, here, 2, 1)
    rate = 6.69e13 * 0.43
    block = (2 * 12 * H * H + 2 * T * H) * 2 * T
    assert low.forward == pytest.approx((4 * block + 3 * 2 * H * V * 2 * T) / rate)
    assert (low.backward, low.pull) == pytest.approx((2 * 4 * block / rate, 4 * block / rate))
    weights = 4 * 12 * H * H + 2 * H + V * H
    ring = here.ring_seconds(4 * weights, 2)
    assert high.update == pytest.approx(weights / 2 * 32 / 3.35e12 + ring)
    assert waits[1] == pytest.approx(ring)
    (zero_3, _), _ = stage_seconds(stages, one, here, 2, 3)
    assert zero_3.forward > low.forward and zero_3.backward > low.backward and zero_3.update < low.update


def test_seconds_of_blocks_that_are_computed_again() -> None:
    """One more forward pass in every backward pass and every pull, of a head's extra blocks too."""
    one, here = work(), cluster()
    one = replace(one, head=HeadOptions(blocks=1))
    stages = cut(objectives.build(BLOCKS, "chunked", chunks=[3, 5]), 1, one.costs)
    block = one.costs.block_flops * 2 * T / (6.69e13 * 0.43)

    def more(how: str) -> list[tuple[float, ...]]:
        kept, _ = stage_seconds(stages, one, here, 1, 0)
        again, _ = stage_seconds(stages, replace(one, activation_checkpointing=how), here, 1, 0)
        pairs = zip(kept, again, strict=True)
        return [((b.forward - a.forward), (b.backward - a.backward), (b.pull - a.pull)) for a, b in pairs]

    # The extra block of the head after block 2 is like block 3, the fourth.
    for how, expected in {
        "blocks": [(1, 3, 3), (0, 5, 5)],
        "every 2": [(1, 1, 1), (0, 3, 3)],
        "selective": [(0, 0, 0), (0, 0, 0)],
    }.items():
        for found, blocks in zip(more(how), expected, strict=True):
            assert found == pytest.approx([number * block for number in blocks], abs=1e-3 * block)


def test_local_updates_have_no_bubble_and_backprop_has_one() -> None:
    one, here = work(micro_batches=4), cluster(per_node=4)
    objective = objectives.build(BLOCKS, "chunked", chunks=4)
    stages = cut(objective, 4, one.costs)
    local = Candidate("chunked", objective, stages, one, here, data=1, zero_stage=0)
    found = local.evaluate()
    assert found.local and len(found.ranks) == 4 and max(found.idle_shares) < 0.9
    assert found.step_seconds >= local.at_least and min(found.idle_shares) >= 0
    backprop = of_backprop(one, here, 4, 1, 0, 0.0).evaluate()
    assert not backprop.local and backprop.idle_share > 3 / 8  # (p - 1) / (m + p - 1) at least
    assert backprop.down_bytes == backprop.up_bytes == 4 * one.activations.rows
    assert (found.up_bytes, found.down_bytes) == (4 * one.activations.rows, 0)


def test_1f1b_by_hand() -> None:
    """Where ranks are alike, and links and updates cost nothing: (m + p - 1) passes of both kinds, recomputed blocks a
    forward pass more."""
    here, one = ideal(4), work(vocab_size=4, micro_batches=6)
    block = one.costs.block_flops * 2 * T / (6.69e13 * 0.43)
    for recompute in (0.0, 0.5):
        found = of_backprop(one, here, 4, 1, 0, recompute).evaluate()
        assert found.step_seconds == pytest.approx((6 + 3) * 2 * (3 + recompute) * block, rel=0.01)


@pytest.mark.parametrize(("pipeline", "data", "micro_batches"), [(2, 2, 8), (4, 1, 8), (4, 1, 6)])
def test_bounds_are_their_papers_closed_forms(pipeline: int, data: int, micro_batches: int) -> None:
    """2104.04473, section 2.2: a bubble of (p - 1) / v passes of a rank; 2401.10241 and 2405.15362: none."""
    one, here = work(micro_batches=micro_batches), cluster()
    m, chunks = micro_batches // data, BLOCKS // pipeline
    for recompute in (0.0, 1.0):
        flops = (3 + recompute) * BLOCKS * one.costs.block_flops + 3 * one.costs.head_flops
        each = flops / pipeline * 2 * T / (6.69e13 * 0.43)
        found = {one.method: one.step_seconds for one in bounds(one, here, pipeline, data, recompute)}
        wanted = {"zero bubble": m * each}
        if m % pipeline == 0:
            wanted["interleaved 1F1B"] = m * each + (pipeline - 1) / chunks * each
        assert found == pytest.approx(wanted)
        best = of_backprop(one, here, pipeline, data, 1, recompute).evaluate().step_seconds
        assert all(seconds <= best for seconds in found.values())


def test_data_parallel_by_hand() -> None:
    one, here = work(), cluster(2, 1, "1gbit")
    found = of_backprop(one, here, 1, 2, 1, 0.0).evaluate()
    rate, tokens = 6.69e13 * 0.43, 2 * T
    body, head = BLOCKS * one.costs.block_flops * tokens / rate, one.costs.head_flops * tokens / rate
    weights = BLOCKS * 12 * H * H + 2 * V * H + 2 * H
    ring = 2 * (1 / 2 * 4 * weights / (1e9 * 0.9 / 8) + 1e-4)
    seen = ring - 2 * (body + head)
    assert found.step_seconds == pytest.approx(4 * 3 * (body + head) + seen + weights / 2 * 32 / 3.35e12)
    assert found.reduced_bytes == pytest.approx(4 * weights)
    assert found.reduction_seconds == pytest.approx(seen)
    assert found.idle_shares == pytest.approx([seen / found.step_seconds])


def test_what_is_seen_of_a_sum_of_gradients() -> None:
    """Beside the last backward pass: its last piece at least, and what is longer than the pass."""
    assert exposed_seconds(1.5, compute=2.0, pieces=10) == pytest.approx(0.15)
    assert exposed_seconds(9.0, compute=2.0, pieces=10) == pytest.approx(7.0)


def test_smaller_micro_batches_are_the_same_update() -> None:
    one = work(micro_batches=4)
    half = one.cut_smaller(1)
    assert half.tokens == one.tokens and half.micro_batches == 8
    assert half.activations.block == one.activations.block / 2
    found = {(pipeline, data, way.micro_batch_size) for pipeline, data, way in splits(cluster(per_node=8), one)}
    assert (1, 8, 1) in found and (1, 8, 2) not in found


@pytest.mark.slow
def test_only_delayed_gradients_are_charged_for_a_second_version_of_the_weights() -> None:
    with_it, without = methods("objective.name=delayed"), methods()
    others = set(with_it) & set(without)
    assert {"chunked, one per rank", "overlapping, one per rank", "backprop, 1F1B", "data parallel"} <= others
    for name in others:
        assert with_it[name].memory_bytes == without[name].memory_bytes, name
        assert with_it[name].step_seconds == without[name].step_seconds, name
    (own,) = (one for name, one in with_it.items() if name.startswith("delayed"))
    for row in own.ranks:
        assert row.memory.optimizer == 3 * row.memory.weights  # two moments, and the version


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rounded_borders_are_of_chunks_only(kind: str) -> None:
    rounded, exact = methods(*ALONE, f"border.codec={kind}"), methods(*ALONE)
    assert set(rounded) == set(exact)
    for name in set(exact) - {"chunked(4), as configured", "chunked, one per rank"}:
        assert (rounded[name].up_bytes, rounded[name].step_seconds) == (exact[name].up_bytes, exact[name].step_seconds)
    share = {"bf16": 2 * 64, "int8": 64 + 4}[kind] / (4 * 64)
    for name in ("chunked(4), as configured", "chunked, one per rank"):
        assert rounded[name].up_bytes == share * exact[name].up_bytes


def test_inside_of_a_chunk_hidden_states_travel_as_they_are() -> None:
    """Two chunks on four ranks: only the middle border is behind a head, and carries no gradient."""
    one = replace(work(), token_bytes=H + 4)
    for chunks, rounded in ((4, [True] * 3), (2, [False, True, False])):
        objective = objectives.build(BLOCKS, "chunked", chunks=chunks)
        up, down = message_bytes(objective, cut(objective, 4, one.costs, [2, 2, 2, 2]), one)
        assert up == [2 * T * (H + 4) if small else one.activations.rows for small in rounded]
        assert down == [int(not small) for small in rounded]
