"""The programs for whoever has a GPU next, on a CPU: benchmarks/gpu_check.py and benchmarks/fake_cuda."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "fake_cuda"))

import gpu_check  # noqa: E402
import guard  # noqa: E402


def ran(script: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


# ----------------------------------------------------------------------------------------- what gpu_check decides


def test_a_loss_that_is_off_is_found_and_so_is_one_that_is_missing() -> None:
    there = [[[2.0, 1.0], [3.0, 1.0]], [[1.0, 4.0], [2.0, 1.0]]]
    here = [[[2.0, 1.0], [3.0, 1.0]], [[1.0, 4.4], [2.002, 1.0]]]
    assert gpu_check.differences(here, there) == pytest.approx((1e-3, 0.1))
    assert gpu_check.differences(there, there) == (0.0, 0.0)
    assert gpu_check.differences(there[:1], there)[0] == float("inf")
    assert gpu_check.differences([[[float("nan"), 1.0]]], [[[2.0, 1.0]]])[0] == float("inf")


@pytest.mark.parametrize(("off", "right"), [(1e-5, True), (1e-4, False)])
def test_every_case_has_the_tolerance_of_its_dtype(off: float, right: bool) -> None:
    def sides(name: str) -> dict[str, Any]:
        rows = {"reference": [[[2.0, 1.0]]], "device": [[[2.0 * (1 + off), 1.0]]]}
        return {"losses": {name: {side: {"rows": value} for side, value in rows.items()}}}

    assert gpu_check.compared("chunked 2", sides("chunked 2"))[1] == right
    assert gpu_check.compared("bf16, ZeRO 1", sides("bf16, ZeRO 1"))[1]


def test_what_failed_or_was_not_run_is_not_right() -> None:
    rows = {"rows": [[[2.0, 1.0]]]}
    assert gpu_check.compared("gpt2", {"losses": {"gpt2": {"reference": rows}}}) == ("GPU: not run", False)
    failed = {"losses": {"gpt2": {"reference": rows, "device": {"error": "out of memory"}}}}
    assert gpu_check.compared("gpt2", failed) == ("GPU: out of memory", False)
    text, good = gpu_check.tables(failed, {"losses": ["gpt2"]})
    assert not good and "out of memory | FAIL" in text


def test_kernels_of_two_streams_count_once() -> None:
    assert gpu_check.covered([(0.0, 4.0), (2.0, 3.0), (3.0, 6.0), (8.0, 9.0)]) == 7.0


def test_the_flops_of_a_token_are_those_of_its_weights_and_of_attention() -> None:
    size = gpu_check.TINY
    matrices = 4 * (4 * 64 * 64 + 3 * 64 * 128) + 300 * 64
    assert size.flops_per_token(1) == 6 * matrices + 6 * 4 * 64 * 64
    assert size.flops_per_token(3) - size.flops_per_token(1) == 2 * 6 * 300 * 64


def test_nothing_is_missing_here_and_what_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_check.missing() == []
    real = gpu_check.importlib.metadata.version

    def version(name: str) -> str:
        if name == "hjson":  # DeepSpeed's, not named by the project
            raise gpu_check.importlib.metadata.PackageNotFoundError(name)
        return "5.9.1" if name == "transformers" else real(name)

    monkeypatch.setattr(gpu_check.importlib.metadata, "version", version)
    hjson, transformers = gpu_check.missing()
    assert hjson.startswith("hjson (needed by deepspeed") and transformers.startswith("transformers 5.9.1 is too old")


@pytest.mark.parametrize("script", ["gpu_check.py", "fake_cuda/one_rank.py", "fake_cuda/nccl_channel.py"])
def test_help_is_there(script: str) -> None:
    assert "usage:" in ran(script, "--help").stdout


# ------------------------------------------------------------------------------------------------ gpu_check, run


@pytest.mark.slow
def test_all_of_gpu_check_runs_on_a_cpu(tmp_path: Path) -> None:
    said = ran("gpu_check.py", "--tiny", "--peak=1e11", "--out", str(tmp_path)).stdout
    results = json.loads((tmp_path / "gpu_check.json").read_text())
    assert set(results["losses"]) == set(gpu_check.LOSSES) and set(results["speed"]) == set(gpu_check.SPEED)
    assert all(name in said for name in (*gpu_check.LOSSES, *gpu_check.SPEED)) and "FAIL" not in said
    for name in gpu_check.LOSSES:  # on the CPU of one machine both sides are the same
        case = gpu_check.LOSSES[name]
        here = results["losses"][name]["device"]["rows"]
        assert here == results["losses"][case.reference(name)]["reference"]["rows"]
    for row in (sides["device"] for sides in results["speed"].values()):
        assert row["tokens/s"] > 0 and 0 < row["MFU"] <= row["with heads"] and 0 < row["busy"] <= 1.001


@pytest.mark.slow
def test_a_case_runs_alone_against_a_reference_from_elsewhere_and_a_wrong_loss_fails(tmp_path: Path) -> None:
    only = ("--tiny", "--part", "losses", "--case", "chunked 2")
    ran("gpu_check.py", *only, "--side", "reference", "--out", str(tmp_path / "a"))
    file = tmp_path / "a" / "gpu_check.json"
    results = json.loads(file.read_text())
    assert list(results["losses"]) == ["chunked 2"] and "device" not in results["losses"]["chunked 2"]
    results["losses"]["chunked 2"]["reference"]["rows"][1][0][0] *= 1.001
    file.write_text(json.dumps(results))
    done = ran("gpu_check.py", *only, "--reference", str(file), "--out", str(tmp_path / "b"), check=False)
    assert done.returncode == 1 and "losses, reference" not in done.stdout
    assert "| chunked 2 | 2e-05 | loss 1.0e-03, gradient norm 0.0e+00 | FAIL |" in done.stdout


@pytest.mark.slow
def test_a_case_that_hangs_is_noted(tmp_path: Path) -> None:
    only = ("--tiny", "--part", "losses", "--case", "gpt2", "--case-seconds=0.5")
    done = ran("gpu_check.py", *only, "--out", str(tmp_path), check=False)
    assert done.returncode == 1 and "gpt2: took longer than 0 s" in done.stdout


# ------------------------------------------------------------------------------------------------ fake_cuda


@pytest.fixture(scope="module")
def compiled() -> None:
    """The stand-in for CUDA's device guard."""
    if why := guard.hindrance():
        pytest.skip(why)
    guard.built()


