"""`optimizer.name`: Muon on whole and on partitioned matrices against torch's own, in a plain loop (reference.py)."""

from __future__ import annotations

import pytest
from distributed import Pool
from engine_jobs import load_config, train
from parity import compare, expected, gather
from tiers import slow

ZERO = "deepspeed.zero_optimization.stage"
MUON = ("optimizer.name=muon",)
AT_ZERO_0: dict[str, tuple[str, ...]] = {
    "chunked, 2 ranks": ("objective.chunks=2", "parallel.pipeline=2"),
    "delayed, llama, 2 ranks": ("objective.name=delayed", "objective.chunks=1", "model.family=llama", "parallel.pipeline=2"),
    "extra blocks, low rank": ("head.blocks=1", "head.kind=low_rank", "head.rank=4"),
    "2 replicas": ("parallel.data=2",),
}
QUICK = "chunked, 2 ranks"


def processes(overrides: tuple[str, ...]) -> int:
    parallel = load_config(overrides).parallel
    return parallel.pipeline * parallel.data


@pytest.mark.parametrize("case", [case if case == QUICK else slow(case) for case in AT_ZERO_0])
def test_muon_at_zero_0_has_the_bits_of_torchs(pool: Pool, case: str) -> None:
    overrides = (*MUON, "train.grad_clip=0.005", *AT_ZERO_0[case])
    wanted = expected(overrides, 4, replicas=load_config(overrides).parallel.data)
    assert min(norm for norms in wanted.grad_norms for norm in norms) > load_config(overrides).train.grad_clip > 0
    kind = load_config(overrides).head.kind
    compare(gather(pool.run(processes(overrides), train, overrides, 4), kind), wanted)


@pytest.mark.parametrize(("stage", "replicas"), [slow(1, 1), slow(1, 2), (2, 2)])
def test_muon_on_partitions_has_the_bits_of_torchs_without_clipping(pool: Pool, stage: int, replicas: int) -> None:
    """The norms of parameter groups, of which Muon makes one more, are rounded one by one."""
    overrides = (*MUON, "train.grad_clip=0", f"parallel.data={replicas}", f"{ZERO}={stage}")
    averaging = "accumulate_then_average" if stage == 1 else "average_then_accumulate"
    wanted = expected(overrides, 4, replicas=replicas, averaging=averaging)
    compare(gather(pool.run(replicas, train, overrides, 4)), wanted, norm_tolerance=1e-6)
