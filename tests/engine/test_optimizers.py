"""`optimizer.name`: Muon on whole and on partitioned matrices against torch's own, in a plain loop (reference.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed import Pool
from engine_jobs import load_config, open_engine, train
from overlays import overlay, with_overlay
from parity import compare, expected, gather
from test_resharding import Seen, joined, travel
from tiers import slow
from torch import nn

from lptransformer.engine.optimizer import Muon, build_optimizer
from lptransformer.errors import ConfigError
from lptransformer.models.stage import block_matrices
from lptransformer.training.this_host import check_host

ZERO = "deepspeed.zero_optimization.stage"
MUON = ("optimizer.name=muon",)
AT_ZERO_0: dict[str, tuple[str, ...]] = {
    "chunked, 2 ranks": ("objective.chunks=2", "parallel.pipeline=2"),
    "delayed, llama, 2 ranks": (
        "objective.name=delayed",
        "objective.chunks=1",
        "model.family=llama",
        "parallel.pipeline=2",
    ),
    "extra blocks, low rank": ("head.blocks=1", "head.kind=low_rank", "head.rank=4"),
    "2 replicas": ("parallel.data=2",),
}
QUICK = "chunked, 2 ranks"
UNEVEN = (*MUON, "objective.chunks=[3,5]")  # the cut between two replicas goes through a matrix of each stage


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
    overrides = (*UNEVEN, "train.grad_clip=0", f"parallel.data={replicas}", f"{ZERO}={stage}")
    averaging = "accumulate_then_average" if stage == 1 else "average_then_accumulate"
    wanted = expected(overrides, 4, replicas=replicas, averaging=averaging)
    compare(gather(pool.run(replicas, train, overrides, 4)), wanted, norm_tolerance=1e-6)


@pytest.mark.slow
def test_muon_on_partitions_with_two_versions_of_the_weights(pool: Pool) -> None:
    overrides = (*MUON, "objective.name=delayed", "objective.chunks=1", "train.grad_clip=0", "parallel.data=2")
    wanted = expected(overrides, 4, replicas=2, averaging="average_then_accumulate")
    partitioned = pool.run(4, train, (*overrides, "parallel.pipeline=2", f"{ZERO}=2"), 4)
    compare(gather(partitioned), wanted, norm_tolerance=1e-6)


def shared_matrices(overrides: tuple[str, ...]) -> list[int]:
    """Of every stage, how many matrices lie on both replicas."""
    with open_engine(overrides) as engine:
        return [len(stage.optimizer._shared) for stage in engine.local.values()]


def test_a_matrix_between_two_replicas_is_among_those(pool: Pool) -> None:
    assert pool.run(2, shared_matrices, (*UNEVEN, "parallel.data=2", f"{ZERO}=2")) == [[1, 1]] * 2


@pytest.mark.parametrize("mode", [(2, "bf16", 2), slow((0, "fp32", 1))], ids=str)
def test_a_resumed_run_has_the_bits_of_one_that_went_on(pool: Pool, tmp_path: Path, mode: tuple[int, str, int]) -> None:
    stage, dtype, replicas = mode
    overrides = (*UNEVEN, f"{ZERO}={stage}", f"train.dtype={dtype}", f"parallel.data={replicas}")
    whole = pool.run(replicas, train, overrides, 4)
    pool.run(replicas, _train, overrides, 2, None, tmp_path)
    for one, other in zip(whole, pool.run(replicas, _train, overrides, 2, tmp_path, None), strict=True):
        for index, weights in one.weights.items():
            assert all(torch.equal(weight, other.weights[index][name]) for name, weight in weights.items())


def _train(overrides: tuple[str, ...], updates: int, load: Path | None, save: Path | None) -> object:
    return train(overrides, updates, load=load, save=save)


def in_matrices(*overrides: str) -> tuple[set[str], set[str]]:
    """The trained weights of a stage that Muon steps, and the others."""
    with open_engine((*MUON, *overrides)) as engine:
        stage = engine.local[0]
        named = {name: one for name, one in stage.engine.module.named_parameters() if one.requires_grad}
        matrices = block_matrices(stage.engine.module, engine.blueprint.parts)
        muon = {name for name, one in named.items() if one in matrices}
        groups = stage.optimizer.param_groups
        assert {one for group in groups if group["matrices"] for one in group["params"]} == {named[n] for n in muon}
        return muon, named.keys() - muon


def test_muon_steps_the_maps_of_blocks_and_of_a_heads_blocks(pool: Pool) -> None:
    ((muon, others),) = pool.run(1, in_matrices, "head.blocks=1", "head.kind=low_rank", "head.rank=4")
    maps = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert len(muon) == (4 + 1) * len(maps) and all(name.endswith(tuple(f"{m}.weight" for m in maps)) for name in muon)
    assert {"body.wte.weight", "body.wpe.weight", "head.readout.weight", "body.h.0.ln_1.weight"} < others


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_adamw_is_one_kernel_on_gpus_alone(name: str) -> None:
    weights = [nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))]
    options = load_config([f"optimizer.name={name}"]).optimizer
    for on_gpu in (False, True):
        optimizer = build_optimizer(weights, options, 0.1, matrices=weights[:1], on_gpu=on_gpu)
        inner = optimizer._adamw if isinstance(optimizer, Muon) else optimizer
        assert type(inner) is torch.optim.AdamW
        assert [group["fused"] for group in inner.param_groups] == [True if on_gpu else None] * 2


# -------------------------------------------------------------------------------------------------- in 8 bits


EIGHT_BITS = ("optimizer.name=adamw_8bit", "model.hidden_size=64", "objective.chunks=2")


@pytest.fixture(scope="module")
def bitsandbytes(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(overlay("bitsandbytes", tmp_path_factory.mktemp("bitsandbytes")))


def test_8_bits_are_refused_without_a_gpu_and_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(EIGHT_BITS)
    for there, said in ((False, "there is no GPU"), (True, 'pip install "lptransformer[8bit]"')):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        with pytest.raises(ConfigError) as caught:
            check_host(config, 1)
        assert "optimizer.name = 'adamw_8bit' (on the command line)" in str(caught.value) and said in str(caught.value)


@pytest.mark.slow
def test_moments_in_8_bits_train_like_others(pool: Pool, bitsandbytes: str) -> None:
    """bitsandbytes has kernels for CPUs too."""
    overrides = (*EIGHT_BITS, f"{ZERO}=2", "parallel.data=2", "train.dtype=bf16")
    found = gather(pool.run(2, with_overlay, bitsandbytes, train, overrides, 4))
    plain = gather(pool.run(2, train, (*overrides, "optimizer.name=adamw"), 4))
    for ours, theirs in zip(found.losses, plain.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert found.losses[:2] == plain.losses[:2] and found.losses[3] != plain.losses[3]  # the first rate is 0


@pytest.mark.slow
def test_moments_in_8_bits_are_saved_to_a_rounding(pool: Pool, bitsandbytes: str, tmp_path: Path) -> None:
    """On another layout other numbers share a scale, so they are rounded anew; on the same one first moments are, where
    the largest of a block is negative."""

    def at(layout: tuple[str, ...], updates: int, load: Path | None, save: Path | None) -> Seen:
        keys = (*EIGHT_BITS, *layout)
        return joined(pool.run(processes(layout), with_overlay, bitsandbytes, travel, keys, updates, load, save))

    two = (f"{ZERO}=2", "parallel.data=2", "train.dtype=bf16")
    saved = at(two, 3, None, tmp_path)
    for layout in (two, (f"{ZERO}=0",), (f"{ZERO}=1", "parallel.data=2")):
        moments, _, steps = at(layout, 0, tmp_path, None)
        assert steps == saved[2] and moments.keys() == saved[0].keys()
        for name, one in moments.items():
            assert (one - saved[0][name]).abs().max() <= 0.02 * saved[0][name].abs().max(), name
            assert layout != two or not name.startswith("exp_avg_sq") or torch.equal(one, saved[0][name])
