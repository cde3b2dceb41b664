"""Accelerators, links and clusters: what devices.yaml lists, and what a message or a sum over replicas costs there.

Everything here is a model with few numbers: matrix products at a share of the peak, memory at its bandwidth, messages
at latency + bytes / bandwidth, sums over replicas as a ring.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

from lptransformer.config.text import parse_yaml, read_text
from lptransformer.errors import UserError

DEVICES_FILE = Path(__file__).with_name("devices.yaml")
HOST_MEMORY = "host-memory"
T = TypeVar("T")


@dataclass(frozen=True)
class Link:
    """A link, each direction: large messages get `achievable` of `bits_per_second`."""

    name: str
    bits_per_second: float
    achievable: float
    latency_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bits_per_second * self.achievable / 8

    def shared(self, by: float) -> Link:
        """What each of `by` that send at the same time has."""
        return replace(self, bits_per_second=self.bits_per_second / by)


@dataclass(frozen=True)
class Device:
    """What one process computes on. `flops` is the peak by dtype (fp32, tf32, bf16, fp64), `called` what its driver
    calls it."""

    key: str
    name: str
    flops: Mapping[str, float]
    achievable: float
    memory_bytes: float
    memory_bandwidth: float
    intra_link: Link
    called: tuple[str, ...] = ()

    @property
    def is_cpu(self) -> bool:
        """Processes on CPUs talk over the loopback; the optimizer takes tensor by tensor there, one at a time."""
        return self.intra_link.name.startswith("loopback")

    def compute_seconds(self, flops: float, dtype: str) -> float:
        return flops / (self.flops[dtype] * self.achievable)

    def update_seconds(self, parameters: float, bytes_moved: float) -> float:
        """An optimizer step over `parameters`, which reads and writes `bytes_moved` for each."""
        return parameters * bytes_moved / self.memory_bandwidth


@dataclass(frozen=True)
class Cluster:
    """Equal nodes with equal devices. `link` is what one node has to the others, shared by its devices.

    Process `global_rank` is replica `global_rank % data` of pipeline rank `global_rank // data` (docs/design.md), and
    the processes of a node have consecutive numbers: the replicas of a pipeline rank are neighbours.
    """

    device: Device
    nodes: int
    devices_per_node: int
    link: Link

    @property
    def size(self) -> int:
        return self.nodes * self.devices_per_node

    def suits(self, data: int) -> bool:
        """Whether replicas fill whole nodes, or nodes whole sets of replicas."""
        return self.nodes == 1 or data % self.devices_per_node == 0 or self.devices_per_node % data == 0

    def borders(self, pipeline: int, data: int) -> list[Link]:
        """What one replica has between every two neighbouring pipeline ranks, while the others send too.

        Between nodes the node's link is shared by the replicas that cross there.
        """
        per_node = self.devices_per_node
        links = []
        for rank in range(pipeline - 1):
            first = rank * data
            crossing = [p for p in range(first, first + data) if p // per_node != (p + data) // per_node]
            by_node: dict[int, int] = {}
            for process in crossing:
                by_node[process // per_node] = by_node.get(process // per_node, 0) + 1
            links.append(self.link.shared(max(by_node.values())) if by_node else self.device.intra_link)
        return links

    def reduction_link(self, data: int) -> Link:
        """The slowest link of the ring of a pipeline rank's replicas, while the other rings of the node run too."""
        if data <= self.devices_per_node and (self.devices_per_node % data == 0 or self.nodes == 1):
            return self.device.intra_link
        rings = max(1, self.devices_per_node // data) if data < self.devices_per_node else 1
        link = self.link.shared(rings)
        return min(link, self.device.intra_link, key=lambda one: one.bytes_per_second)

    def ring_seconds(self, size_bytes: float, data: int, passes: int = 2, pieces: int = 1) -> float:
        """A ring over the replicas: 2 passes are an all-reduce (reduce-scatter, all-gather), 1 is either half.

        Each pass sends (data - 1) / data of the bytes through every link, in data - 1 steps, for every one of `pieces`
        that go one after another. A ring goes in and out of every node once, so the devices of one node do not share
        the node's link.
        """
        if data == 1:
            return 0.0
        link = self.reduction_link(data)
        steps = passes * (data - 1)
        return steps * (size_bytes / data / link.bytes_per_second + pieces * link.latency_seconds)


@dataclass(frozen=True)
class Devices:
    """What devices.yaml lists, by key."""

    devices: Mapping[str, Device] = field(default_factory=dict)
    links: Mapping[str, Link] = field(default_factory=dict)

    def device(self, key: str) -> Device:
        """Raises UserError for a device that is not listed."""
        return _listed(self.devices, f"--gpu={key}", ": benchmarks/calibrate.py")

    def called(self, name: str) -> Device | None:
        """The device that its driver calls by this name, where one is listed."""
        return next((device for device in self.devices.values() if name in device.called), None)

    def link(self, key: str) -> Link:
        """Raises UserError for a link that is not listed."""
        return _listed(self.links, f"--link={key}")


def _listed(entries: Mapping[str, T], typed: str, how: str = "") -> T:
    key = typed.partition("=")[2]
    if key in entries:
        return entries[key]
    near = "".join(f"; did you mean {one}?" for one in difflib.get_close_matches(key.lower(), entries, n=1))
    raise UserError(f"{typed}: known are {', '.join(entries)} (others go into {DEVICES_FILE.name}{how}){near}")


@cache
def load_devices(path: Path = DEVICES_FILE) -> Devices:
    """The devices and links that are listed. Raises UserError where an entry lacks a number."""
    content = parse_yaml(read_text(path, "the list of devices"), str(path))
    try:
        links = {
            key: Link(key, **{name: float(v) for name, v in entry.items()}) for key, entry in content["links"].items()
        }
        devices = {
            key: Device(
                key,
                entry["name"],
                {dtype: float(value) for dtype, value in {"tf32": entry["flops"]["fp32"], **entry["flops"]}.items()},
                float(entry["achievable"]),
                float(entry["memory_bytes"]),
                float(entry["memory_bandwidth"]),
                links[entry["intra_link"]],
                tuple(entry.get("called", ())),
            )
            for key, entry in content["devices"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: an entry is not complete: {type(error).__name__}: {error}") from None
    return Devices(devices, links)
