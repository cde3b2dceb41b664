"""What a launcher (deepspeed, torchrun) says about this process, and its share of the machine: cores, memory."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

# Of `train`, for the processes that it has started, perhaps on other hosts.
COMMAND_PID_VARIABLE, COMMAND_HOST_VARIABLE = "LPTRANSFORMER_COMMAND_PID", "LPTRANSFORMER_COMMAND_HOST"
WATCH_SECONDS = 0.5  # between two looks at the processes above


def launched_size() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    return int(os.environ.get("RANK", "0"))


def local_processes() -> int:
    """The number of processes that a launcher started on this machine, as far as it says; 1 without one."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or launched_size())


def use_fair_share_of_cores(processes: int | None = None) -> None:
    """One thread per core and process on this machine, where nobody has decided otherwise.

    `processes` is how many processes share the machine; None = as many as the launcher says. Denormal numbers
    are flushed to zero: a peaked softmax makes denormal gradients, and products with those run many times slower on
    CPUs.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (processes or local_processes())))
    torch.set_flush_denormal(True)


def stop_signals() -> list[signal.Signals]:
    """Ctrl-C, SIGTERM, and a terminal that closes; not under nohup."""
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGINT, signal.SIGTERM, *hangup]


def command_of_run() -> tuple[str, int]:
    """Host and process id of the command that has started this run: of this process where no other has."""
    pid = os.environ.get(COMMAND_PID_VARIABLE, "")
    return (os.environ.get(COMMAND_HOST_VARIABLE, ""), int(pid)) if pid else (socket.gethostname(), os.getpid())


_watching, _watch_lock = threading.Event(), threading.Lock()


def own_command() -> dict[str, str]:
    """The variables by which the processes of a run know this one, which starts them."""
    return {COMMAND_PID_VARIABLE: str(os.getpid()), COMMAND_HOST_VARIABLE: socket.gethostname()}


def watch_launchers() -> None:
    """From now on this process gets a SIGTERM when a process that started it has gone: a launcher, or the command.

    A launcher that is killed leaves its processes behind, and they would train on under nobody. Watched are the
    processes above this one as long as they are launchers, and the command where it is on this host.
    """
    command = os.environ.get(COMMAND_PID_VARIABLE, "")
    here = os.environ.get(COMMAND_HOST_VARIABLE) == socket.gethostname()
    watched = []
    with contextlib.suppress(psutil.Error):
        for above in psutil.Process().parents():
            if not is_launcher(above.cmdline()):
                break
            watched.append(above)
    if here and command.isdigit():
        try:
            watched.append(psutil.Process(int(command)))
        except psutil.Error:  # it has gone already
            os.kill(os.getpid(), signal.SIGTERM)
    if watched:
        _watching.set()
        threading.Thread(target=_stop_when_one_ends, args=(watched,), daemon=True).start()


def is_launcher(words: Sequence[str]) -> bool:
    """Whether a command line is that of a launcher; not of a shell whose script has such a name."""
    if len(words) < 2 or not Path(words[0]).name.startswith("python"):
        return False
    modules = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")
    return any(Path(word).name in ("deepspeed", "torchrun") or word.startswith(modules) for word in words[1:4])


def _stop_when_one_ends(watched: Sequence[psutil.Process]) -> None:
    while all(_lives(process) for process in watched):
        time.sleep(WATCH_SECONDS)
    with _watch_lock:
        if _watching.is_set():
            os.kill(os.getpid(), signal.SIGTERM)


def forget_launchers() -> None:
    """From now on this process ends by itself: call it before its stop signals do again what they did before."""
    with _watch_lock:
        _watching.clear()


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def on_stop_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """The stop signals call `handler` (signal number, frame) instead of what they did before."""
    before = {signum: signal.signal(signum, handler) for signum in stop_signals()}
    try:
        yield
    finally:
        for signum, earlier in before.items():
            signal.signal(signum, earlier)


def forget_peak_memory(device: torch.device) -> None:
    """On a GPU `peak_memory_bytes` counts from here on. A CPU's peak is that of the process, from its beginning."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was in use: of the GPU's memory where there is one, else of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def on_gpus() -> bool:
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def own_memory(local_rank: int | None = None) -> tuple[str, int]:
    """The pool of this process (by its launcher's LOCAL_RANK): of its GPU where there are GPUs, else of the host."""
    if on_gpus():
        local_rank = int(os.environ.get("LOCAL_RANK", "0")) if local_rank is None else local_rank
        gpu = local_rank % torch.cuda.device_count()  # pipeline ranks may share a GPU
        return f"GPU {gpu} of {socket.gethostname()}", torch.cuda.mem_get_info(gpu)[0]
    return socket.gethostname(), host_memory()


def host_memory() -> int:
    """Bytes that are free on this host, within the limits of this process's control groups."""
    return max(min([psutil.virtual_memory().available, *cgroup_rooms()]), 0)


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
