"""What a process may still take of this machine's memory, in bytes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


def of_a_process(local: int) -> int:
    """Free bytes for one of `local` processes on this machine: of its GPU where there are GPUs, else of the host."""
    if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu":
        gpus = torch.cuda.device_count()
        free, _ = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
        return free // -(-local // gpus)  # pipeline ranks may share a GPU
    room = min([psutil.virtual_memory().available, *cgroup_rooms()])
    return max(room, 0) // local


def cgroup_rooms(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes that each control group of this process (versions 1 and 2) may still take; caches of files give way."""
    for line in own.read_text().splitlines() if own.is_file() else ():
        _, kinds, path = line.split(":", 2)
        base, names = root, ("memory.max", "memory.current", "inactive_file")
        if "memory" in kinds.split(","):
            base = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        elif kinds:
            continue
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
                limit, used = (int((group / name).read_text()) for name in names[:2])
                stat = dict(one.split() for one in (group / "memory.stat").read_text().splitlines())
                yield limit - used + int(stat.get(names[2], 0))
            if group == base:
                break
