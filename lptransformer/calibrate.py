"""This machine as a device of devices.py: a few seconds of measuring at the sizes of a configuration.

Measured are one block's forward and backward pass, a chunk of the loss with its head, the optimizer's step, a copy in
memory and messages over the loopback, with as many threads as a process would have. The medians count.
"""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch

from lptransformer import family, pieces
from lptransformer.config_sections import OptimizerSection
from lptransformer.cost import ModelCosts
from lptransformer.devices import Device, Wire
from lptransformer.head import Readout
from lptransformer.optimizer import build_optimizer

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
KEY = "this"


def measure(
    config: Any,
    parts: family.Anatomy,
    costs: ModelCosts,
    *,
    micro_batch_size: int,
    sequence_length: int,
    chunk_tokens: int,
    dtype: str,
    optimizer: OptimizerSection,
    processes: int,
    seconds: float = 1.0,
) -> Device:
    """Each thing is repeated for about `seconds`. Memory and, on a CPU, threads are those of one of `processes`."""
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert place is not None
    threads = torch.get_num_threads()
    if place.type == "cpu":
        torch.set_num_threads(max(1, threads // processes))
        torch.set_flush_denormal(True)
    try:
        rate, each = _block(config, parts, costs, micro_batch_size, sequence_length, dtype, optimizer, place, seconds)
        head_rate = _head(parts, costs, micro_batch_size * sequence_length, chunk_tokens, dtype, place, seconds)
        bandwidth = _copy(place, seconds / 2)
        wire = _loopback()
        running = torch.get_num_threads()
    finally:
        torch.set_num_threads(threads)
    if place.type == "cpu":
        memory_bytes, name = psutil.virtual_memory().total / processes, f"this machine, {running} thread(s) per process"
    else:
        memory_bytes, name = torch.accelerator.get_memory_info(place)[1], f"this machine's {place.type}"
    return Device(KEY, name, {dtype: rate}, 1.0, memory_bytes, bandwidth, wire, each, achievable_head=head_rate / rate)


def _median(action: Callable[[], object], place: torch.device, seconds: float) -> float:
    """Median seconds of an action: once to warm up, then three times or more."""

    def once() -> float:
        started = time.perf_counter()
        action()
        if place.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    once()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < seconds and len(times) < 200):
        times.append(once())
    return statistics.median(times)


def _block(
    config: Any,
    parts: family.Anatomy,
    costs: ModelCosts,
    micro_batch_size: int,
    sequence_length: int,
    dtype: str,
    optimizer: OptimizerSection,
    place: torch.device,
    seconds: float,
) -> tuple[float, float]:
    """FLOP/s of a block's forward and backward pass; seconds of the optimizer per weight, in fp32."""
    block = pieces.new_piece(config, parts, range(1), False, False, 0).base.to(place)
    steps = build_optimizer(block.parameters(), optimizer, learning_rate=1e-4)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    weights = sum(parameter.numel() for parameter in block.parameters())
    each = _median(steps.step, place, seconds) / weights
    steps.zero_grad(set_to_none=True)
    steps.state.clear()
    block = block.to(_DTYPES[dtype])
    shape = (micro_batch_size, sequence_length, parts.hidden_size)
    inputs = torch.randn(shape, device=place, dtype=_DTYPES[dtype])

    def both() -> None:
        # With the gradient at the inputs, which every block but the first of a chunk has to give.
        output = block(inputs_embeds=inputs.requires_grad_(), use_cache=False).last_hidden_state
        output.backward(inputs.detach())

    flops = 3 * costs.block_flops * micro_batch_size * sequence_length
    return flops / _median(both, place, seconds), each


def _head(
    parts: family.Anatomy,
    costs: ModelCosts,
    tokens: int,
    chunk_tokens: int,
    dtype: str,
    place: torch.device,
    seconds: float,
) -> float:
    """FLOP/s of the readout and the loss behind it, one chunk of rows, forward and backward."""
    rows = min(tokens, chunk_tokens)
    kind = {"device": place, "dtype": _DTYPES[dtype]}
    weight = torch.nn.Parameter(torch.randn(parts.vocab_size, parts.hidden_size, **kind) * 0.02)  # type: ignore[call-overload]
    readout = Readout(weight, chunk_tokens, parts.logit_rule)
    hidden = torch.randn(rows, parts.hidden_size, **kind).requires_grad_()  # type: ignore[call-overload]
    labels = torch.randint(0, parts.vocab_size, (rows,), device=place)

    def both() -> None:
        readout(hidden, labels, 1.0 / rows)[0].backward()

    return 3 * costs.head_flops * rows / _median(both, place, seconds)


def _copy(place: torch.device, seconds: float) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.zeros(2**26, dtype=torch.uint8, device=place)
    target = torch.empty_like(source)
    return 2 * source.numel() / _median(lambda: target.copy_(source), place, seconds)


def _loopback(size: int = 2**24, pings: int = 50) -> Wire:
    """Messages between two threads over TCP on this machine: small ones to and fro, then a large one."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answer() -> None:
            for _ in range(pings):
                far.sendall(_receive(far, 8))
            for _ in range(3):
                _receive(far, size)
                far.sendall(b"received")

        thread = threading.Thread(target=answer)
        thread.start()
        small: list[float] = []
        large: list[float] = []
        for sizes, payload, count in ((small, b"x" * 8, pings), (large, bytes(size), 3)):
            for _ in range(count):
                started = time.perf_counter()
                near.sendall(payload)
                _receive(near, 8)
                sizes.append(time.perf_counter() - started)
        thread.join()
    latency = statistics.median(small) / 2
    return Wire("loopback, measured", 8 * size / max(statistics.median(large) - 2 * latency, 1e-9), 1.0, latency)


def _receive(end: socket.socket, size: int) -> bytes:
    found = bytearray(size)
    view = memoryview(found)
    while view:
        view = view[end.recv_into(view) :]
    return bytes(found)
