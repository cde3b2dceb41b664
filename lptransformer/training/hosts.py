"""`train --hostfile`: one command on one host starts the run on all of them, through DeepSpeed's launcher over pdsh.

The hosts file is DeepSpeed's: a name and `slots=N` per line. pdsh hands on few variables, on a command line that every
user of a host can read; those that matter here go into a file of their own for it (DS_ENV_FILE), and none that looks
like a secret. What was typed goes as one encoded word, because the shell of another host would split and expand it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lptransformer.config.schema import Config
from lptransformer.errors import UserError
from lptransformer.processes import own_command, stop_signals
from lptransformer.run_folder.history import COMMAND_VARIABLE, command_line
from lptransformer.store import ALL_STARTED_KEY, HOSTS_VARIABLE, STOP_KEY, reach
from lptransformer.training.launcher import DEVICES_VARIABLE, WORKER, encode, own_free_port

# Variables that the processes on other hosts need as they are here; those of the list are left out all the same.
HANDED_ON = ("GLOO_", "NCCL_", "TORCH_", "PYTORCH_", "OMP_", "MKL_", "HF_", "LPTRANSFORMER_", "DS_ACCELERATOR", "PATH")
SECRET = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.IGNORECASE)
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10")
STOP_SECONDS = 5.0  # to reach the store
POLL_SECONDS = 0.5


def read_hostfile(path: str) -> dict[str, int]:
    """Processes by host, in order. Raises UserError with the line that is wrong."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile={path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if found is None:
            yaml = "; that looks like a configuration" if path.endswith((".yaml", ".yml")) else ""
            raise UserError(f"--hostfile={path}, line {number}: {text!r} must be a host and `slots=N`{yaml}")
        if found[1] in hosts:
            raise UserError(f"--hostfile={path}, line {number}: {found[1]} is there twice; add up its slots")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise UserError(f"--hostfile={path}: no host in it; a line is a host and `slots=N`")
    return hosts


