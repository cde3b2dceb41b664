"""What a launcher (deepspeed, torchrun) says about this process, and its share of the machine."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lptransformer.errors import ConfigError


def launched_size() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def use_fair_share_of_cores(local_processes: int | None = None) -> None:
    """One thread per core and process on this machine, where nobody has decided otherwise.

    `local_processes` is how many processes share the machine; None = as many as the launcher says. Denormal numbers
    are flushed to zero: a peaked softmax makes denormal gradients, and products with those run many times slower on
    CPUs.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        launched = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launched_size()
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (local_processes or int(launched))))
    torch.set_flush_denormal(True)


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Ctrl-C and SIGTERM call `handler` (signal number, frame) instead of what they did before."""
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def check_devices(channel: str, replicas: int, engine: str = "local") -> None:
    """Raise ConfigError where the GPUs of this machine cannot run the configuration."""
    gpus = torch.cuda.device_count()
    if channel == "nccl" and gpus == 0:
        raise ConfigError("parallel.channel is nccl: that needs GPUs, and there is none here; gloo works everywhere")
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launched_size())
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


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was in use: of the GPU's memory where there is one, else of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
