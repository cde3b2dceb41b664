"""Where processes meet: which address the store listens on, several worlds in one process, hosts that do not reach each
other. Real hosts (namespaces) are in training/test_hosts.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

import psutil
import pytest
from distributed import Pool

from lptransformer import store
from lptransformer.errors import TrainingError
from lptransformer.store import HOSTS_VARIABLE, meet

SECONDS = timedelta(seconds=20)
HOSTS = {"first": "10.0.0.1", "second": "10.0.0.2"}


def listening() -> tuple[list[str], list[str]]:
    """The addresses on which this process listens for the store, and what every world's store says."""
    found = []
    for number in range(2):
        met = meet(SECONDS)
        met.store.set(f"{number} of {met.rank}", "here")
        found += [met.store.get(f"{number} of {other}").decode() for other in range(met.size)]
        assert not met.store.check([f"{1 - number} of {met.rank}"]), "worlds do not see each other's keys"
        met.store.set(f"read {number} {met.rank}", "")
        met.store.wait([f"read {number} {other}" for other in range(met.size)])
    ports = [one.laddr for one in psutil.Process().net_connections() if one.status == "LISTEN"]
    return [place.ip for place in ports if str(place.port) == os.environ["MASTER_PORT"]], found


def test_on_one_host_nobody_else_reaches_the_store(pool: Pool) -> None:
    (first, said), (second, _) = pool.run(2, listening)
    assert (first, second) == (["127.0.0.1"], []) and said == ["here"] * 4


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """This process is on the host "first", whose names and interfaces are as given."""

    def make(names: dict[str, str], own: dict[str, str], hosts: str = "first,second", local: str = "1") -> None:
        monkeypatch.setattr(store.socket, "gethostname", lambda: "first")
        monkeypatch.setattr(store, "addresses_of", lambda host: [names[host]] if host in names else [])
        monkeypatch.setattr(store, "own_addresses", lambda: own)

        def way_to(host: str) -> str | None:
            if host not in names:
                return None
            return "127.0.0.1" if names[host].startswith("127.") else "10.0.0.1"

        monkeypatch.setattr(store, "way_to", way_to)
        monkeypatch.setenv("MASTER_ADDR", "first")
        monkeypatch.setenv("LOCAL_SIZE", local) if local else monkeypatch.delenv("LOCAL_SIZE", raising=False)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        monkeypatch.setenv(HOSTS_VARIABLE, hosts)

    return make


OWN = {"127.0.0.1": "lo", "10.0.0.1": "eth0"}
DEBIAN = {**HOSTS, "first": "127.0.1.1"}


@pytest.mark.parametrize(
    ("names", "hosts", "local", "address", "called"),
    [
        (HOSTS, "first,second", "1", "10.0.0.1", "first"),
        (DEBIAN, "first,second", "1", "10.0.0.1", "10.0.0.1"),
        (DEBIAN, "", "1", "0.0.0.0", "first"),  # no other host is known
        ({"first": "10.9.9.9", "second": "10.0.0.2"}, "first,second", "1", "0.0.0.0", "first"),  # not this host's
        (HOSTS, "first", "2", "127.0.0.1", "127.0.0.1"),  # all are here, whatever the name stands for
        ({"first": "127.0.1.1"}, "first", "2", "127.0.0.1", "127.0.0.1"),
        (HOSTS, "first", "", "10.0.0.1", "first"),  # plain variables: nobody says how many are here
        ({"first": "127.0.0.1"}, "", "", "127.0.0.1", "127.0.0.1"),
    ],
)
def test_the_store_is_where_the_others_reach_it_and_nowhere_else(
    network: Callable[..., None], names: dict[str, str], hosts: str, local: str, address: str, called: str
) -> None:
    network(names, OWN, hosts, local)
    assert store.store_address(2) == address and store.connect_address(2) == called


def test_the_processes_of_one_host_meet_whatever_its_name_stands_for(pool: Pool) -> None:
    """As under `torchrun --standalone` in a container, or with a hosts file as Debian writes it."""
    for name in ("127.0.1.1", store.own_address("8.8.8.8")):
        results = pool.run(2, listening, env={"MASTER_ADDR": name}, timeout=60)
        assert results[0][0] == ["127.0.0.1"] and results[1][1] == ["here"] * 4


def test_a_port_that_is_taken_is_named(network: Callable[..., None]) -> None:
    network({"first": "127.0.0.1"}, OWN, "first", "2")
    with store.socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrainingError, match=f"MASTER_PORT={port}.*127.0.0.1.*in use.*another port"):
            store._serve(2, port, SECONDS)


def test_no_store_is_told_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"127.0.0.1, port 9 \(MASTER_ADDR, MASTER_PORT\), within 1 s"):
        store._connect("127.0.0.1", 9, timedelta(seconds=1))


@pytest.mark.parametrize(("address", "interface"), [("", "eth7"), ("127.0.0.1", "lo"), ("127.0.0.1", None)])
def test_an_address_that_nobody_reaches_names_the_variable(address: str, interface: str | None) -> None:
    said = store.unreachable("nodeb", address, interface, 1)
    assert "nodeb has no address that other hosts reach" in said and "GLOO_SOCKET_IFNAME" in store.INTERFACE_HELP


def test_a_closed_port_is_told_with_host_address_and_interface() -> None:
    with store.socket.socket() as once:
        once.bind(("127.0.0.2", 0))
        port = once.getsockname()[1]
    monkey = store.is_loopback
    store.is_loopback = lambda address: False
    try:
        said = store.unreachable("nodeb", "127.0.0.2", "eth0", port)
    finally:
        store.is_loopback = monkey
    assert f"no connection to nodeb at 127.0.0.2 (eth0), port {port}" in said
