"""One process of a contender: builds its part, then waits for its turns on a pipe and uses no processor meanwhile."""

from __future__ import annotations

import ctypes
import importlib
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from contenders import bare_stages
from contenders.face import Contender, Sleeper, Spec, Work
from lptransformer.planning.simulate import StageSeconds

CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Place:
    """Where a process runs: its environment, as a launcher would set it, and a network namespace by its file."""

    environment: Mapping[str, str]
    namespace: str | None = None


@dataclass
class Turn:
    """What one process did in a turn. Lists have an entry for the start and one for the end of every update.

    `clock` is the monotonic clock of the machine, which all processes share. `waited` (None: not known), `slept` and
    `processor` are sums since the process started. All in seconds.
    """

    clock: list[float] = field(default_factory=list)
    waited: list[float | None] = field(default_factory=list)
    slept: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    loss: float | None = None
    peak_bytes: int = 0


def serve(connection: Connection, place: Place, log: str, job: tuple[Any, Work]) -> None:
    """The life of a process. Never returns; the first line of an error is its last message.

    `job` is a contender and its work, or a list of contenders whose stages are to be measured by themselves.
    """
    try:
        _settle(place, log)
        if isinstance(job[0], Spec):
            spec, work = job
            torch.set_num_threads(spec.threads)
            sleeper = Sleeper()
            contender = importlib.import_module(f"contenders.{spec.kind}").build(spec, work, sleeper)
            connection.send(("ready", None))
            while (updates := connection.recv()) is not None:
                connection.send(("done", _train(contender, sleeper, updates)))
        else:
            specs, work = job
            stages = bare_stages.build(specs, work, int(place.environment["RANK"]))
            connection.send(("ready", None))
            while (name := connection.recv()) is not None:
                own = [bare for bare in stages if bare.contender == name]
                connection.send(("done", [(name, bare.index, bare.measure()) for bare in own]))
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", _first_line(error)))
    sys.stderr.flush()
    os._exit(0)  # nothing is left to be said to other processes, some of which may be gone


def _settle(place: Place, log: str) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if place.namespace is not None:
        enter(place.namespace)
    os.environ.update(place.environment)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    torch.set_flush_denormal(True)
    torch.manual_seed(0)


def enter(namespace: str) -> None:
    """Move this process to a network namespace, before it has threads: those stay in the one that they began in."""
    with open(namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"{namespace} cannot be entered")


def _end_with(parent: int) -> None:
    """End this process when the one that measures is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(2)
    os._exit(1)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ or error  # torch's pipelines wrap what a stage raised
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"


def _train(contender: Contender, sleeper: Sleeper, updates: int) -> Turn:
    turn = Turn()

    def note() -> None:
        turn.clock.append(time.perf_counter())
        turn.waited.append(contender.waited_seconds)
        turn.slept.append(sleeper.slept_seconds)
        turn.processor.append(time.process_time())

    note()
    for _ in range(updates):
        turn.loss = contender.update()
        note()
    turn.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return turn


StageTimes = Sequence[tuple[str, int, StageSeconds]]
