"""Accelerators, links and clusters: the table devices.yaml, read and checked, and what a message or a sum costs on it.

Everything here is a model with few numbers: matrix products at a share of the peak, memory at its bandwidth, messages
at latency + bytes / bandwidth, sums over replicas as a ring.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from lptransformer.config.text import parse_yaml, read_text
from lptransformer.errors import UserError

TABLE = Path(__file__).with_name("devices.yaml")
HOST_MEMORY = "host-memory"


@dataclass(frozen=True)
class Wire:
    """A link, each direction: large messages get `achievable` of `bits_per_second`."""

    name: str
    bits_per_second: float
    achievable: float
    latency_seconds: float

    @property
    def bytes_per_second(self) -> float:
        return self.bits_per_second * self.achievable / 8

    def seconds(self, size_bytes: float) -> float:
        """The time of one message alone on the wire."""
        return self.latency_seconds + size_bytes / self.bytes_per_second

    def shared(self, by: float) -> Wire:
        """What each of `by` that send at the same time has."""
        return replace(self, bits_per_second=self.bits_per_second / by)


@dataclass(frozen=True)
class Device:
    """What one process computes on. `flops` is the peak by dtype (fp32, bf16, fp64)."""

    key: str
    name: str
    flops: Mapping[str, float]
    achievable: float
    memory_bytes: float
    memory_bandwidth: float
    intra_link: Wire

    @property
    def is_cpu(self) -> bool:
        """Processes on CPUs talk over the loopback; the optimizer takes tensor by tensor there, one at a time."""
        return self.intra_link.name.startswith("loopback")

    def compute_seconds(self, flops: float, dtype: str) -> float:
        """The time of so many FLOPs in blocks."""
        return flops / (self.flops[dtype] * self.achievable)

    def head_seconds(self, flops: float, dtype: str) -> float:
        """The time of so many FLOPs in heads with their loss."""
        return self.compute_seconds(flops, dtype)

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
    link: Wire

    @property
    def size(self) -> int:
        return self.nodes * self.devices_per_node

    def suits(self, data: int) -> bool:
        """Whether replicas fill whole nodes, or nodes whole sets of replicas."""
        return self.nodes == 1 or data % self.devices_per_node == 0 or self.devices_per_node % data == 0

    def borders(self, pipeline: int, data: int) -> list[Wire]:
        """What one replica has between every two neighbouring pipeline ranks, while the others send too.

        Between nodes the node's link is shared by the replicas that cross there.
        """
        per_node = self.devices_per_node
        wires = []
        for rank in range(pipeline - 1):
            first = rank * data
            crossing = [p for p in range(first, first + data) if p // per_node != (p + data) // per_node]
            by_node: dict[int, int] = {}
            for process in crossing:
                by_node[process // per_node] = by_node.get(process // per_node, 0) + 1
            wires.append(self.link.shared(max(by_node.values())) if by_node else self.device.intra_link)
        return wires

    def reduction_wire(self, data: int) -> Wire:
        """The slowest wire of the ring of a pipeline rank's replicas, while the other rings of the node run too."""
        if data <= self.devices_per_node and (self.devices_per_node % data == 0 or self.nodes == 1):
            return self.device.intra_link
        rings = max(1, self.devices_per_node // data) if data < self.devices_per_node else 1
        wire = self.link.shared(rings)
        return min(wire, self.device.intra_link, key=lambda one: one.bytes_per_second)

    def ring_seconds(self, size_bytes: float, data: int, passes: int = 2, pieces: int = 1) -> float:
        """A ring over the replicas: 2 passes are an all-reduce (reduce-scatter, all-gather), 1 is either half.

        Each pass sends (data - 1) / data of the bytes through every wire, in data - 1 steps, for every one of `pieces`
        that go one after another. A ring goes in and out of every node once, so the devices of one node do not share
        the node's link.
        """
        if data == 1:
            return 0.0
        wire = self.reduction_wire(data)
        steps = passes * (data - 1)
        return steps * (size_bytes / data / wire.bytes_per_second + pieces * wire.latency_seconds)


@dataclass(frozen=True)
class Table:
    devices: Mapping[str, Device] = field(default_factory=dict)
    links: Mapping[str, Wire] = field(default_factory=dict)

    def device(self, key: str, origin: str = "--gpu") -> Device:
        """Raises UserError for a device that is not in the table."""
        return self.devices[_known(key, self.devices, origin, f"others go into {TABLE.name}: benchmarks/calibrate.py")]

    def link(self, key: str, origin: str = "--link") -> Wire:
        """Raises UserError for a link that is not in the table."""
        return self.links[_known(key, self.links, origin, f"others go into {TABLE.name}")]


def _known(key: str, table: Mapping[str, Any], origin: str, also: str) -> str:
    if key in table:
        return key
    near = difflib.get_close_matches(key.lower(), table, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{origin}={key}: known are {', '.join(table)} ({also}){hint}")


@cache
def table(path: Path = TABLE) -> Table:
    """The table of devices and links. Raises UserError where an entry lacks a number."""
    content = parse_yaml(read_text(path, "the table of devices"), str(path))
    try:
        links = {
            key: Wire(key, **{name: float(v) for name, v in entry.items()}) for key, entry in content["links"].items()
        }
        devices = {
            key: Device(
                key,
                entry["name"],
                {dtype: float(value) for dtype, value in entry["flops"].items()},
                float(entry["achievable"]),
                float(entry["memory_bytes"]),
                float(entry["memory_bandwidth"]),
                links[entry["intra_link"]],
            )
            for key, entry in content["devices"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: an entry is not complete: {type(error).__name__}: {error}") from None
    return Table(devices, links)
