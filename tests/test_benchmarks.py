"""The benchmark scripts that measure the engine alone run, small: what they check themselves, and the tables they make.

(throughput.py and quality_trend.py have tests of their own.)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


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


@pytest.mark.slow
def test_a_machine_is_measured_as_an_entry_of_the_table_of_devices() -> None:
    sizes = ["--data.train=none", "--data.vocab_size=300", "--model.hidden_size=32", "--data.sequence_length=16"]
    said = run_benchmark("calibrate.py", str(ROOT / "configs" / "quickstart.yaml"), *sizes)
    (entry,) = yaml.safe_load(said).values()
    assert set(entry) == {"name", "flops", "achievable", "memory_bytes", "memory_bandwidth", "intra_link"}
    assert float(entry["flops"]["fp32"]) > 1e6 and float(entry["memory_bandwidth"]) > 1e6


@pytest.mark.slow
def test_the_profile_of_a_step_accounts_for_all_of_its_time(tmp_path: Path) -> None:
    run_benchmark("step_profile.py", "--updates=2", "--out", str(tmp_path))
    lines = (tmp_path / "step_profile.md").read_text().splitlines()
    total = next(line for line in lines if line.startswith("| an update, and how much of it is above"))
    shares = [float(cell.strip().rstrip("%")) for cell in total.split("|") if cell.strip().endswith("%")]
    assert len(shares) == 3 and min(shares) >= 95
