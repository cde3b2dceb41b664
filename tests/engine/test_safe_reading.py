"""No resume executes the pickles in a checkpoint's folder; all else that is read is in tests/test_no_code_is_run.py.

A planted pickle makes a folder, the marker, when it is executed. What it is planted in is a good checkpoint otherwise:
an engine that executed it would train on.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import older_checkpoints
import pytest
import torch
from baseline_jobs import BASELINE, open_baseline
from baseline_jobs import train as train_baseline
from distributed import Pool
from engine_jobs import load_config, open_engine
from engine_jobs import train as train_locally
from planted import Planted
from saved_runs import remark
from test_engine import equal
from tiers import slow

from lptransformer.errors import RunError
from lptransformer.run_folder import checkpoint


def plant(file: Path, marker: Path) -> None:
    content = torch.load(file, weights_only=False)
    torch.save({**content, "planted": Planted(marker)}, file)


def save(overrides: tuple[str, ...], folder: Path) -> None:
    if BASELINE[0] in overrides:
        train_baseline(overrides, 1, save=folder)
    else:
        older_checkpoints.train_and_save(overrides, 1, folder)


def resume(overrides: tuple[str, ...], folder: Path) -> None:
    (open_baseline if BASELINE[0] in overrides else open_engine)(overrides).load_checkpoint(folder)


ZERO = "deepspeed.zero_optimization.stage={}".format
STAGES = ("objective.chunks=2",)
CASES: dict[str, tuple[Sequence[str], str]] = {
    "ZeRO 0": (STAGES, "stage-1/deepspeed/state/mp_rank_00_model_states.pt"),
    "ZeRO 1, model": ((*STAGES, ZERO(1)), "stage-0/deepspeed/state/mp_rank_00_model_states.pt"),
    "ZeRO 1, optimizer": ((*STAGES, ZERO(1)), "stage-1/deepspeed/state/*optim_states.pt"),
    "ZeRO 2, bf16": ((*STAGES, ZERO(2), "train.dtype=bf16"), "stage-1/deepspeed/state/*optim_states.pt"),
    "ZeRO 3": ((*STAGES, ZERO(3)), "stage-0/deepspeed/state/*optim_states.pt"),
    "pipeline engine, layer": (BASELINE, "deepspeed/state/layer_00-model_states.pt"),
    "pipeline engine, model": (BASELINE, "deepspeed/state/mp_rank_00_model_states.pt"),
    "pipeline engine, ZeRO 1": ((*BASELINE, ZERO(1)), "deepspeed/state/*optim_states.pt"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_resume_executes_no_pickle(pool: Pool, tmp_path: Path, case: str) -> None:
    overrides, pattern = CASES[case]
    assert load_config(tuple(overrides)).parallel.pipeline == 1
    pool.run(1, save, tuple(overrides), tmp_path / "run")
    pool.run(1, resume, tuple(overrides), tmp_path / "run")
    (file,) = (tmp_path / "run/checkpoints/step-00000001").glob(pattern)
    plant(file, tmp_path / "marker")
    if BASELINE[0] in overrides:
        remark(tmp_path / "run/checkpoints/step-00000001")
    with pytest.raises(RunError, match="is refused: .*mkdir.* execute code") as caught:
        pool.run(1, resume, tuple(overrides), tmp_path / "run")
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("what", [b"", b"PK\x03\x04 no archive", b"\x80\x02}q\x00.", None])
def test_a_damaged_file_is_named(pool: Pool, tmp_path: Path, what: bytes | None) -> None:
    """Empty, no archive, no pickle of torch's, cut off in the middle."""
    pool.run(1, save, STAGES, tmp_path)
    file = tmp_path / "checkpoints/step-00000001" / CASES["ZeRO 0"][1]
    file.write_bytes(file.read_bytes()[:2000] if what is None else what)
    with pytest.raises(RunError, match="choose another checkpoint") as caught:
        pool.run(1, resume, STAGES, tmp_path)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


RESUMES: dict[str, tuple[str, ...]] = {
    "ZeRO 0, copies on their way": ("objective.chunks=4", "head.kind=shared", "parallel.pipeline=2"),
    "delayed": ("objective.name=delayed", "objective.chunks=2", "parallel.pipeline=2"),
    "ZeRO 2, bf16": (*STAGES, ZERO(2), "train.dtype=bf16", "parallel.data=2"),
    "ZeRO 3": (*STAGES, ZERO(3), "parallel.data=2"),
    "frozen": ("objective.name=last", "objective.trained_blocks=4", "objective.chunks=null"),
}


@pytest.mark.parametrize("case", [case if case == "ZeRO 3" else slow(case) for case in RESUMES])
def test_checkpoints_of_the_older_format_are_resumed(pool: Pool, tmp_path: Path, case: str) -> None:
    """With the bits of a run that was not interrupted; then it saves in the format of today."""
    overrides = tuple(one for one in RESUMES[case] if not one.endswith("=null"))
    processes = 2 if len(overrides) > len([o for o in overrides if not o.startswith("parallel.")]) else 1
    whole = pool.run(processes, train_locally, overrides, 4)
    pool.run(processes, older_checkpoints.train_and_save, overrides, 2, tmp_path)
    assert checkpoint.complete_updates(tmp_path) == [2]
    resumed = pool.run(processes, partial(train_locally, load=tmp_path, save=tmp_path), overrides, 2)
    for one, other in zip(whole, resumed, strict=True):
        assert all(equal(one.weights[stage], other.weights[stage]) for stage in one.weights)
    assert checkpoint.complete_updates(tmp_path) == [2, 4]
