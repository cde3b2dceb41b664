"""What a launcher (deepspeed, torchrun) has told this process, and its share of the machine."""

from __future__ import annotations

import os

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


def check_channel(channel: str) -> None:
    """Raise ConfigError where this machine cannot carry the channels between pipeline ranks."""
    if channel == "nccl" and not torch.cuda.is_available():
        raise ConfigError("parallel.channel is nccl: that needs GPUs, and there is none here; gloo works everywhere")
