"""This machine as an entry of lptransformer/planning/devices.yaml, at the sizes of a configuration.

    OMP_NUM_THREADS=1 python benchmarks/calibrate.py configs/quickstart.yaml --processes 2

Measured are a block's forward and backward pass, a chunk of the loss with its head, the optimizer's step and messages
over the loopback, with as many threads as a process would have. The medians count. `flops` is what the block achieves
(so `achievable` is 1), `memory_bandwidth` what the optimizer's step comes to.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch

from lptransformer.config.load import load
from lptransformer.config.schema import Config
from lptransformer.engine.optimizer import build_optimizer
from lptransformer.methods.dtypes import DTYPES
from lptransformer.models import split
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.models.head import Readout
from lptransformer.planning.stage_state import precision

SECONDS = 1.0  # of every measurement, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("config", help="YAML file whose sizes are measured")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="that share this machine (default: 1)")
    args, overrides = parser.parse_known_args()
    config = load(args.config, overrides)
    plan = make_blueprint(config, config.data.vocab_size, None)
    place = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert place is not None
    if place.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // args.processes))
        torch.set_flush_denormal(True)
        memory_bytes, name = psutil.virtual_memory().total / args.processes, f"{torch.get_num_threads()} CPU thread(s)"
    else:
        memory_bytes, name = torch.accelerator.get_memory_info(place)[1], place.type
    block, weight_seconds = block_speed(config, plan, place)
    head = head_speed(config, plan, place)
    moved = precision(config.train.dtype, config.optimizer).update_bytes
    latency, bandwidth = loopback()
    print(
        f"  this-machine:\n    name: {name}\n"
        f"    flops: {{{config.train.dtype}: {block:.2e}}}  # measured: a block; a chunk of the loss {head:.2e}\n"
        "    achievable: 1.0  # it is a measured speed\n"
        f"    memory_bytes: {memory_bytes:.2e}  # of one of {args.processes} process(es)\n"
        f"    memory_bandwidth: {moved / weight_seconds:.2e}  # measured: {config.optimizer.name}, {moved} bytes each\n"
        f"    intra_link: loopback  # measured: {8 * bandwidth:.2e} bits/s, {latency:.1e} s"
    )


def median_seconds(action: Callable[[], object], place: torch.device) -> float:
    """Of an action: once to warm up, then three times or more."""

    def once() -> float:
        started = time.perf_counter()
        action()
        if place.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter() - started

    once()
    times: list[float] = []
    while len(times) < 3 or (sum(times) < SECONDS and len(times) < 200):
        times.append(once())
    return statistics.median(times)


def torch_dtype(plan: Blueprint) -> torch.dtype:
    return getattr(torch, DTYPES[plan.dtype].name)


def block_speed(config: Config, plan: Blueprint, place: torch.device) -> tuple[float, float]:
    """FLOP/s of a block's forward and backward pass; seconds of the optimizer per weight, in fp32."""
    block = split.new_piece(plan.model_config, plan.parts, range(1), False, False, 0).base.to(place)
    optimizer = build_optimizer(block.parameters(), config.optimizer, learning_rate=1e-4)
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step = median_seconds(optimizer.step, place) / sum(parameter.numel() for parameter in block.parameters())
    optimizer.zero_grad(set_to_none=True)
    optimizer.state.clear()
    block = block.to(torch_dtype(plan))
    shape = (plan.micro_batch_size, config.data.sequence_length, plan.parts.hidden_size)
    inputs = torch.randn(shape, device=place).to(torch_dtype(plan))

    def both() -> None:
        # With the gradient at the inputs, which every block but the first of a chunk has to give.
        output = block(inputs_embeds=inputs.requires_grad_(), use_cache=False).last_hidden_state
        output.backward(inputs.detach())

    return 3 * plan.costs.block_flops * shape[0] * shape[1] / median_seconds(both, place), step


def head_speed(config: Config, plan: Blueprint, place: torch.device) -> float:
    """FLOP/s of the readout and the loss behind it, one chunk of rows, forward and backward."""
    parts, dtype = plan.parts, torch_dtype(plan)
    rows = min(plan.micro_batch_size * config.data.sequence_length, plan.chunk_tokens)
    weight = torch.nn.Parameter(0.02 * torch.randn(parts.vocab_size, parts.hidden_size, device=place).to(dtype))
    readout = Readout(weight, plan.chunk_tokens, parts.logit_rule)
    hidden = torch.randn(rows, parts.hidden_size, device=place).to(dtype).requires_grad_()
    labels = torch.randint(0, parts.vocab_size, (rows,), device=place)

    def both() -> None:
        readout(hidden, labels, 1.0 / rows)[0].backward()

    return 3 * plan.costs.head_flops * rows / median_seconds(both, place)


def loopback(size: int = 2**24, pings: int = 50) -> tuple[float, float]:
    """Seconds and bytes per second of messages between two threads over TCP: small ones to and fro, large ones."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    with near, far:
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answer() -> None:
            for length in [8] * pings + [size] * 3:
                receive(far, length)
                far.sendall(b"received")

        thread = threading.Thread(target=answer)
        thread.start()
        times: dict[int, list[float]] = {8: [], size: []}
        for length, count in ((8, pings), (size, 3)):
            for _ in range(count):
                started = time.perf_counter()
                near.sendall(bytes(length))
                receive(near, 8)
                times[length].append(time.perf_counter() - started)
        thread.join()
    latency = statistics.median(times[8]) / 2
    return latency, size / max(statistics.median(times[size]) - 2 * latency, 1e-9)


def receive(end: socket.socket, size: int) -> None:
    view = memoryview(bytearray(size))
    while view:
        view = view[end.recv_into(view) :]


if __name__ == "__main__":
    main()
