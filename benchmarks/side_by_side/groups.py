"""The processes of one contender, from the side of the one that measures: start, turns, end.

They are forked, so that the imports, which take seconds, are made once: nothing may have started a thread before.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from contenders.worker import Place, serve

START_SECONDS = 180.0
FORK = multiprocessing.get_context("fork")


class GroupFailed(Exception):
    """A process of the group raised, died or did not answer; the message is the first line of its output."""


def free_ports(count: int) -> list[int]:
    """Different ports of this machine that nobody listens at."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


def launched(ranks: int, port: int) -> list[Place]:
    """What `deepspeed` and `torchrun` set for the processes of one machine."""
    size = str(ranks)
    of_all = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "LOCAL_SIZE": size}
    of_all |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [Place({**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(ranks)]


class Group:
    """Processes that are started together and take their turns together."""

    def __init__(self, name: str, job: Any, places: Sequence[Place], logs: Path) -> None:
        self.name = name
        self.connections: list[Connection] = []
        self.processes = []
        for rank, place in enumerate(places):
            ours, theirs = FORK.Pipe()
            log = logs / f"{''.join(c if c.isalnum() else '-' for c in name)}-{rank}.txt"
            process = FORK.Process(target=serve, args=(theirs, place, str(log), job), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def ready(self) -> None:
        """Return when all processes have built their part. Raises GroupFailed."""
        self._answers(START_SECONDS, range(len(self.processes)))

    def turn(self, command: Any, seconds: float, ranks: Iterable[int] | None = None) -> list[Any]:
        """Give all processes, or some ranks, a turn of at most `seconds`; their answers. Raises GroupFailed."""
        chosen = list(range(len(self.processes)) if ranks is None else ranks)
        for rank in chosen:
            self.connections[rank].send(command)
        return self._answers(seconds, chosen)

    def _answers(self, seconds: float, ranks: Iterable[int]) -> list[Any]:
        waiting = {self.connections[rank]: rank for rank in ranks}
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + seconds
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.end()
                raise GroupFailed(f"no answer in {seconds:.0f} s from ranks {sorted(waiting.values())}")
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    word, answers[rank] = connection.recv()
                except (EOFError, ConnectionResetError):
                    word, answers[rank] = "failed", f"rank {rank} died"
                if word == "failed":
                    self.end()
                    raise GroupFailed(answers[rank])
        return [answers[rank] for rank in sorted(answers)]

    def end(self) -> None:
        """End the processes of this group."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self.processes = []


def cores() -> int:
    return len(os.sched_getaffinity(0))
