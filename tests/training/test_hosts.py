"""Two hosts (network namespaces of this machine), with the hosts file of a well-kept cluster and with Debian's."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_hosts import WHY_NOT, Hosts, possible, two_hosts

from lptransformer.run_folder.metrics_log import read_metrics

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not possible(), reason=WHY_NOT)]
OPTIONS = ["--data.sequence_length=32", "--model.hidden_size=32", "--train.micro_batch_size=2", "--data.valid=null"]
OPTIONS += ["--train.warmup_steps=2", "--data.tokenizer=bytes"]


@pytest.fixture(params=["good", "debian"])
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    with two_hosts(debian=request.param == "debian") as made:
        yield made


def start(hosts: Hosts, folder: Path, *more: str, slots: int = 1, **variables: str) -> list[subprocess.Popen[str]]:
    """A run on both hosts, by launch/multinode.sh on each."""
    (folder / "hostfile").write_text(f"nodea slots={slots}\nnodeb slots={slots}\n")
    kept = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "launch/multinode.sh", str(folder / "hostfile"), "configs/quickstart.yaml", *OPTIONS]
    command += [f"--run.dir={folder / 'run'}", f"--data.cache={folder / 'prepared'}", *more]
    started = []
    for rank in (1, 0):
        environment = {**kept, "PATH": path, "OMP_NUM_THREADS": "1", "NODE_RANK": str(rank), **variables}
        output = (folder / f"out-{rank}.txt").open("w")
        started.append(hosts.start(rank, command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT))
    return started[::-1]


def said(folder: Path) -> str:
    return "\n".join((folder / f"out-{rank}.txt").read_text() for rank in (0, 1))


def test_two_hosts_train_together(hosts: Hosts, tmp_path: Path) -> None:
    processes = start(hosts, tmp_path, "--train.steps=5")
    assert [one.wait(180) for one in processes] == [0, 0], said(tmp_path)
    assert len([row for row in read_metrics(tmp_path / "run") if "stages" in row]) == 5
    for part in ("nodea 10.213.48.1 (lpa", "nodeb 10.213.48.2 (lpb", "the store is on 10.213.48.1"):
        assert part in said(tmp_path)


def test_a_wrong_interface_ends_everybody_with_the_variable_s_name(tmp_path: Path) -> None:
    with two_hosts() as hosts:
        started = time.monotonic()
        processes = start(hosts, tmp_path, "--parallel.timeout_seconds=60", GLOO_SOCKET_IFNAME="lo")
        assert all(one.wait(120) != 0 for one in processes), said(tmp_path)
        assert time.monotonic() - started < 60
    assert "GLOO_SOCKET_IFNAME" in said(tmp_path) and not (tmp_path / "run").exists()


def test_a_host_that_disappears_ends_the_other_within_the_timeout(tmp_path: Path) -> None:
    with two_hosts() as hosts:
        timeout = 20
        options = ["--train.steps=100000", "--checkpoint.every=5", f"--parallel.timeout_seconds={timeout}"]
        processes = start(hosts, tmp_path, *options)
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 8:
            assert time.monotonic() < deadline and processes[0].poll() is None, said(tmp_path)
            time.sleep(0.1)
        hosts.cut(1)
        assert all(one.wait(timeout + 90) != 0 for one in processes), said(tmp_path)
    assert "Traceback" not in said(tmp_path) or "has gone" in said(tmp_path)
