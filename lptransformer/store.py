"""Where the processes of a run meet: the store that all of them join, and the address by which each is reached.

`meet` works under `deepspeed`, torchrun and plain variables (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). Global rank 0
keeps the store. It listens on the one address by which the others reach it: the loopback where all processes are on one
host. A store has no password, so everybody who reaches it reads and changes what is in it. Under torchrun the agent's
own store only hands over where ours is.

With several hosts every process uses the interface that reaches MASTER_ADDR. Debian and Ubuntu give a host's own name a
loopback address (127.0.1.1), which no other host can reach: there the first host takes the interface by which it
reaches another host, whose name the launcher hands on (HOSTS_VARIABLE). GLOO_SOCKET_IFNAME wins over all of this.
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from lptransformer.errors import LostProcessError, TrainingError
from lptransformer.processes import launched_rank, launched_size

HOSTS_VARIABLE = "LPTRANSFORMER_HOSTS"  # names of all hosts of the run, with commas
INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"  # gloo's own
INTERFACE_HELP = (
    f"set {INTERFACE_VARIABLE} on every host to the interface that reaches the others, or open the ports between them"
)
STOP_KEY = "stop"  # in the store of a world: somebody asks all its processes to save and leave
ALL_STARTED_KEY = "all started"  # there: every process of a world has passed the checks before a run
WAITING_SECONDS = 10.0  # before it is said that others have not come
ANYWHERE = "0.0.0.0"
CONNECT_SECONDS = 10.0  # for one connection between hosts


@dataclass(frozen=True)
class Meeting:
    """The store of a world, whose keys nobody else uses, and this process's place."""

    store: dist.Store
    rank: int
    size: int


@dataclass
class _Door:
    """The store of all worlds of this process, while launcher and place stay the same."""

    place: tuple[str | None, ...]
    store: dist.Store
    worlds: int = 0


_door: _Door | None = None


def meet(timeout: timedelta) -> Meeting:
    """Join the store. All processes of a run call this, as often as the others. Between hosts it also sets gloo's
    variable to this host's interface.

    Raises LostProcessError where a process cannot be reached, with the variable that would help.
    """
    global _door
    rank, size = launched_rank(), launched_size()
    if size == 1:
        return Meeting(dist.HashStore(), 0, 1)
    names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
    place = tuple(os.environ.get(name) for name in names)
    if _door is None or _door.place != place:
        _door = None  # closes the one before
        _door = _Door(place, _open(rank, size, timeout))
    number, _door.worlds = _door.worlds, _door.worlds + 1
    store = dist.PrefixStore(f"world/{number}", _door.store)
    store.set_timeout(timeout)
    if several_hosts(size):
        interface, address = address_between_hosts(place[0] or "")
        waiting = threading.Timer(WAITING_SECONDS, _say_who_waits, [rank, size])
        waiting.daemon = True
        waiting.start()
        try:
            _check_addresses(store, rank, size, interface, address)
        finally:
            waiting.cancel()
        os.environ[INTERFACE_VARIABLE] = interface or ""
    return Meeting(store, rank, size)


def _say_who_waits(rank: int, size: int) -> None:
    if rank == 0:
        here, names = local_size() or 1, ", ".join(other_hosts()) or "other hosts"
        print(f"waiting for {size - here} processes on {names}", flush=True)


def several_hosts(size: int) -> bool:
    """Whether some processes of the run are on other hosts, as the launcher says."""
    return (local_size() or size) < size


def local_size() -> int | None:
    """The processes on this host; None where no launcher says it."""
    said = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(said) if said else None


def _open(rank: int, size: int, timeout: timedelta) -> dist.Store:
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return _serve(size, port, timeout) if rank == 0 else _connect(connect_address(size), port, timeout)
    # What a run before a restart of the agent's left there has another number.
    key = f"lptransformer/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    agent = _connect(master, port, timeout)
    if rank == 0:
        store, address = _serve(size, 0, timeout), store_address(size)
        agent.set(key, json.dumps([master if address == ANYWHERE else address, store.port]))
        return store
    host, at = json.loads(agent.get(key))
    return _connect(host, at, timeout)


def _connect(host: str, port: int, timeout: timedelta) -> dist.TCPStore:
    try:
        return dist.TCPStore(host, port, None, False, timeout, wait_for_workers=False)
    except dist.DistError as error:
        raise LostProcessError(
            f"no store of the run at {host}, port {port} (MASTER_ADDR, MASTER_PORT), within "
            f"{timeout.total_seconds():g} s: {str(error).splitlines()[0]}"
        ) from None


def _serve(size: int, port: int, timeout: timedelta) -> dist.TCPStore:
    """The store itself, on a port (0: one that is free) of the address by which the others reach this host."""
    address = store_address(size)
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise TrainingError(
            f"MASTER_PORT={port}: the store of the run cannot listen on {address}: {error.strerror}; another port "
            "(MASTER_PORT, or --master_port of the launcher) would"
        ) from None
    listener.listen(1024)
    port = listener.getsockname()[1]
    own = "127.0.0.1" if address == ANYWHERE else address
    file = listener.detach()
    return dist.TCPStore(own, port, None, True, timeout, wait_for_workers=False, master_listen_fd=file)


