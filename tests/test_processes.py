"""Which processes above this one are launchers, and what happens when one is gone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from lptransformer.processes import is_launcher

CHILD = """
import time
from lptransformer.processes import watch_launchers
watch_launchers()
print("watching", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("words", "is_one"),
    [
        (["/v/bin/python3.11", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x"], True),
        (["/v/bin/python", "/v/bin/deepspeed", "--num_gpus", "2", "launch/train.py"], True),
        (["python", "/v/bin/torchrun", "--nproc-per-node", "2"], True),
        (["python", "-m", "torch.distributed.run", "--nproc-per-node", "2"], True),
        (["bash", "start_deepspeed.sh"], False),
        (["bash", "-c", "lptransformer train c.yaml --engine=deepspeed_pipeline & sleep 30"], False),
        (["python", "-m", "lptransformer", "train", "c.yaml", "--engine=deepspeed_pipeline"], False),
        (["python"], False),
        ([], False),
    ],
)
def test_what_a_launcher_is(words: list[str], is_one: bool) -> None:
    assert is_launcher(words) == is_one


def test_a_process_is_told_when_the_command_is_killed() -> None:
    with subprocess.Popen(["sleep", "60"]) as command:
        known = {"LPTRANSFORMER_COMMAND_PID": str(command.pid), "LPTRANSFORMER_COMMAND_HOST": socket.gethostname()}
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD], env={**os.environ, **known}, stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None and child.stdout.readline() == "watching\n"
        time.sleep(1)
        assert child.poll() is None
        command.kill()
        assert child.wait(10) == -signal.SIGTERM
