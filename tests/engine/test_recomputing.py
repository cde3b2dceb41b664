"""Activations that are computed again change no bit, whatever ZeRO does and whatever crosses borders."""

from __future__ import annotations

import pytest
import torch
from distributed import Pool
from engine_jobs import train
from tiers import slow

ZERO = "deepspeed.zero_optimization.stage"
OVERLAPPING = ("objective.name=overlapping", "objective.chunks=4")
CASES: dict[str, tuple[tuple[str, ...], str]] = {
    "overlapping": ((*OVERLAPPING, "parallel.pipeline=2"), "selective"),
    "overlapping, ZeRO 2": ((*OVERLAPPING, "parallel.data=2", f"{ZERO}=2"), "blocks"),
    "chunked, ZeRO 3": (("parallel.data=2", f"{ZERO}=3"), "every 2"),
    "chunked, ZeRO 3, llama": (("model.family=llama", "parallel.data=2", f"{ZERO}=3"), "selective"),
    "overlapping by 2, bf16": ((*OVERLAPPING, "objective.overlap=2", "train.dtype=bf16"), "selective"),
    "delayed": (("objective.name=delayed", "parallel.pipeline=2"), "blocks"),
    "hybrid, extra blocks": (("objective.backprop_every=2", "head.blocks=1", "parallel.pipeline=2"), "blocks"),
    "blocks that follow the next ones": (("head.blocks=1", "head.ema_decay=0.5", "parallel.pipeline=2"), "selective"),
}
QUICK = ("overlapping", "overlapping, ZeRO 2")


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case) for case in CASES])
def test_losses_norms_and_weights_are_the_same(pool: Pool, case: str) -> None:
    overrides, how = CASES[case]
    kept, again = (
        pool.run(1 + any("=2" in o and o.startswith("parallel.") for o in overrides), train, one, 3)
        for one in (overrides, (*overrides, f"train.activation_checkpointing={how}"))
    )
    for one, other in zip(kept, again, strict=True):
        assert one.plans.keys() == other.plans.keys()
        for stage, reports in one.reports.items():
            numbers = [(report.loss_sum, report.grad_norm) for report in reports]
            assert numbers == [(report.loss_sum, report.grad_norm) for report in other.reports[stage]]
            assert one.weights[stage].keys() == other.weights[stage].keys()
            for name, weight in one.weights[stage].items():
                assert torch.equal(weight, other.weights[stage][name]), name
