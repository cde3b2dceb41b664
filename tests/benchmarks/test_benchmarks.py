"""The benchmark scripts that measure the engine alone run, small: what they check themselves, and the tables they make.

(throughput.py and quality_trend.py have tests of their own.)
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import same_bits  # noqa: E402


def run_benchmark(script: str, *flags: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *flags]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_one_process_measures_updates_whose_losses_are_the_plain_loop_s(tmp_path: Path) -> None:
    run_benchmark(
        "one_process.py", "--repeats=2", "--sizes", "small", "--micro-batches", "1", "--out", str(tmp_path)
    )  # fails where a loss differs from the plain loop's
    rows = json.loads((tmp_path / "one_process.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["backprop", "chunked 2", "chunked 4"]
    assert all(len(row["plain"]) == len(row["engine"]) == 2 for row in rows)
    assert (tmp_path / "one_process.md").read_text().count("| small | 1 |") == 3


@pytest.mark.full  # seven processes
def test_fine_tuning_in_one_process_is_measured_beside_plain_transformers(tmp_path: Path) -> None:
    sizes: dict[str, int] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "vocab_size": 64}
    config = LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    flags = ("--pretrained", str(tmp_path / "model"), "--repeats=1", "--shapes", "1x16", "--out", str(tmp_path))
    run_benchmark("one_process.py", *flags)
    plain, *rows = json.loads((tmp_path / "one_process_pretrained.json").read_text())["rows"]
    assert [plain["contender"], *(row["contender"] for row in rows)] == [
        "plain",
        "backprop, tied",
        "backprop",
        "chunked 2",
    ]
    readout = 4 * 4 * 32 * 64  # weight, gradient and two moments
    tied, untied = rows[0]["peak_bytes"], rows[1]["peak_bytes"]
    assert untied - tied == pytest.approx(readout, rel=0.3) and all(len(row["engine"]) == 1 for row in rows)
    assert (tmp_path / "one_process.md").read_text().count("| 1 x 16 |") == 4


@pytest.mark.slow
def test_a_machine_is_measured_as_an_entry_of_the_table_of_devices() -> None:
    sizes = ["--data.train=none", "--data.vocab_size=300", "--model.hidden_size=32", "--data.sequence_length=16"]
    said = run_benchmark("calibrate.py", str(ROOT / "configs" / "quickstart.yaml"), *sizes)
    (entry,) = yaml.safe_load(said).values()
    assert set(entry) == {"name", "flops", "achievable", "memory_bytes", "memory_bandwidth", "intra_link"}
    assert float(entry["flops"]["fp32"]) > 1e6 and float(entry["memory_bandwidth"]) > 1e6


@pytest.mark.full
def test_the_profile_of_a_step_accounts_for_all_of_its_time(tmp_path: Path) -> None:
    run_benchmark("step_profile.py", "--updates=2", "--out", str(tmp_path))
    lines = (tmp_path / "step_profile.md").read_text().splitlines()
    total = next(line for line in lines if line.startswith("| an update, and how much of it is above"))
    shares = [float(cell.strip().rstrip("%")) for cell in total.split("|") if cell.strip().endswith("%")]
    assert len(shares) == 3 and min(shares) >= 95


@pytest.mark.slow
def test_a_checkout_trains_the_same_bits_as_itself() -> None:
    printed = run_benchmark(
        "same_bits.py", str(ROOT), str(ROOT), "--only", "^chunked, border.codec=int8, 1 rank, ZeRO 0$"
    )
    assert printed.startswith("chunked, border.codec=int8, 1 rank, ZeRO 0: equal (")
    assert printed.splitlines()[-1] == "1 of 1 equal"


def written_run(folder: Path, grad_norm: float = 0.25, weight: float = 1.0) -> Path:
    """What same_bits.py reads of a run folder. The times are different in every one."""
    stage = {
        "stage": 0,
        "last_block": 1,
        "loss": 1.5,
        "grad_norm": grad_norm,
        "skipped": False,
        "idle_share": os.times()[4],
    }
    row = {"update": 1, "tokens": 8, "seconds": os.times()[4], "learning_rate": 0.1, "stages": [stage]}
    checkpoint = folder / "checkpoints" / "step-00000001" / "stage-0"
    checkpoint.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    weights = torch.tensor([weight, float("nan")], dtype=torch.bfloat16)
    save_file({"body.norm": weights, "step": torch.tensor(1)}, checkpoint / "weights.safetensors")
    return folder


def test_same_bits_names_the_first_thing_that_differs(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run")
    assert same_bits.run_difference(run, written_run(tmp_path / "again")) is None
    other = written_run(tmp_path / "norm", grad_norm=0.25 + 2**-54)
    assert same_bits.run_difference(run, other) == (
        "update 1, stage 0: grad_norm is 0.25 with OLD, 0.25000000000000006 with NEW"
    )
    other = written_run(tmp_path / "weight", weight=1 + 2**-7)
    assert same_bits.run_difference(run, other) == (
        "stage-0/weights.safetensors: body.norm: 1 of 2 elements differ, by up to 7.8e-03"
    )


def test_same_bits_gives_a_checkout_the_names_that_it_knows() -> None:
    checkout = same_bits.Checkout.__new__(same_bits.Checkout)
    checkout.keys = {"train.border_dtype", "loss.chunk_tokens"}
    flags = ["border.codec=int8", "loss.chunk_tokens=16", "deepspeed.zero_optimization.stage=2"]
    assert checkout.flags(flags) == [
        "--train.border_dtype=int8",
        "--loss.chunk_tokens=16",
        "--deepspeed.zero_optimization.stage=2",
    ]


SCRIPTS = sorted(path for path in (ROOT / "benchmarks").rglob("*.py") if '__name__ == "__main__"' in path.read_text())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT / "benchmarks")))
def test_every_script_answers_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: what they import takes seconds."""
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.setattr(sys, "path", [str(script.parent), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert not ended.value.code and "usage:" in capsys.readouterr().out
