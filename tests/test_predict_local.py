"""What one method's options do to another: nothing. Second versions of weights, and rounded hidden states."""

from __future__ import annotations

from typing import Any

import pytest

from lptransformer import config as configuration
from lptransformer import objective
from lptransformer.cost import model_costs
from lptransformer.devices import Cluster, table
from lptransformer.plan import Request, make
from lptransformer.predict_local import of_objective
from lptransformer.rank_memory import ActivationBytes, precision
from lptransformer.workload import Prediction, Work

BASE: dict[str, Any] = {
    "model": {"hidden_size": 64, "num_layers": 8, "num_heads": 4},
    "data": {"train": "none.txt", "vocab_size": 512, "sequence_length": 32},
    "train": {"micro_batch_size": 2, "micro_batches_per_update": 8},
    "parallel": {"pipeline": 4},
    "objective": {"chunks": 4},
}
# Every process a pipeline rank: one window for an update leaves no replicas.
ALONE = ["train.micro_batch_size=1", "train.micro_batches_per_update=1"]


def methods(*overrides: str) -> dict[str, Prediction]:
    request = Request(nodes=4, gpus_per_node=1, gpu="h100", link="100mbit")
    return {one.method: one for one in make(configuration.load(BASE, list(overrides)), request).methods}


def test_only_delayed_gradients_are_charged_for_a_second_version_of_the_weights() -> None:
    with_it, without = methods("objective.name=delayed"), methods()
    others = set(with_it) & set(without)
    assert {"chunked, one per rank", "overlapping, one per rank", "backprop, 1F1B", "data parallel"} <= others
    for name in others:
        assert (with_it[name].memory_bytes, with_it[name].update_seconds, with_it[name].step_seconds) == (
            without[name].memory_bytes,
            without[name].update_seconds,
            without[name].step_seconds,
        ), name
    (own,) = (one for name, one in with_it.items() if name.startswith("delayed"))
    for row in own.ranks:
        assert row.memory.optimizer == 3 * row.memory.weights  # two moments, and the version


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_rounded_borders_are_of_chunks_only(kind: str) -> None:
    rounded, exact = methods(*ALONE, f"train.border_dtype={kind}"), methods(*ALONE)
    assert set(rounded) == set(exact)
    for name in set(exact) - {"chunked(4), as configured", "chunked, one per rank"}:
        assert (rounded[name].up_bytes, rounded[name].step_seconds) == (exact[name].up_bytes, exact[name].step_seconds)
    share = {"bf16": 2 * 64, "int8": 64 + 4}[kind] / (4 * 64)
    for name in ("chunked(4), as configured", "chunked, one per rank"):
        assert rounded[name].up_bytes == share * exact[name].up_bytes


def test_inside_of_a_chunk_hidden_states_travel_as_they_are() -> None:
    """Two chunks on four ranks: only the middle border is behind a head, and carries no gradient."""
    costs = model_costs(12 * 64 * 64, 64, 512, 32, embedding_parameters=512 * 64, norm_parameters=128)
    kept = ActivationBytes(1e6, 1e4, 2 * 32 * 64 * 4, 64 * 512 * 16, 4)
    states, token_bytes = precision("fp32"), 64 + 4
    one = Work(costs, 8, 64, 512, 32, 2, 4, "fp32", kept, 512 * 16, token_bytes, 64, states, 32.0)
    here = Cluster(table().device("h100"), 4, 1, table().link("100gbit"))

    def of(chunks: int) -> Prediction:
        goal = objective.build(8, "chunked", chunks=chunks)
        return of_objective("chunked", goal, one, here, 4, 1, zero_stage=0, sizes=[2, 2, 2, 2]).evaluate()

    assert (of(4).up_bytes, of(4).down_bytes) == (4 * 2 * 32 * token_bytes, 0)
    assert (of(2).up_bytes, of(2).down_bytes) == (4 * kept.rows, 4 * kept.rows)
