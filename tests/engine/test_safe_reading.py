"""No resume executes the pickles in a checkpoint's folder; all else that is read is in tests/test_no_code_is_run.py.

A planted pickle makes a folder, the marker, when it is executed. What it is planted in is a good checkpoint otherwise:
an engine that executed it would train on.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from baseline_jobs import BASELINE, open_baseline
from baseline_jobs import train as train_baseline
from distributed import Pool
from engine_jobs import load_config, open_engine
from engine_jobs import train as train_locally
from planted import Planted
from small_run import CONFIG, TEXT
from tiers import full

from lptransformer.errors import RunError


def plant(file: Path, marker: Path) -> None:
    content = torch.load(file, weights_only=False)
    torch.save({**content, "planted": Planted(marker)}, file)


def save(overrides: tuple[str, ...], folder: Path) -> None:
    (train_baseline if BASELINE[0] in overrides else train_locally)(overrides, 1, save=folder)


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


@pytest.mark.slow  # starts programs
@pytest.mark.parametrize("stage", [1, full(0)])
def test_the_command_line_refuses_in_one_line(tmp_path: Path, stage: int) -> None:
    """Two pipeline ranks, and the pickle in the stage of either."""
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "parallel": {"pipeline": 2}}))
    command = [sys.executable, "-m", "lptransformer", "train", "c.yaml"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=300)
    (file,) = (tmp_path / "run").glob(f"checkpoints/*/stage-{stage}/deepspeed/state/mp_rank_00_model_states.pt")
    plant(file, tmp_path / "marker")
    done = subprocess.run(
        [*command, "--resume", "--train.steps=4"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "marker").exists()
    said = [line for line in done.stderr.splitlines() if line.startswith("lptransformer: ")]
    assert len(said) == 1 and str(file.relative_to(tmp_path)) in said[0]
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
