"""Two network namespaces on this machine, joined by a link whose rate can be limited (ip netns, veth, tc tbf)."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from contenders.worker import enter

from side_by_side import groups

ADDRESSES = ("10.213.47.1", "10.213.47.2")
PREFIX = "lptbench-"  # then the number of the process that made it
BURST_SECONDS = 0.001  # what may pass at once, as time at the limit


class NoNamespaces(Exception):
    """Namespaces cannot be made on this machine; the message says what failed."""


@dataclass(frozen=True)
class Pair:
    """The two namespaces by name, and the interface of each."""

    names: tuple[str, str]
    interfaces: tuple[str, str]

    @property
    def files(self) -> tuple[str, str]:
        return f"/run/netns/{self.names[0]}", f"/run/netns/{self.names[1]}"

    def limit(self, mbit: float | None) -> None:
        """Limit both directions of the link to `mbit` Mbit/s; None = whatever the machine can."""
        for name, interface in zip(self.names, self.interfaces, strict=True):
            _call("tc", "-n", name, "qdisc", "del", "dev", interface, "root", may_fail=True)
            if mbit is not None:
                burst = max(10_000, int(mbit * 1e6 / 8 * BURST_SECONDS))
                rate = ["tbf", "rate", f"{mbit}mbit", "burst", str(burst), "latency", "100ms"]
                _call("tc", "-n", name, "qdisc", "add", "dev", interface, "root", *rate)

    def measured_mbit(self, megabytes: float) -> float:
        """What one TCP connection carries from the first namespace to the second, in Mbit/s."""
        here, there = groups.FORK.Pipe()
        receiver = groups.FORK.Process(target=_receive, args=(there, self.files[1]), daemon=True)
        sender = groups.FORK.Process(target=_send, args=(self.files[0], int(megabytes * 1e6)), daemon=True)
        receiver.start()
        assert here.poll(10) and here.recv() == "listening"
        sender.start()
        received, seconds = here.recv() if here.poll(120) else (0, float("inf"))
        for process in (sender, receiver):
            process.kill()
            process.join()
        return received * 8 / 1e6 / seconds


@contextlib.contextmanager
def joined_pair() -> Iterator[Pair]:
    """Make the namespaces and the link, and remove them whatever happens. Raises NoNamespaces where they cannot be."""
    names = (f"{PREFIX}{os.getpid()}-0", f"{PREFIX}{os.getpid()}-1")
    pair = Pair(names, (f"lpt{os.getpid()}a", f"lpt{os.getpid()}b"))
    before = signal.signal(signal.SIGTERM, _as_exit)
    try:
        _remove_what_was_killed()
        for name in names:
            _call("ip", "netns", "add", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
        ends = [pair.interfaces[0], "netns", names[0], "type", "veth", "peer", "name", pair.interfaces[1]]
        _call("ip", "link", "add", *ends, "netns", names[1])
        for name, interface, address in zip(names, pair.interfaces, ADDRESSES, strict=True):
            _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", interface)
            _call("ip", "-n", name, "link", "set", interface, "up")
        pair.limit(1)  # whether tc is there and allowed
        pair.limit(None)
        yield pair
    finally:
        for name in names:  # the link goes with them
            _call("ip", "netns", "del", name, may_fail=True)
        signal.signal(signal.SIGTERM, before)


def _remove_what_was_killed() -> None:
    """Namespaces of ours whose process is gone: it was killed before it could remove them."""
    for path in Path("/run/netns").glob(f"{PREFIX}*"):
        if not Path(f"/proc/{path.name.removeprefix(PREFIX).partition('-')[0]}").exists():
            _call("ip", "netns", "del", path.name, may_fail=True)


def _as_exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def _call(*command: str, may_fail: bool = False) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        if may_fail:
            return
        raise NoNamespaces(f"{' '.join(command)}: {error}") from None
    if done.returncode != 0 and not may_fail:
        raise NoNamespaces(f"{' '.join(command)}: {(done.stderr or done.stdout).strip()}")


def _receive(connection: Connection, namespace: str) -> None:
    enter(namespace)
    with socket.create_server((ADDRESSES[1], 47011)) as server:
        connection.send("listening")
        peer, _ = server.accept()
        count, started = len(peer.recv(1)), time.perf_counter()
        while data := peer.recv(1 << 16):
            count += len(data)
        connection.send((count, time.perf_counter() - started))


def _send(namespace: str, count: int) -> None:
    enter(namespace)
    with socket.create_connection((ADDRESSES[1], 47011), timeout=10) as peer:
        peer.sendall(bytes(count))
