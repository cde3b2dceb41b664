"""What this host has, and whether a run works on it: the checks of every start, and all that `doctor` asks.

`doctor` starts this module as a program on every host, over ssh, and asks it two questions, each a line of JSON with a
line of JSON as answer (`main`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lptransformer
from lptransformer.config import deepspeed_keys
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError
from lptransformer.models import cross_entropy
from lptransformer.processes import local_processes, own_memory
from lptransformer.run_folder import history
from lptransformer.store import HOSTS_VARIABLE, address_between_hosts, addresses_of, unreachable

ANSWER = "lptransformer-host: "  # before an answer: libraries may print too
SHARED_MEMORY = Path("/dev/shm")
# Keys with values that need a package or a device that not every host has, and what to give instead.
ELSEWHERE = {
    "model.attention": "auto, eager and sdpa work everywhere",
    "loss.fused": "auto and chunked work everywhere",
    "optimizer.name": "adamw works everywhere",
}


@dataclass(frozen=True)
class Question:
    """`hosts` of the run, the first one first, and what it asks of one of them: `processes` there, free `folders`, the
    options of devices (`channel`, `replicas`, `engine`), `options` of ELSEWHERE, and keys for which something is
    compiled (`built_for`). `mark` is the folder in which this host leaves a file that the others look for."""

    hosts: list[str]
    processes: int
    folders: list[str]
    channel: str
    replicas: int
    engine: str
    options: dict[str, str]
    built_for: list[str]
    mark: str | None = None


@dataclass(frozen=True)
class HostFacts:
    """What a host says. Sizes in bytes; `memory` is the pool of every process (its name and what is free in it),
    `disks` what is free by folder; `address`, `interface` and `port` are where it listens for the other hosts;
    `own_name` is the address that its own name stands for; texts of problems are empty where there is none."""

    host: str
    versions: dict[str, str | None]
    gpus: list[str]
    driver: str | None
    cuda: str | None
    nccl: str | None
    devices_problem: str
    lacking: dict[str, str]
    build_problem: str
    memory: list[tuple[str, int]]
    shared_memory: int
    disks: dict[str, int]
    address: str
    interface: str | None
    own_name: str | None
    port: int = 0
    mark: str = ""


def options(config: Config) -> dict[str, str]:
    """The values of the keys in ELSEWHERE."""
    return {key: str(config.value(key)) for key in ELSEWHERE}


def built_for(config: Config) -> list[str]:
    """The keys for which something is compiled on a host."""
    of_deepspeed = [f"deepspeed.{key}" for key in deepspeed_keys.compiled(config.deepspeed)]
    return [*(["train.compile"] if config.train.compile else []), *of_deepspeed]


def lacking(key: str, value: str) -> str:
    """What this host lacks for a value of a key in ELSEWHERE, and how to come by it; empty for nothing."""
    if key == "model.attention" and value != "auto":
        from lptransformer.models.hf_config import missing_for_attention  # imports transformers

        return missing_for_attention(value)
    if key == "loss.fused":
        return cross_entropy.missing(value)
    return missing_for_8_bits() if value == "adamw_8bit" else ""


def check_host(config: Config, processes: int | None = None) -> None:
    """Raises ConfigError where this host cannot run the configuration with so many processes (None: as many as the
    launcher says)."""
    check_devices(config.parallel.channel, config.parallel.data, config.engine, processes or local_processes())
    for key, value in options(config).items():
        if why := lacking(key, value):
            raise ConfigError(f"{config.at(key)}: on this host {why}; {ELSEWHERE[key]}")
    keys = built_for(config)
    if not keys or not (missing := missing_build_tools(keys)):
        return
    compiles, forced = keys[0] == "train.compile", keys == [f"deepspeed.{deepspeed_keys.FORCED}"]
    raise ConfigError(
        f"{config.at(keys[0])}: {'torch.compile builds kernels' if compiles else 'DeepSpeed builds an operator for it'}"
        f", and {' and '.join(missing)} not found here: install that, or "
        f"{'give false' if compiles or forced else 'remove the key'}",
        change={"train": "doctor"},
    )


def check_devices(channel: str, replicas: int, engine: str, local: int) -> None:
    """Raises ConfigError where the GPUs of this host cannot run `local` processes with these options."""
    gpus = torch.cuda.device_count()
    if channel == "nccl" and gpus == 0:
        raise ConfigError("parallel.channel is nccl: that needs GPUs, and there is none here; gloo works everywhere")
    if channel == "nccl" and gpus < local:
        raise ConfigError(
            f"parallel.channel is nccl and {local} processes share {gpus} GPUs here: NCCL takes one process per GPU; "
            "give parallel.channel=gloo, or a GPU for every process"
        )
    if engine == "deepspeed_pipeline" and 0 < gpus < local:
        raise ConfigError(
            f"engine is deepspeed_pipeline and {local} processes share {gpus} GPUs here: DeepSpeed's own pipelines "
            "talk over NCCL, which needs a GPU for every process"
        )
    if replicas > 1 and 0 < gpus < local:
        raise ConfigError(
            f"parallel.data is {replicas} and {local} processes share {gpus} GPUs here: replicas need a GPU each "
            "(pipeline ranks may share one)"
        )


def missing_for_8_bits() -> str:
    """What this host lacks for moments in 8 bits, and what to do; empty for nothing."""
    if not torch.cuda.is_available():
        return "there is no GPU, and its kernels run on one"
    try:
        importlib.import_module("bitsandbytes")
    except Exception as error:  # it looks for libraries of CUDA
        why = f"{type(error).__name__} {error}".splitlines()[0]
        return f'bitsandbytes does not import ({why}): pip install "lptransformer[8bit]"'
    return ""


def missing_build_tools(keys: Sequence[str]) -> list[str]:
    """What is not found here of that which builds for these keys: DeepSpeed's operators, or kernels of torch.compile,
    which needs no ninja."""
    compilers = [name for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name]
    missing = [] if any(map(shutil.which, compilers)) else ["a C++ compiler (g++, c++ or clang++)"]
    if keys != ["train.compile"] and not shutil.which("ninja"):
        missing.append("ninja (with `source .venv/bin/activate` it is on the PATH)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append(f"Python.h ({sysconfig.get_path('include')}; python3-dev of the system)")
    return missing


def of_gpus(local: int) -> str:
    """The pools of `local` processes on this machine, as JSON."""
    return json.dumps([own_memory(rank) for rank in range(local)])


def facts(asked: Question) -> HostFacts:
    """All that this host says at once; what takes other hosts is `meet_others`."""
    os.environ[HOSTS_VARIABLE] = ",".join(asked.hosts)
    interface, address = address_between_hosts(asked.hosts[0])
    problem = ""
    try:
        check_devices(asked.channel, asked.replicas, asked.engine, asked.processes)
    except ConfigError as error:
        problem = str(error)
    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    environment = history.environment()
    return HostFacts(
        host=socket.gethostname(),
        versions={
            "python": platform.python_version(),
            **environment["versions"],
            "lptransformer": lptransformer.__version__,
            "commit": (environment["git_commit"] or "")[:10] + "+changes" * environment["git_changes"] or None,
        },
        gpus=gpus,
        driver=driver(),
        cuda=torch.version.cuda,
        nccl=".".join(map(str, torch.cuda.nccl.version())) if gpus and dist.is_nccl_available() else None,
        devices_problem=problem,
        lacking={key: why for key, value in asked.options.items() if (why := lacking(key, value))},
        build_problem=" and ".join(missing_build_tools(asked.built_for)) if asked.built_for else "",
        memory=[own_memory(number) for number in range(asked.processes)],
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        disks={folder: shutil.disk_usage(existing(folder)).free for folder in asked.folders},
        address=address,
        interface=interface,
        own_name=next(iter(addresses_of(socket.gethostname())), None),
    )


def driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    return None


def existing(folder: str) -> Path:
    """The folder, or of those above it the nearest that is there."""
    path = Path(folder).absolute()
    return next(one for one in (path, *path.parents) if one.is_dir())


def meet_others(listening: Sequence[tuple[str, str, str | None, int]], mark: str) -> dict[str, Any]:
    """The time here; connections to where hosts are listening (host, address, interface, port) and the problem of
    each; whether the file `mark` is here too."""
    return {"clock": time.time(), "reached": [unreachable(*one) for one in listening], "sees": Path(mark).exists()}


def main() -> None:
    """Two questions on standard input: a Question, then the arguments of `meet_others`."""
    asked = Question(**json.loads(sys.stdin.readline()))
    with contextlib.ExitStack() as stack:
        said = asdict(facts(asked))
        if len(asked.hosts) > 1 and said["address"]:
            listener = stack.enter_context(socket.socket(socket.AF_INET6 if ":" in said["address"] else socket.AF_INET))
            listener.bind((said["address"], 0))
            listener.listen(len(asked.hosts))
            said["port"] = listener.getsockname()[1]
        if asked.mark is not None:
            with contextlib.suppress(OSError):  # a disk that is full: another row says so
                folder = existing(asked.mark)
                said["mark"] = stack.enter_context(
                    tempfile.NamedTemporaryFile(prefix=".lptransformer-", dir=folder)
                ).name
        say(said)
        if question := sys.stdin.readline():
            say(meet_others(**json.loads(question)))
            sys.stdin.readline()  # listener and mark stay until every host has looked


def say(answer: dict[str, Any]) -> None:
    print(ANSWER + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
