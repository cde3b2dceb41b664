"""The programs for whoever has a GPU next, on a CPU: benchmarks/gpu_check.py and benchmarks/fake_cuda."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from overlays import overlay
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "benchmarks" / "fake_cuda"))

import gpu_check  # noqa: E402
import guard  # noqa: E402


def ran(
    script: str, *arguments: str, check: bool = True, packages: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """A benchmark in a process of its own, that finds these packages too."""
    command = [sys.executable, str(ROOT / "benchmarks" / script), *arguments]
    found_in = os.pathsep.join(str(folder) for folder in (ROOT, packages) if folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found_in}
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


def test_what_cannot_run_here_is_left_out_and_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = gpu_check.Worker(gpu_check.parser().parse_args(["--worker", "device"]))
    assert worker.absent("") == worker.absent(gpu_check.GPU) == ""
    assert worker.absent("flash_attn") == "flash_attn is not installed"
    assert gpu_check.Worker(gpu_check.parser().parse_args(["--worker", "reference"])).absent(gpu_check.GPU)
    assert gpu_check.compared("TF32", {"losses": {"TF32": {"device": {"absent": "why"}}}}) == ("left out: why", True)


def test_what_failed_or_was_not_run_is_not_right() -> None:
    rows = {"rows": [[[2.0, 1.0]]]}
    assert gpu_check.compared("gpt2", {"losses": {"gpt2": {"reference": rows}}}) == ("GPU: not run", False)
    failed = {"losses": {"gpt2": {"reference": rows, "device": {"error": "out of memory"}}}}
    assert gpu_check.compared("gpt2", failed) == ("GPU: out of memory", False)
    text, good = gpu_check.tables(failed, {"losses": ["gpt2"]})
    assert not good and "out of memory | FAIL" in text


def test_losses_of_the_tiny_cases_are_not_those_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = tmp_path / gpu_check.FILE, list[list[str]]()
    rows = {"losses": {"gpt2": {"reference": {"rows": [[[2.0, 1.0]]]}}}}
    file.write_text(json.dumps({"tiny": True, **rows}))
    monkeypatch.setattr(gpu_check, "run_side", lambda part, side, names, args: asked.append(names))
    only = ["--side", "reference", "--part", "losses", "--case", "gpt2"]
    assert gpu_check.main([*only, "--tiny", "--out", str(tmp_path)]) == 0 and asked.pop() == []
    assert gpu_check.main([*only, "--out", str(tmp_path / "b"), "--reference", str(file)]) == 2
    assert "its losses are those of --tiny" in capsys.readouterr().out
    assert gpu_check.main([*only, "--out", str(tmp_path)]) == 1 and asked.pop() == ["gpt2"]


@pytest.mark.parametrize(("name", "known"), [("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False)])
def test_the_peak_is_that_of_the_very_gpu(name: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = gpu_check.Worker(gpu_check.parser().parse_args(["--worker", "device"]))
    monkeypatch.setattr(worker, "on_gpu", True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: name)
    assert (worker.peak() is not None) == known


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
    for name, case in gpu_check.LOSSES.items():  # on the CPU of one machine both sides are the same
        here = results["losses"][name]["device"]
        expected = results["losses"][case.reference(name)]["reference"]["rows"]
        if case.needs == gpu_check.FUSED:  # which adds up in another order
            assert gpu_check.differences(here["rows"], expected)[0] <= case.tolerance
        else:
            assert here.get("absent") == "there is no GPU" if case.needs else here["rows"] == expected
    for name, speed in gpu_check.SPEED.items():
        row = results["speed"][name]["device"]
        assert ("absent" in row) == bool(speed.needs)
        if not speed.needs:
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


Rows = list[dict[str, Any]]


def number(rows: Rows, kind: str, what: str, where: str = "") -> int:
    return sum(r["count"] for r in rows if r["kind"] == kind and what in r["what"] and where in r["where"])


ONE_COPY = "engine/executor.py"  # of norms and losses, when the last backward pass is queued
ZERO = "deepspeed.zero_optimization.stage"
PRETRAINED = (
    "model.pretrained=MODEL model.hidden_size=null model.num_layers=null model.num_heads=null train.micro_batch_size=16"
)
OFFLOADED = "deepspeed.zero_optimization.offload_optimizer.device=cpu deepspeed.zero_force_ds_cpu_optimizer=false"
# Every value of every option that reaches the device and runs here, and pairs that share code; not flash and flex
# attention, Liger's loss and moments in 8 bits, whose packages or kernels are not there. Blocks to compile run as they
# are: torch's compiler leaves tensors without values alone. `rank` is the process, by default 0; a run of one process
# evaluates, saves and loads too.
CASES = {
    "fp32": "train.tf32=true head.token_fraction=0.25 optimizer.name=sgd model.family=gpt2 "
    "train.freeze=\"['*.mlp.*']\"",
    "fp32, ZeRO 2": f"{ZERO}=2 loss.fused=torch objective.name=deep_supervision model.attention=eager "
    "train.activation_checkpointing=selective run.trace=[1,1]",
    "replicas, ZeRO 1, above": f"rank=1 parallel.pipeline=2 parallel.data=2 train.dtype=bf16 {ZERO}=1 "
    "objective.name=overlapping objective.overlap=1 objective.first_head=true optimizer.name=muon",
    "replicas, ZeRO 2": "parallel.data=2 train.dtype=bf16 border.codec=int8 loss.fused=chunked",
    "ZeRO 2, a head that is followed": "rank=1 parallel.pipeline=2 train.dtype=bf16 head.kind=shared",
    "delayed, recomputing": "rank=1 parallel.pipeline=2 objective.name=delayed train.dtype=bf16 "
    "train.activation_checkpointing=blocks",
    "delayed, fp32": "objective.name=delayed objective.chunks=2 optimizer.name=muon",
    "greedy, low rank": "objective.name=greedy head.kind=low_rank head.rank=8 train.dtype=bf16 "
    "train.activation_checkpointing='every 2'",
    "hybrid, extra blocks": "rank=1 parallel.pipeline=2 parallel.channel=nccl objective.backprop_every=2 head.blocks=1 "
    "model.attention=sdpa",
    "last": "objective.name=last objective.trained_blocks=2 train.dtype=bf16 model.family=gpt2",
    "rounded borders": "objective.name=greedy border.codec=bf16 train.activation_checkpointing=blocks",
    "backprop, channels of NCCL": "parallel.pipeline=2 parallel.channel=nccl objective.name=backprop train.dtype=bf16 "
    f"{ZERO}=1",
    "averaged blocks": "train.dtype=bf16 head.blocks=1 head.ema_decay=0.9 train.grad_clip=0",
    "fitted heads": f"{PRETRAINED} train.dtype=bf16 train.activation_checkpointing=selective",
    "LoRA, compiled": f"{PRETRAINED} lora.rank=2 train.dtype=bf16 train.compile=true",
    "tied": f"{PRETRAINED} objective.name=backprop model.tie=keep data.isolate_documents=true",
}
WHERE_DEEPSPEED_WAITS = {
    "ZeRO 3": f"{ZERO}=3 train.dtype=bf16 head.blocks=1 train.activation_checkpointing=blocks",
    "ZeRO 3, a head that is followed": f"{ZERO}=3 parallel.data=2 head.kind=shared data.isolate_documents=true",
    "ZeRO 3, fitted heads": f"{ZERO}=3 {PRETRAINED} train.dtype=bf16",
    "ZeRO 2 that overlaps": "parallel.data=2 train.dtype=bf16 deepspeed.zero_optimization.overlap_comm=true",
    "offloaded, ZeRO 1, delayed": f"{ZERO}=1 {OFFLOADED} objective.name=delayed",
    "offloaded, ZeRO 2": f"{ZERO}=2 {OFFLOADED} train.dtype=bf16",
    "offloaded, ZeRO 3": f"{ZERO}=3 {OFFLOADED} train.dtype=bf16",
}


@pytest.fixture(scope="module")
def observed(compiled: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    """The events of every case; those of one update."""
    folder = tmp_path_factory.mktemp("cases")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=300, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    arguments = []
    for case in (CASES | WHERE_DEEPSPEED_WAITS).values():
        arguments.append(
            ["--updates=2", *(f"--{w}" for w in shlex.split(case.replace("MODEL", str(folder / "model"))))]
        )
    (folder / "cases.json").write_text(json.dumps(arguments))
    done = ran(
        "fake_cuda/one_rank.py",
        "--cases",
        str(folder / "cases.json"),
        "--json",
        str(folder / "events.json"),
        check=False,
        packages=overlay("peft", folder / "peft"),
    )
    found = json.loads((folder / "events.json").read_text())
    assert [one["broken"] for one in found] == [None] * len(found), done.stdout + done.stderr[-3000:]
    return {name: one["events"] for name, one in zip(CASES | WHERE_DEEPSPEED_WAITS, found, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nobody_waits_for_a_gpu_but_for_one_copy_of_an_update(observed: dict[str, Rows], case: str) -> None:
    """On the main thread, at ZeRO 0 to 2, with no devices mixed."""
    rows = observed[case]
    assert number(rows, "sync", "") == 0
    assert number(rows, "copy", "cuda to cpu, blocking", ONE_COPY) == number(rows, "copy", ", blocking") == 1
    assert number(rows, "collective", "over gloo of a cuda tensor") == 0


@pytest.mark.slow
@pytest.mark.parametrize("case", WHERE_DEEPSPEED_WAITS)
def test_elsewhere_only_deepspeed_waits_for_a_gpu(observed: dict[str, Rows], case: str) -> None:
    waits = [row for row in observed[case] if row["kind"] == "sync" or row["what"].endswith(", blocking")]
    ours = [row for row in waits if row["where"].startswith("lptransformer")]
    assert [(row["count"], row["where"].partition(":")[0]) for row in ours] == [(1, f"lptransformer/{ONE_COPY}")]


@pytest.mark.slow
def test_at_zero_2_deepspeed_waits_twice_for_every_tensor_that_is_offloaded(observed: dict[str, Rows]) -> None:
    """And once for every group of them."""
    rows, groups = observed["offloaded, ZeRO 2"], 4  # decaying weights and others, of two stages
    tensors = number(rows, "copy", "cuda to cpu, not blocking", "copy_grads_in_partition")
    assert tensors > 0 and number(rows, "sync", "of a tensor on the device") == 2 * tensors + groups


def alone(tmp_path: Path, *arguments: str, rank: int = 0) -> dict[str, Any]:
    file = tmp_path / "observed.json"
    ran("fake_cuda/one_rank.py", "--rank", str(rank), "--json", str(file), *arguments)
    found = json.loads(file.read_text())
    assert found["broken"] is None
    return found


@pytest.mark.slow
@pytest.mark.timing
def test_a_gpu_is_traced_and_found_idle_by_its_own_time(compiled: None, tmp_path: Path) -> None:
    """Messages come 0.3 s late. The first one finds the GPU at the last update's step, or done with it; while the host
    waits for the second one it computes."""
    timed = ("--op-seconds=5e-4", "--late=0.3", "--run.trace=[3,3]")
    found = alone(tmp_path, "--parallel.pipeline=2", *timed, rank=1)
    stage, trace = found["reports"]
    spans = {text: numbers for text, *numbers in trace["actions"]}
    waited = {text: numbers[2] for text, numbers in spans.items()}
    assert 0 < stage["idle_seconds"] < 0.4 and sum(waited.values()) == pytest.approx(stage["idle_seconds"], abs=1e-5)
    assert waited["1RECV_F1"] < 0.01 < waited["1RECV_F0"]
    assert spans["1RECV_F1"][0] == pytest.approx(spans["1B0"][1], abs=0.01), "when the GPU was done, not the host"
    times = [time for _, start, end, *_ in trace["actions"] for time in (start, end)]
    assert times == sorted(times) and times[0] >= 0 and times[-1] <= trace["seconds"]
    assert number(found["events"], "sync", "") == number(found["events"], "sync", "event", "transfers.py") == 1
    assert stage["peak_memory_bytes"] == 0, "what was moved when the stages were built is not of training"


@pytest.mark.slow
@pytest.mark.parametrize("channel", ["gloo", "nccl"])
def test_a_fake_gpu_shows_what_is_sent_through_which_memory(compiled: None, tmp_path: Path, channel: str) -> None:
    overrides = ["--parallel.pipeline=2", f"--parallel.channel={channel}", "--train.dtype=bf16"]
    rows = alone(tmp_path, *overrides, "--objective.name=overlapping", rank=1)["events"]
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
