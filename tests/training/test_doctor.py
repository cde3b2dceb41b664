"""`doctor`: every red row, by breaking that thing. GPUs, driver, NCCL and clocks are stand-ins: answers of hosts that
have them, changed by hand."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import small_run
from two_hosts import WHY_NOT, possible, two_hosts

from lptransformer.__main__ import parser
from lptransformer.training import doctor
from lptransformer.training.doctor import Row
from lptransformer.training.launcher import run
from lptransformer.training.this_host import HostFacts

ROOT = Path(__file__).parents[2]
GIB = 2**30
ZERO = "--deepspeed.zero_optimization"
OFFLOADED = [f"{ZERO}.stage=2", f"{ZERO}.offload_optimizer={{device: cpu}}"]
FORCED = "deepspeed.zero_force_ds_cpu_optimizer"
OFFLOADED += [f"--{FORCED}=true"]
FACTS = HostFacts(
    host="nodea",
    versions={"python": "3.11.7", "lptransformer": "0.2.0", "torch": "2.13.0", "deepspeed": "0.19.8"}
    | {"transformers": "5.23.0", "datasets": "5.2.0", "commit": None},
    gpus=["NVIDIA H100", "NVIDIA H100"],
    driver="570.1",
    cuda="12.8",
    nccl="2.27.5",
    devices_problem="",
    lacking={},
    build_problem="",
    memory=[("GPU 0 of nodea", 80 * GIB), ("GPU 1 of nodea", 80 * GIB)],
    shared_memory=8 * GIB,
    disks={"runs": 100 * GIB},
    address="10.0.0.1",
    interface="eth0",
    own_name="10.0.0.1",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return small_run.stand_in(tmp_path, monkeypatch)


def examined(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """The exit code of `doctor`, and the lines of its red rows."""
    capsys.readouterr()
    try:
        run(parser(), ["doctor", *arguments])
    except SystemExit as end:
        code = int(str(end.code))
    else:
        code = 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err, said.err
    return code, [line for line in said.out.splitlines() if line.startswith("RED")]


def red(rows: Any) -> list[Row]:
    return [row for row in rows if row.remedy]


# -------------------------------------------------------------------------------------------------------- this host


def test_nothing_is_in_the_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examined(capsys, "c.yaml") == (0, [])
    assert sorted(path.name for path in folder.iterdir()) == ["c.yaml", "text.txt"]


def test_what_train_refuses_on_this_host_is_red(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["--model.attention=flex_attention", "--loss.fused=liger", "--optimizer.name=adamw_8bit"]
    code, rows = examined(capsys, "c.yaml", "--model.family=llama", *overrides)
    assert (code, len(rows)) == (1, 3)
    for row, override, instead in zip(rows, overrides, ("sdpa", "chunked", "adamw"), strict=True):
        key, _, value = override.removeprefix("--").partition("=")
        for part in ("option", f"{key} = '{value}'", "no GPU", f"{instead} work"):
            assert part in row


COMPILERS, COMPILED = ("g++", "c++", "clang++"), ["--train.compile=true"]


@pytest.mark.parametrize(
    ("overrides", "key", "missing", "says"),
    [
        (OFFLOADED, FORCED, COMPILERS, "a C++ compiler (g++, c++ or clang++)"),
        (OFFLOADED, FORCED, ("ninja",), "ninja"),
        (COMPILED, "train.compile", COMPILERS, "a C++ compiler (g++, c++ or clang++)"),
        (COMPILED, "train.compile", ("ninja",), ""),
    ],
)
def test_no_compiler_where_an_option_needs_one(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    key: str,
    missing: tuple[str, ...],
    says: str,
) -> None:
    programs = folder / "programs"
    programs.mkdir()
    for name in ("g++", "c++", "clang++", "ninja", "git"):
        if name not in missing:
            (programs / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(programs))
    code, rows = examined(capsys, "c.yaml", *overrides)
    assert code == len(rows) == bool(says)
    assert all("compiler" in row and says in row and f"for {key}" in row for row in rows)


@pytest.mark.slow
def test_memory_that_will_not_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows = examined(capsys, "c.yaml", "--data.sequence_length=100000000")
    assert code == 1 and len(rows) == 1
    for part in ("memory", "a process needs", "data.sequence_length=", "would fit"):
        assert part in rows[0]


@pytest.mark.slow
@pytest.mark.skipif(not possible(), reason=WHY_NOT)
def test_a_full_disk(folder: Path) -> None:
    (folder / "runs").mkdir()
    ask = f"{sys.executable} -m lptransformer doctor c.yaml --run.dir=runs/first"
    words = ["unshare", "--mount", "sh", "-c", f"mount -t tmpfs -o size=1m none {folder}/runs && exec {ask}"]
    done = subprocess.run(words, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("RED")]
    assert done.returncode == 1 and len(rows) == 1, done.stdout + done.stderr
    for part in ("disk", "1 MiB free for runs/first", "make room"):
        assert part in rows[0]


def test_checkpoints_of_a_long_run_count(folder: Path) -> None:
    from lptransformer.config.load import load

    one, many = (doctor.on_disk(load("c.yaml", [f"checkpoint.every={every}"])) for every in (0, 1))
    weights = 4 * (16 * 16 * 12 * 2)  # of the blocks, in fp32
    assert many == 2 * one and 3 * weights < one
    rows = list(doctor.disks({"nodea": FACTS}, 200 * GIB))
    assert [row.remedy for row in rows] == ["200.0 GiB are needed for checkpoints: make room, or choose another folder"]


# ------------------------------------------------------------------------------------------------------- stand-ins


def changed(**values: Any) -> dict[str, HostFacts]:
    """Two hosts, of which the second has these values."""
    return {"nodea": FACTS, "nodeb": dataclasses.replace(FACTS, **({"host": "nodeb", "address": "10.0.0.2"} | values))}


@pytest.mark.parametrize(
    ("check", "values", "says"),
    [
        (doctor.versions, {"versions": FACTS.versions | {"deepspeed": "0.18.0"}}, "nodea has deepspeed 0.19.8"),
        (doctor.versions, {"versions": FACTS.versions | {"datasets": None}}, "bash launch/setup.sh"),
        (doctor.versions, {"versions": FACTS.versions | {"commit": "abc"}}, "the same checkout"),
        (doctor.devices, {"gpus": [], "driver": "470.1"}, "torch is built for CUDA 12.8"),
        (doctor.devices, {"gpus": [], "driver": "470.1", "cuda": None}, "torch is built for CPUs only"),
        (doctor.devices, {"gpus": [], "driver": None}, "nodea has 2 GPUs"),
        (doctor.devices, {"devices_problem": "replicas need a GPU each"}, "replicas need a GPU each"),
        (doctor.nccl, {"nccl": None}, "with NCCL"),
        (doctor.nccl, {"nccl": "2.19.3"}, "another host has 2.27.5"),
        (doctor.shared_memory, {"shared_memory": 2**26}, "--shm-size"),
        (doctor.addresses, {"interface": "lo", "address": "127.0.0.1"}, "GLOO_SOCKET_IFNAME"),
        (doctor.addresses, {"interface": "eth9", "address": ""}, "GLOO_SOCKET_IFNAME"),
    ],
)
def test_a_second_host_that_differs(check: Any, values: dict[str, Any], says: str) -> None:
    assert not red(check(changed()))
    (row,) = red(check(changed(**values)))
    assert row.host == "nodeb" and says in row.remedy


def test_two_hosts_with_one_name() -> None:
    (row,) = red(doctor.addresses({"nodea": FACTS, "nodeb": dataclasses.replace(FACTS, address="10.0.0.2")}))
    assert row.host == "nodeb" and "calls itself nodea too" in row.remedy


def test_a_clock_that_is_off() -> None:
    def rows(skew: float) -> list[Row]:
        one: Any = SimpleNamespace(reached=["", ""], sees=True, skew=skew)
        return red(doctor.between("nodeb", one, ["nodea", "nodeb"]))

    assert not rows(0.1)
    (row,) = rows(12.0)
    assert (row.check, row.found) == ("clock", "off by 12.0 s or more")


# -------------------------------------------------------------------------------------------------------- two hosts


def test_slots_and_programs(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "hosts").write_text("nodea slots=2\nnodeb slots=1\n")
    monkeypatch.setenv("PATH", str(folder))
    code, rows = examined(capsys, "c.yaml", "--hostfile=hosts")
    assert code == 1
    for row, parts in zip(rows, (["ssh", "install"], ["pdsh", "install"], ["slots", "3 slots"]), strict=True):
        assert all(part in row for part in parts), rows
    with pytest.raises(SystemExit) as end:
        run(parser(), ["doctor", "--hostfile=nowhere"])
    assert end.value.code == 2


@pytest.mark.slow
@pytest.mark.skipif(not possible(), reason=WHY_NOT)
@pytest.mark.skipif(not (shutil.which("pdsh") and shutil.which("sshd")), reason="pdsh or sshd is not installed")
def test_two_hosts(folder: Path, tmp_path: Path) -> None:
    """Well with Debian's hosts file; then with other versions and a run folder of its own on the second; then with a
    name that stands for the loopback there; then with the second gone."""
    (folder / "hosts").write_text("nodea slots=1\nnodeb slots=1\n")
    for name in ("ssh", "run", "own", "other"):
        (folder / name).mkdir()
    installed = next(Path(sys.prefix).glob("lib/python*/site-packages/transformers-*.dist-info/METADATA"))
    other = folder / "other" / "METADATA"
    other.write_text("Metadata-Version: 2.4\nName: transformers\nVersion: 4.0.0\n")
    broken = f"mount --bind {other} {installed} && mount -t tmpfs -o size=1m none {folder}/own"

    def asked(hosts: Any, *more: str, **variables: str) -> tuple[int, str, list[str]]:
        kept = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        words = [sys.executable, "-m", "lptransformer", "doctor", "c.yaml", "--parallel.pipeline=2", *more]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "cwd": folder}
        process = hosts.start(0, [*words, "--hostfile=hosts"], env={**kept, **variables}, **options)
        said = process.communicate(timeout=120)[0]
        return process.returncode, said, [line for line in said.splitlines() if line.startswith("RED")]

    with two_hosts(debian=True, ssh=folder / "ssh") as hosts:
        code, said, rows = asked(hosts)
        assert code == 0 and not rows, said
        for part in ("nodea: pipeline rank 0", "stands for 127.0.1.1 there, which is not used", "reaches nodeb"):
            assert part in said
        Path(f"/etc/netns/{hosts.namespaces[1]}/hosts").write_text("127.0.0.1 localhost nodea nodeb\n")
        code, said, rows = asked(hosts)
        assert code == 1 and any("address" in row and "GLOO_SOCKET_IFNAME" in row and "nodeb" in row for row in rows), (
            said
        )
        hosts.cut(1)
        code, said, rows = asked(hosts)
        assert code == 1 and len(rows) == 1 and "ssh" in rows[0] and "`ssh nodeb true` must work" in rows[0], said

    shutil.rmtree(folder / "ssh")
    (folder / "ssh").mkdir()
    with two_hosts(ssh=folder / "ssh", second=broken) as hosts:
        code, said, rows = asked(hosts, "--run.dir=own/run")
    assert code == 1 and all("nodeb" in row for row in rows), said
    parts = ["transformers 4.0.0", "1 MiB free for own/run", "what nodea writes there is not seen"]
    assert len(rows) == 3 and all(part in row for part, row in zip(parts, rows, strict=True)), said
