"""ZeRO-Offload: the optimizer's state in the host's memory, and the same numbers as without.

At ZeRO 1 and 2 nothing is reordered: the same bits as torch's fused AdamW on what is not offloaded. At ZeRO 3 DeepSpeed
takes the norm of offloaded gradients tensor by tensor, so it clips by another rounding of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import Tamper, Trained, load_config, open_engine, train
from tiers import slow

from lptransformer.config.schema import Config
from lptransformer.engine.deepspeed_stage import TrainedStage
from lptransformer.errors import ConfigError
from lptransformer.training import build, this_host
from lptransformer.training.this_host import missing_build_tools

ZERO = "deepspeed.zero_optimization"
OFFLOADED = f"{ZERO}.offload_optimizer={{device: cpu}}"
OWN = "deepspeed.zero_force_ds_cpu_optimizer=true"
BF16 = "train.dtype=bf16"
CASES: dict[str, tuple[str, ...]] = {
    "2 replicas, ZeRO 2": ("parallel.data=2", f"{ZERO}.stage=2"),
    "2 replicas, ZeRO 1, frozen": ("parallel.data=2", f"{ZERO}.stage=1", "train.freeze=['*.mlp.*']"),
    "hybrid, ZeRO 1, bf16": ("parallel.pipeline=2", f"{ZERO}.stage=1", "objective.backprop_every=2", BF16),
    "2 replicas, ZeRO 2, bf16": ("parallel.data=2", f"{ZERO}.stage=2", "head.token_fraction=0.25", BF16),
    "delayed, 2 ranks, ZeRO 2": ("parallel.pipeline=2", f"{ZERO}.stage=2", "objective.name=delayed"),
    "gradients added in bf16": (f"{ZERO}.stage=2", "deepspeed.data_types.grad_accum_dtype=bf16", BF16),
    "2 replicas, ZeRO 3": ("parallel.data=2", f"{ZERO}.stage=3"),
    "2 ranks, ZeRO 3, weights too": ("parallel.pipeline=2", f"{ZERO}.stage=3", f"{ZERO}.offload_param.device=cpu"),
}
QUICK = "2 replicas, ZeRO 2"
ZERO_3 = 1e-6  # relative, of losses and norms: seen 1e-7
OF_KERNELS = 1e-5  # relative, of DeepSpeed's kernel beside torch's: seen 3e-7


def trained(overrides: Sequence[str], offloaded: bool) -> Trained:
    """Four updates, of which the second one has a gradient that is not finite; with a fused AdamW either way."""
    skipped = Tamper(1, "infinite loss", updates=(2,), micro_batches=(1,))
    with contextlib.ExitStack() as stack:
        if offloaded:
            overrides = (*overrides, OFFLOADED)
        else:
            overrides = [one for one in overrides if "offload_param" not in one]
            plain = torch.optim.AdamW
            stack.callback(setattr, torch.optim, "AdamW", plain)
            fused = lambda *args, **options: plain(*args, **{**options, "fused": True})  # noqa: E731
            torch.optim.AdamW = fused  # type: ignore[assignment,misc]
        return train(overrides, 4, tamper=skipped)


def processes(overrides: Sequence[str]) -> int:
    return 1 + any(one in ("parallel.data=2", "parallel.pipeline=2") for one in overrides)


def compare(one: Trained, other: Trained, within: float) -> None:
    assert one.reports.keys() == other.reports.keys()
    for stage, reports in one.reports.items():
        for report, its in zip(reports, other.reports[stage], strict=True):
            assert report.skipped == its.skipped
            if not report.skipped:
                assert report.grad_norm == pytest.approx(its.grad_norm, rel=within, abs=0)
                assert report.loss_sum is its.loss_sum or report.loss_sum == pytest.approx(its.loss_sum, rel=within)
        for name, weight in one.weights[stage].items():
            assert torch.allclose(weight, other.weights[stage][name], rtol=0, atol=1e3 * within), name


@pytest.mark.parametrize("case", [case if case == QUICK else slow(case) for case in CASES])
def test_losses_norms_and_weights_are_those_without(pool: Pool, case: str) -> None:
    overrides = CASES[case]
    many, within = processes(overrides), ZERO_3 if f"{ZERO}.stage=3" in overrides else 0.0
    plain, offloaded = (pool.run(many, trained, overrides, how) for how in (False, True))
    for one, other in zip(offloaded, plain, strict=True):
        compare(one, other, within)
        assert [report.skipped for report in one.reports.get(1, ())] in ([], [False, True, False, False])


def resumed(overrides: Sequence[str], folder: Path) -> list[Any]:
    """Four updates; two and a save; two after it: the weights of the first and of the last, and what was offloaded."""
    whole, _ = train(overrides, 4), train(overrides, 2, save=folder)
    engine = open_engine(overrides, resumed=folder)
    engine.load_checkpoint(folder)
    for _ in range(2):
        engine.train_batch()
    found = [(whole.weights[index], stage.weights(), on_host(stage)) for index, stage in engine.local.items()]
    engine.close()
    return found


def on_host(stage: TrainedStage) -> tuple[str, bool]:
    """Its optimizer's class, and whether DeepSpeed offloads it."""
    zero = stage.engine.optimizer
    return type(stage.optimizer).__name__, zero.offload_optimizer if stage.zero_stage == 3 else zero.cpu_offload


