"""Two hosts (network namespaces of this machine), with the hosts file of a well-kept cluster and with Debian's."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from two_hosts import WHY_NOT, Hosts, possible, two_hosts

from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.launcher import decode

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason=WHY_NOT)]
OPTIONS = ["--data.sequence_length=32", "--model.hidden_size=32", "--train.micro_batch_size=2", "--data.valid=null"]
OPTIONS += ["--train.warmup_steps=2", "--data.tokenizer=bytes"]


def start(
    hosts: Hosts, folder: Path, *more: str, slots: int = 1, before: Sequence[list[str]] = ([], []), **variables: str
) -> list[subprocess.Popen[str]]:
    """A run on both hosts, by launch/multinode.sh on each, behind what stands `before` it there."""
    (folder / "hostfile").write_text(f"nodea slots={slots}\nnodeb slots={slots}\n")
    kept = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "launch/multinode.sh", str(folder / "hostfile"), "configs/quickstart.yaml", *OPTIONS]
    command += [f"--run.dir={folder / 'run'}", f"--data.cache={folder / 'prepared'}", *more]
    started = []
    for rank in (1, 0):
        environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "NODE_RANK": str(rank), **variables}
        output = (folder / f"out-{rank}.txt").open("w")
        started.append(
            hosts.start(
                rank, [*before[rank], *command], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )
        )
    return started[::-1]


def by_pdsh(
    hosts: Hosts, folder: Path, *more: str, name: str = "run", hostfile: str = "hostfile", **variables: str
) -> subprocess.Popen[str]:
    """A run on both hosts by one command on the first."""
    (folder / "hostfile").write_text("nodea slots=1\nnodeb slots=1\n")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "lptransformer", "train", "configs/quickstart.yaml", *OPTIONS]
    command += [f"--run.dir={folder / name}", f"--data.cache={folder / 'prepared'}", *more]
    output = (folder / "out-0.txt").open("a")
    (folder / "out-1.txt").touch()
    command += ["--hostfile", str(folder / hostfile)]
    return hosts.start(0, command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def said(folder: Path) -> str:
    return "\n".join((folder / f"out-{rank}.txt").read_text() for rank in (0, 1))


@pytest.mark.parametrize(("debian", "replicas"), [(False, 2), (True, 1)])
def test_two_hosts_train_together(tmp_path: Path, debian: bool, replicas: int) -> None:
    """A pipeline rank on each host, once with its two replicas."""
    with two_hosts(debian) as hosts:
        processes = start(hosts, tmp_path, "--train.steps=5", f"--parallel.data={replicas}", slots=replicas)
        assert [one.wait(180) for one in processes] == [0, 0], said(tmp_path)
    assert len([row for row in read_metrics(tmp_path / "run") if "stages" in row]) == 5
    for part in ("nodea 10.213.48.1 (lpa", "nodeb 10.213.48.2 (lpb", "the store is on 10.213.48.1"):
        assert part in said(tmp_path)


def wait_for_updates(run: Path, process: subprocess.Popen[str], many: int) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + 150
    while not metrics.exists() or len(metrics.read_text().splitlines()) < many:
        assert time.monotonic() < deadline and process.poll() is None, said(run.parent)
        time.sleep(0.1)


BY_PDSH = pytest.mark.skipif(
    not (shutil.which("pdsh") and shutil.which("sshd")), reason="pdsh or sshd is not installed"
)
ZERO = "--deepspeed.zero_optimization={stage:1,overlap_comm:false}"  # which a shell would split


@BY_PDSH
def test_one_command_trains_on_both_hosts(tmp_path: Path) -> None:
    with two_hosts(ssh=tmp_path) as hosts:
        assert by_pdsh(hosts, tmp_path, ZERO, "--train.steps=3").wait(150) == 0, said(tmp_path)
    assert "placement: nodea: pipeline rank 0" in said(tmp_path) and "the store is on 10.213.48.1" in said(tmp_path)


@BY_PDSH
def test_a_host_that_is_not_reached_or_does_not_come(tmp_path: Path) -> None:
    """Refused where ssh does not reach it; where its processes never come, the others say whom they wait for, and
    Ctrl-C ends the start."""
    asleep, python = tmp_path / "python", Path(sys.executable).resolve()
    asleep.write_text("#!/bin/sh\nexec sleep 600\n")
    asleep.chmod(0o755)
    with two_hosts(ssh=tmp_path, second=f"mount --bind {asleep} {python}") as hosts:
        (tmp_path / "bad").write_text("nodea slots=1\nnodec slots=1\n")
        refused = by_pdsh(hosts, tmp_path, "--train.steps=3", hostfile="bad")
        assert refused.wait(60) == 2, said(tmp_path)
        for part in ("nodec is not reached by ssh: ", "; next: `python -m lptransformer doctor"):
            assert part in said(tmp_path)
        started = by_pdsh(hosts, tmp_path, "--train.steps=3")
        deadline = time.monotonic() + 90
        while "waiting for 1 processes on nodeb" not in said(tmp_path):
            assert time.monotonic() < deadline and started.poll() is None, said(tmp_path)
            time.sleep(0.1)
        os.kill(pid_of(started), signal.SIGINT)
        assert started.wait(30) == 130, said(tmp_path)
    assert "nothing to save" in said(tmp_path) and not (tmp_path / "run").exists()


@BY_PDSH
def test_one_command_stops_both_hosts_and_nothing_else(tmp_path: Path) -> None:
    """With Debian's hosts file: variables that pdsh does not hand on; Ctrl-C beside a second run; the run goes on."""
    with two_hosts(debian=True, ssh=tmp_path) as hosts:
        long = ["--train.steps=100000", "--checkpoint.every=1000"]
        first = by_pdsh(hosts, tmp_path, ZERO, *long, HF_TOKEN="secret", LPTRANSFORMER_TEST="handed on")
        second = by_pdsh(hosts, tmp_path, *long, name="second")
        wait_for_updates(tmp_path / "run", first, 5)
        variables = [one.environ() for one in psutil.process_iter() if f"--run.dir={tmp_path / 'run'}" in encoded(one)]
        assert len(variables) == 2 and all(one["LPTRANSFORMER_TEST"] == "handed on" for one in variables)
        assert all(one["LPTRANSFORMER_HOSTS"] == "nodea,nodeb" for one in variables)
        assert sum("HF_TOKEN" in one for one in variables) == 0
        wait_for_updates(tmp_path / "second", second, 5)
        os.kill(pid_of(first), signal.SIGINT)
        assert first.wait(90) == 3, said(tmp_path)
        update = checkpoint.latest(tmp_path / "run")
        before = len((tmp_path / "second" / "metrics.jsonl").read_text().splitlines())
        time.sleep(2)
        assert second.poll() is None, "another run goes on"
        assert len((tmp_path / "second" / "metrics.jsonl").read_text().splitlines()) > before
        os.kill(pid_of(second), signal.SIGTERM)
        assert second.wait(90) == 3
        again = by_pdsh(hosts, tmp_path, ZERO, *long, "--resume", f"--until={update + 2}")
        assert again.wait(150) == 0, said(tmp_path)