def events(tmp_path: Path, *arguments: str, rank: int = 0) -> list[dict[str, Any]]:
    file = tmp_path / "events.json"
    ran("fake_cuda/one_rank.py", "--rank", str(rank), "--json", str(file), *arguments)
    found = json.loads(file.read_text())
    assert found["broken"] is None
    return found["events"]


def number(rows: list[dict[str, Any]], kind: str, what: str, where: str = "") -> int:
    return sum(r["count"] for r in rows if r["kind"] == kind and what in r["what"] and where in r["where"])


ONE_COPY = "engine/executor.py"  # of norms and losses, when the last backward pass is queued
WITHOUT_WAITING = {
    "fp32": "--train.tf32=true --head.token_fraction=0.25",
    "replicas, ZeRO 1, above": "--parallel.pipeline=2 --parallel.data=2 --train.dtype=bf16 "
    "--deepspeed.zero_optimization.stage=1 --objective.name=overlapping",
    "ZeRO 2, a head that is followed": "--parallel.pipeline=2 --train.dtype=bf16 --head.kind=shared",
    "delayed, recomputing": "--parallel.pipeline=2 --objective.name=delayed --train.activation_checkpointing=blocks",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", WITHOUT_WAITING)
def test_nobody_waits_for_a_gpu_but_for_one_copy_of_an_update(compiled: None, tmp_path: Path, case: str) -> None:
    """On the main thread, at ZeRO 0 to 2, with no devices mixed."""
    rows = events(tmp_path, *WITHOUT_WAITING[case].split(), rank=1 if "pipeline" in WITHOUT_WAITING[case] else 0)
    assert number(rows, "sync", "") == 0
    assert number(rows, "copy", "cuda to cpu, blocking", ONE_COPY) == number(rows, "copy", ", blocking") == 1
    assert number(rows, "collective", "over gloo of a cuda tensor") == 0


@pytest.mark.slow
def test_at_zero_3_only_deepspeed_waits_for_a_gpu(compiled: None, tmp_path: Path) -> None:
    rows = events(tmp_path, "--train.dtype=bf16", "--deepspeed.zero_optimization.stage=3")
    waits = [row for row in rows if row["kind"] == "sync" or row["what"].endswith(", blocking")]
    ours = [row for row in waits if row["where"].startswith("lptransformer")]
    assert [(row["count"], row["where"].partition(":")[0]) for row in ours] == [(1, f"lptransformer/{ONE_COPY}")]


@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_of_an_offloaded_optimizer_only_deepspeed_waits_for_a_gpu(compiled: None, tmp_path: Path, zero: int) -> None:
    """No devices are mixed. At ZeRO 2 it waits twice for every tensor of weights, and once for every group of them."""
    stage = "--deepspeed.zero_optimization"
    offloaded = (f"{stage}.stage={zero}", f"{stage}.offload_optimizer.device=cpu")
    rows = events(tmp_path, "--train.dtype=bf16", *offloaded, "--deepspeed.zero_force_ds_cpu_optimizer=false")
    waits = [row for row in rows if row["kind"] == "sync" or row["what"].endswith(", blocking")]
    ours = [row for row in waits if row["where"].startswith("lptransformer")]
    assert [(row["count"], row["where"].partition(":")[0]) for row in ours] == [(1, f"lptransformer/{ONE_COPY}")]
    tensors = number(rows, "copy", "cuda to cpu, not blocking", "offload" if zero == 3 else "copy_grads_in_partition")
    assert tensors > 0
    if zero == 2:
        groups = 4  # decaying weights and others, of two stages
        assert number(rows, "sync", "of a tensor on the device") == 2 * tensors + groups


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["gloo", "nccl"])
def test_a_fake_gpu_shows_what_is_sent_through_which_memory(compiled: None, tmp_path: Path, channel: str) -> None:
    overrides = ["--parallel.pipeline=2", f"--parallel.channel={channel}", "--train.dtype=bf16"]
    rows = events(tmp_path, *overrides, "--objective.name=overlapping", rank=1)
    header, tensor = 64, 2 * 32 * 32 * 2  # b x T x H in bf16
    sizes = {"gloo": {"gloo of a cpu": header + tensor}, "nccl": {"gloo of a cpu": header, "nccl of a cuda": tensor}}
    for what, size in sizes[channel].items():
        sent = [r for r in rows if r["kind"] == "message" and r["what"].startswith(f"send over {what}")]
        assert [(r["count"], r["bytes"]) for r in sent] == ([(2, 2 * size)] if channel == "nccl" else [])
        if channel == "nccl":  # over gloo a thread sends what has been copied, and posts what has been read
            assert number(rows, "message", f"receive over {what}") == 2
    assert number(rows, "copy", "cuda to cpu, not blocking", "p2p") == (2 if channel == "gloo" else 0)