@pytest.mark.parametrize("zero", [2, slow(1), slow(3)])
def test_a_resumed_run_has_the_same_bits(pool: Pool, tmp_path: Path, zero: int) -> None:
    for whole, again, how in pool.run(1, resumed, (f"{ZERO}.stage={zero}", OFFLOADED), tmp_path / "run")[0]:
        assert how == ("AdamW", True)
        assert all(torch.equal(weight, again[name]) for name, weight in whole.items())


# ------------------------------------------------------------------------------------------- whose optimizer it is


class Alone:
    """The world of one process."""

    def decided_by_the_first(self, key: str, decide: Any) -> str:
        return decide()

    def starting(self, word: str) -> Any:
        return contextlib.nullcontext()


def chosen(monkeypatch: pytest.MonkeyPatch, missing: list[str], *overrides: str) -> Config:
    for module in (build, this_host):
        monkeypatch.setattr(module, "missing_build_tools", lambda _: missing)
    return build.with_cpu_optimizer(load_config([f"{ZERO}.stage=2", *overrides]), Alone())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "missing", "own"),
    [(None, [], True), (None, ["ninja"], False), ("false", [], False), ("false", ["ninja"], False)],
)
def test_a_start_says_whose_optimizer_steps(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str | None,
    missing: list[str],
    own: bool,
) -> None:
    key = OWN.partition("=")[0]
    config = chosen(monkeypatch, missing, OFFLOADED, *([f"{key}={given}"] if given else []))
    assert config.value(key) is own, "the run folder keeps it"
    said = capsys.readouterr().out
    assert ("DeepSpeedCPUAdam (" in said, "torch's fused AdamW" in said) == (own, not own)
    assert ("ninja not found" in said) == bool(missing)


def test_where_nothing_is_offloaded_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(monkeypatch, []).value(OWN.partition("=")[0]) is None


def test_a_host_without_a_compiler_is_refused_where_it_must_be_deepspeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"ds_cpu_optimizer = True .*ninja not found here: .*or give false"):
        chosen(monkeypatch, ["ninja"], OFFLOADED, OWN)


@pytest.mark.slow
def test_deepspeed_s_own_optimizer_follows_torch_s(pool: Pool, tmp_path: Path) -> None:
    if missing := missing_build_tools(["deepspeed.zero_force_ds_cpu_optimizer"]):
        pytest.skip(f"DeepSpeedCPUAdam is built here, and {' and '.join(missing)} not found")
    overrides = (f"{ZERO}.stage=2", OFFLOADED, "train.grad_clip=0")
    (of_torch,) = pool.run(1, train, overrides, 4)
    (own,) = pool.run(1, train, (*overrides, OWN), 4, timeout=600)
    compare(own, of_torch, OF_KERNELS)
    for whole, again, how in pool.run(1, resumed, (*overrides, OWN), tmp_path / "run")[0]:
        assert how == ("DeepSpeedCPUAdam", True)
        assert all(torch.equal(weight, again[name]) for name, weight in whole.items())
