"""`train.compile`: blocks through torch.compile (its tracing alone: no compiler is needed) train to the same losses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import Trained, load_config, train
from torch._dynamo.utils import counters

from lptransformer.errors import ConfigError
from lptransformer.models import stage
from lptransformer.training.this_host import check_host

TOLERANCE = 1e-5  # relative, of losses and gradient norms: sums have another order
OVERLAPPING = ("objective.name=overlapping", "objective.chunks=4")
CASES: dict[str, tuple[str, ...]] = {
    "overlapping": (*OVERLAPPING, "model.family=llama"),
    "chunked, extra blocks, ZeRO 2": ("head.blocks=1", "deepspeed.zero_optimization.stage=2"),
    "overlapping, selective": (*OVERLAPPING, "train.activation_checkpointing=selective"),
    "delayed, recomputed": ("objective.name=delayed", "train.activation_checkpointing=blocks"),
}


def train_traced(overrides: Sequence[str], updates: int) -> tuple[Trained, dict[str, Any]]:
    """Trained with what torch.compile makes of the blocks, run operation by operation; what it says of itself."""
    compiler, stage.COMPILER = stage.COMPILER, "aot_eager"
    torch._dynamo.reset()
    counters.clear()
    try:
        return train((*overrides, "train.compile=true"), updates, evaluate=True), {
            k: Counter(v) for k, v in counters.items()
        }
    finally:
        stage.COMPILER = compiler
        torch._dynamo.reset()


def test_a_host_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    config = load_config(["train.compile=true"])
    with pytest.raises(ConfigError) as caught:
        check_host(config, 1)
    said = str(caught.value)
    assert "train.compile = True (on the command line)" in said and "a C++ compiler" in said and "ninja" not in said


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_losses_norms_and_names_are_those_without_it(pool: Pool, case: str) -> None:
    overrides = (*CASES[case], "optimizer.name=sgd", "train.learning_rate=0.1")
    (plain,) = pool.run(1, train, overrides, 2)
    ((traced, said),) = pool.run(1, train_traced, overrides, 2)
    assert 2 <= said["stats"]["unique_graphs"] <= 8 and not said.get("graph_break"), said
    for index, reports in plain.reports.items():
        assert plain.weights[index].keys() == traced.weights[index].keys()
        for one, other in zip(reports, traced.reports[index], strict=True):
            assert other.grad_norm == pytest.approx(one.grad_norm, rel=TOLERANCE)
            if one.loss_sum is not None:
                assert other.loss_sum == pytest.approx(one.loss_sum, rel=TOLERANCE)