def encoded(process: psutil.Process) -> list[str]:
    """What a worker was started with."""
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        if "lptransformer.training.launcher" in words and not any("deepspeed.launcher" in word for word in words):
            return [one for word in words if word.startswith("--encoded=") for one in decode(word.partition("=")[2])]
    return []


def pid_of(started: subprocess.Popen[str]) -> int:
    """The command itself: `ip` and `unshare` become it."""
    return started.pid


def test_a_run_folder_that_hosts_do_not_share_is_refused_with_both_names(tmp_path: Path) -> None:
    own = tmp_path / "not-shared"
    own.mkdir()
    with two_hosts() as hosts:
        mount = ["sh", "-c", f'mount -t tmpfs none {own}; exec "$@"', "sh"]
        processes = start(hosts, tmp_path, f"--run.dir={own / 'run'}", before=[[], mount])
        codes = [one.wait(150) for one in processes]
    assert codes == [2, 2], said(tmp_path)
    assert "nodeb does not see what nodea writes there" in said(tmp_path) and not (own / "run").exists()


def test_a_wrong_interface_ends_everybody_with_the_variable_s_name(tmp_path: Path) -> None:
    with two_hosts() as hosts:
        started = time.monotonic()
        processes = start(hosts, tmp_path, "--parallel.timeout_seconds=60", GLOO_SOCKET_IFNAME="lo")
        assert all(one.wait(120) != 0 for one in processes), said(tmp_path)
        assert time.monotonic() - started < 60
    assert "GLOO_SOCKET_IFNAME" in said(tmp_path) and not (tmp_path / "run").exists()


def test_a_host_that_disappears_ends_the_other_within_the_timeout(tmp_path: Path) -> None:
    with two_hosts() as hosts:
        timeout = 10
        options = ["--train.steps=100000", "--checkpoint.every=5", f"--parallel.timeout_seconds={timeout}"]
        processes = start(hosts, tmp_path, *options)
        wait_for_updates(tmp_path / "run", processes[0], 8)
        hosts.cut(1)
        assert all(one.wait(timeout + 90) != 0 for one in processes), said(tmp_path)
    assert "Traceback" not in said(tmp_path) or "has gone" in said(tmp_path)