@pytest.mark.slow
def test_two_devices_that_meet_are_told(compiled: None, tmp_path: Path) -> None:
    code = """
import sys
sys.path.insert(0, "benchmarks/fake_cuda")
import device, torch
with device.fake_gpu():
    device.LOG.recording = True
    there = torch.ones(3, 3, device="cuda", requires_grad=True)
    (there @ there).sum().backward()
    assert there.grad.device == device.DEVICE and there.grad.sum().item() == 1.0
    torch.ones(3).to("cuda", non_blocking=True)
    print([(row["kind"], row["what"]) for row in device.LOG.rows()])
    there + torch.ones(3)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == (
        "[('sync', 'item of a tensor on the device'), ('copy', 'cpu to cuda, not blocking')]"
    ), done.stderr
    assert done.returncode != 0 and "on the same device" in done.stderr


NCCL_RUNS = {
    "chunked": "",
    "overlapping": "--objective.name=overlapping --checkpoint.every=2",
    "1F1B of three ranks": "--processes 3 --parallel.pipeline=3 --objective.name=backprop --model.num_layers=6",
    "delayed": "--processes 3 --parallel.pipeline=3 --objective.name=delayed --model.num_layers=6",
    "hybrid": "--objective.backprop_every=2 --parallel.in_flight=1",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", NCCL_RUNS)
def test_a_run_ends_under_nccl_s_waiting_rules(case: str) -> None:
    """A communicator's first call waits for its peer, who synchronises the device waits for all that is posted, and
    operations follow one another; with an evaluation in the middle. No receive is left."""
    done = ran("fake_cuda/nccl_channel.py", *NCCL_RUNS[case].split(), check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count("posted and never used: 0") == (3 if "3" in NCCL_RUNS[case] else 2)


@pytest.mark.slow
def test_receives_that_are_always_posted_hang_there() -> None:
    done = ran("fake_cuda/nccl_channel.py", "--early", "--patience=5", check=False)
    assert done.returncode == 3 and "hang: process" in done.stdout
