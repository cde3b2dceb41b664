"""The table of devices and links, and what messages and sums cost on a cluster."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lptransformer.errors import UserError
from lptransformer.planning.devices import DEVICES_FILE, Cluster, Link, load_devices

H100, SLOW = load_devices().device("h100"), load_devices().link("25gbit")


def test_every_number_says_where_it_is_from() -> None:
    """A source stands on the line of every number, or is the name of the link itself."""
    lines = DEVICES_FILE.read_text().splitlines()
    numbers = [
        line for line in lines if re.match(r"    (flops|achievable|.*_bytes|memory_.*|bits_.*|latency.*):", line)
    ]
    assert len(numbers) > 50
    words = ("data sheet", "assumed", "arXiv", "measured", "the name says it", "the maker", "PCIe", "same", "Gbit/s")
    without = [
        line for line in numbers if not any(word in line for word in words) and not re.search(r"\d{4}\.\d{5}", line)
    ]
    assert not without


def test_entries_are_whole() -> None:
    assert {"h100", "h200", "a100", "l4", "laptop-core"} <= set(load_devices().devices)
    assert {"25gbit", "100gbit", "400gbit", "1gbit", "100mbit", "nvlink4"} <= set(load_devices().links)
    for device in load_devices().devices.values():
        assert device.flops["bf16"] > 0 and device.flops["fp32"] > 0 and 0 < device.achievable <= 1
        assert device.flops["tf32"] >= device.flops["fp32"], "where there is none it is fp32"


@pytest.mark.parametrize(
    ("ask", "parts"),
    [
        (lambda: load_devices().device("h10"), ("--gpu=h10", "did you mean h100?", "a100")),
        (lambda: load_devices().link("100gbits"), ("--link=100gbits", "did you mean 100gbit?")),
    ],
)
def test_what_is_not_in_the_table(ask: object, parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as caught:
        ask()  # type: ignore[operator]
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA L40S", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(name: str, key: str | None) -> None:
    found = load_devices().called(name)
    assert (found.key if found else None) == key


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    path = tmp_path / "devices.yaml"
    path.write_text("devices: {x: {name: x}}\nlinks: {}\n")
    with pytest.raises(UserError, match="not complete"):
        load_devices(path)


def test_compute_and_updates() -> None:
    assert H100.compute_seconds(989.4e12 * 0.43, "bf16") == pytest.approx(1.0)
    assert H100.update_seconds(1e9, 30) == pytest.approx(30e9 / 3.35e12)


def test_messages() -> None:
    link = Link("x", 8e9, 0.5, 0.25)
    assert link.bytes_per_second == 0.5e9
    assert link.shared(4).bytes_per_second == 0.125e9


def test_borders_within_and_between_nodes() -> None:
    """Two nodes of eight: 4 pipeline ranks of 4 replicas put one border between the nodes, shared by 4 replicas."""
    cluster = Cluster(H100, 2, 8, SLOW)
    assert [link.name for link in cluster.borders(4, 4)] == ["nvlink4", "25gbit", "nvlink4"]
    assert cluster.borders(4, 4)[1].bytes_per_second == SLOW.bytes_per_second / 4
    assert [link.name for link in cluster.borders(2, 8)] == ["25gbit"]
    assert cluster.borders(2, 8)[0].bytes_per_second == SLOW.bytes_per_second / 8
    assert cluster.borders(16, 1)[7].bytes_per_second == SLOW.bytes_per_second
    assert cluster.borders(1, 16) == []


def test_rings() -> None:
    cluster = Cluster(H100, 2, 8, SLOW)
    assert cluster.reduction_link(8).name == "nvlink4"
    assert cluster.reduction_link(16).name == "25gbit"
    link = SLOW
    wanted = 2 * 15 / 16 * 1e9 / link.bytes_per_second + 2 * 15 * link.latency_seconds
    assert cluster.ring_seconds(1e9, 16) == pytest.approx(wanted)
    assert cluster.ring_seconds(1e9, 1) == 0
    more = cluster.ring_seconds(1e9, 16, 1, 10) - cluster.ring_seconds(1e9, 16, 1)
    assert more == pytest.approx(9 * 15 * link.latency_seconds)


def test_which_splits_suit_the_nodes() -> None:
    cluster = Cluster(H100, 2, 8, SLOW)
    assert [data for data in range(1, 17) if cluster.suits(data)] == [1, 2, 4, 8, 16]