def store_address(size: int) -> str:
    """Where the store listens; all addresses of this host where it is not known by which one the others come."""
    master = os.environ["MASTER_ADDR"]
    found = addresses_of(master)
    loopback = any(map(is_loopback, found))
    if not several_hosts(size) and (local_size() is not None or loopback):
        return "127.0.0.1"
    if own := next((one for one in found if not is_loopback(one) and one in own_addresses()), None):
        return own
    address = own_address(master)
    return address if loopback and not is_loopback(address) else ANYWHERE


def connect_address(size: int) -> str:
    """Where this process, which is not global rank 0, finds the store."""
    address = store_address(size)
    if address == "127.0.0.1":
        return address
    return reach(os.environ["MASTER_ADDR"])


def reach(master: str) -> str:
    """How this host calls the first host of the run: by its name, but on that host itself, where its name stands for a
    loopback address, by the address that the others use."""
    way, own = way_to(master), own_address(master)
    return own if way is not None and is_loopback(way) and not is_loopback(own) else master


def own_address(master: str) -> str:
    """The address of this host that is used between hosts: that of the way to `master`, and where this is a loopback
    address, that of the way to another host of the run. The loopback address where there is no such host."""
    ways = [way_to(master)]
    ways += [way_to(name) for name in other_hosts()]
    return next((one for one in ways if one is not None and not is_loopback(one)), ways[0] or "127.0.0.1")


def address_between_hosts(master: str) -> tuple[str | None, str]:
    """The interface that gloo is to use here, and its address ("" where it has none)."""
    interface = os.environ.get(INTERFACE_VARIABLE) or own_addresses().get(own_address(master))
    first = (interface or "").partition(",")[0]  # gloo takes several
    return interface, next((address for address, name in own_addresses().items() if name == first), "")


def other_hosts() -> Sequence[str]:
    names = [name for name in os.environ.get(HOSTS_VARIABLE, "").split(",") if name]
    own = {socket.gethostname(), *own_addresses()}
    return [name for name in names if name not in own]


def way_to(host: str) -> str | None:
    """This host's own address on the way to another one; None where there is no way. Sends nothing."""
    for address in addresses_of(host):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((address, 9))
            except OSError:
                continue
            return probe.getsockname()[0]
    return None


def addresses_of(host: str) -> list[str]:
    """What a name stands for on this host; IPv4 first."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(one[4][0]) for one in sorted(found, key=lambda one: one[0] != socket.AF_INET)))


def own_addresses() -> dict[str, str]:
    """The interfaces of this host by address."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        one.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family in families and not one.address.startswith("fe80")
    }


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _check_addresses(store: dist.Store, rank: int, size: int, interface: str | None, own: str) -> None:
    """One process of every host connects to one of each other host, where gloo would; says which addresses they use.

    gloo itself waits far beyond any timeout where it was given an address that nobody reaches.
    """
    host = socket.gethostname()
    with socket.socket(socket.AF_INET6 if ":" in own else socket.AF_INET) as listener:
        port = 0
        if own:
            listener.bind((own, 0))
            listener.listen(size)
            port = listener.getsockname()[1]
        store.set(f"address/{rank}", json.dumps([host, own, interface, port]))
        rows = [json.loads(store.get(f"address/{other}")) for other in range(size)]
        of_hosts: dict[str, list[Any]] = {}  # the first process of every host
        for row in rows:
            of_hosts.setdefault(row[0], row)
        problem = ""
        for name, address, of_interface, at in of_hosts.values() if rows.index(of_hosts[host]) == rank else ():
            if name != host and not problem:
                problem = unreachable(name, address, of_interface, at)
        store.set(f"reached/{rank}", problem)
        problems = [said for other in range(size) if (said := store.get(f"reached/{other}").decode())]
    if problems:
        raise LostProcessError(f"{host}: {problems[0]}; {INTERFACE_HELP}")
    if rank == 0:
        listed = ", ".join(f"{name} {address} ({of})" for name, address, of, _ in of_hosts.values())
        where = store_address(size)
        everywhere = "; the store listens on all addresses" if where == ANYWHERE else f"; the store is on {where}"
        print(f"addresses: {listed}{everywhere}", flush=True)


def unreachable(host: str, address: str, interface: str | None, port: int) -> str:
    """Why no connection is made to a host that listens there; empty where one is."""
    if not address or is_loopback(address):
        return f"{host} has no address that other hosts reach ({address or 'none'}, {interface})"
    try:
        socket.create_connection((address, port), CONNECT_SECONDS).close()
    except OSError as error:
        return f"no connection to {host} at {address} ({interface}), port {port}: {error}"
    return ""
