"""`loss.fused`: a library's loss in the engine, where borders take gradients twice, or ZeRO 3 gathers its weight.

What a kernel computes is tests/models/test_cross_entropy.py.
"""

from __future__ import annotations

import pytest
from distributed import Pool
from engine_jobs import train

TOLERANCE = 1e-5  # relative: sums have another order
CASES = {
    "overlapping": ("objective.name=overlapping", "objective.chunks=4", "parallel.pipeline=2"),
    "shared readout, ZeRO 3": ("head.kind=shared", "parallel.data=2", "deepspeed.zero_optimization.stage=3"),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_norms_are_those_of_the_loop(pool: Pool, case: str) -> None:
    overrides = (*CASES[case], "loss.chunk_tokens=10", "optimizer.name=sgd", "train.learning_rate=0.1")
    loop, fused = (pool.run(2, train, (*overrides, f"loss.fused={how}"), 3) for how in ("chunked", "torch"))
    losses = []
    for one, other in zip(loop, fused, strict=True):
        for stage, reports in one.reports.items():
            for report, again in zip(reports, other.reports[stage], strict=True):
                assert again.grad_norm == pytest.approx(report.grad_norm, rel=TOLERANCE)
                if report.loss_sum is not None:
                    assert again.loss_sum == pytest.approx(report.loss_sum, rel=TOLERANCE)
                    losses.append(again.loss_sum == report.loss_sum)
    assert losses and not all(losses), "another kernel has other bits"