def placement(hosts: Mapping[str, int], pipeline: int, data: int) -> list[str]:
    """A line per host: the pipeline ranks on it, with their replicas where it has not all of them.

    Raises UserError where the slots are not as many as the processes.
    """
    if sum(hosts.values()) != pipeline * data:
        raise UserError(
            f"the hosts have {sum(hosts.values())} slots ({', '.join(f'{h} {n}' for h, n in hosts.items())}), but "
            f"parallel.pipeline = {pipeline} x parallel.data = {data} needs {pipeline * data}",
            change={"train": "doctor"},
        )
    lines, first = [], 0
    for host, slots in hosts.items():
        of_ranks: dict[int, list[int]] = {}
        for process in range(first, first + slots):
            of_ranks.setdefault(process // data, []).append(process % data)
        first += slots
        parts = [
            f"pipeline rank {rank}" + ("" if len(replicas) == data else f" (replicas {', '.join(map(str, replicas))})")
            for rank, replicas in of_ranks.items()
        ]
        lines.append(f"{host}: {', '.join(parts)}")
    return lines


def launch_on_hosts(config: Config, hostfile: str, arguments: Sequence[str]) -> int:
    """Train on all hosts of a file, with these arguments of the worker; returns the launcher's exit code.

    Ctrl-C and SIGTERM stop the run through its store: every process saves and leaves. A third one ends what runs here.
    """
    hosts = read_hostfile(hostfile)
    for line in placement(hosts, config.parallel.pipeline, config.parallel.data):
        print(f"placement: {line}", flush=True)
    for program in ("pdsh", "ssh"):
        if shutil.which(program) is None:
            raise UserError(
                f"--hostfile={hostfile}: {program} is not installed here; install it, or start every node by itself: "
                f"NODE_RANK=0 bash launch/multinode.sh {hostfile} CONFIG",
                command=f"doctor --hostfile {hostfile}",
            )
    check_reached(hosts)
    os.environ[HOSTS_VARIABLE] = ",".join(hosts)
    first = next(iter(hosts))
    port = free_port(first)
    with tempfile.TemporaryDirectory(prefix="lptransformer-") as folder:
        variables = Path(folder) / "variables"
        variables.touch(mode=0o600)
        variables.write_text("".join(f"{name}={in_quotes(value)}\n" for name, value in handed_on(hosts).items()))
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--log_level=error", f"--hostfile={hostfile}"]
        command += [f"--master_addr={first}", f"--master_port={port}", "--launcher=pdsh", "--force_multi"]
        command += ["--module", WORKER, f"--encoded={encode(arguments)}"]
        environment = {**os.environ, "DS_ENV_FILE": str(variables)}
        runner = subprocess.Popen(command, env=environment, start_new_session=True)
        signals = 0

        def end() -> None:
            """Its own handler would end every run of DeepSpeed on all hosts; processes notice that this one goes."""
            with contextlib.suppress(ProcessLookupError):
                os.killpg(runner.pid, signal.SIGKILL)

        def stop(signum: int, frame: Any) -> None:
            nonlocal signals
            signals += 1
            if signals >= 3:
                end()

        for signum in stop_signals():
            signal.signal(signum, stop)
        asked = False
        while runner.poll() is None:
            if signals and not asked:
                asked = ask_to_stop(first, port)
                if not asked:
                    print("stopped before all processes had started: nothing to save", file=sys.stderr, flush=True)
                    end()
            time.sleep(POLL_SECONDS)
        return 130 if signals and runner.returncode not in (0, 1, 2) else runner.returncode


def check_reached(hosts: Iterable[str]) -> None:
    """Raises UserError where ssh does not reach a host: the launcher would start the others, which then wait for it."""
    asked = {host: subprocess.Popen([*SSH, host, "true"], stderr=subprocess.PIPE, text=True) for host in hosts}
    said = {host: (process.communicate()[1], process.returncode) for host, process in asked.items()}
    for host, (error, code) in said.items():
        if code != 0:
            why = (error.strip() or f"exit code {code}").splitlines()[-1]
            raise UserError(f"{host} is not reached by ssh: {why}", change={"train": "doctor"})


def handed_on(hosts: Mapping[str, int]) -> dict[str, str]:
    """The variables of the processes on other hosts: ours by name, and over them the user's own .deepspeed_env."""
    found = {name: value for name, value in os.environ.items() if name.startswith(HANDED_ON)}
    found |= {HOSTS_VARIABLE: ",".join(hosts), COMMAND_VARIABLE: json.dumps(command_line()), **own_command()}
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # the launcher sets its own; the same numbers then count on every host
        found[DEVICES_VARIABLE] = os.environ["CUDA_VISIBLE_DEVICES"]
    for folder in (Path.home(), Path()):
        own = folder / ".deepspeed_env"
        for line in own.read_text().splitlines() if own.is_file() else ():
            name, equals, value = line.partition("=")
            if equals:
                found[name.strip()] = value.strip()
    return {name: value for name, value in found.items() if not SECRET.search(name) and "\n" not in value}


def in_quotes(value: str) -> str:
    """A value as it stands between the double quotes that the launcher puts around it for the other host's shell."""
    return re.sub(r'(["$`\\])', r"\\\1", value)


def free_port(host: str) -> int:
    """A port that is free on a host, which may be this one."""
    ask = "import socket; s = socket.socket(); s.bind(('', 0)); print(s.getsockname()[1])"
    if host in (socket.gethostname(), "localhost", "127.0.0.1"):
        return own_free_port()
    done = subprocess.run([*SSH, host, f"{sys.executable} -c {shlex.quote(ask)}"], capture_output=True, text=True)
    if done.returncode != 0:
        why = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        message = f"{host}, the first host, is not reached by ssh, or has no {sys.executable}: {why}"
        raise UserError(message, change={"train": "doctor"})
    return int(done.stdout.split()[-1])


def ask_to_stop(host: str, port: int) -> bool:
    """Set the word to stop in the store of the run, which is what a signal does too; whether all processes are there
    to read it."""
    try:
        seconds = timedelta(seconds=STOP_SECONDS)
        store = dist.TCPStore(reach(host), port, None, False, seconds, wait_for_workers=False)
        world = dist.PrefixStore("world/0", store)
        if not world.check([ALL_STARTED_KEY]):
            return False
        world.set(STOP_KEY, "")
    except dist.DistError:
        return False
    return True
