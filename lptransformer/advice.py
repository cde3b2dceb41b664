"""Which method to use, and why, in plain sentences. Text from numbers; nothing is computed anew."""

from __future__ import annotations

from collections.abc import Sequence

from lptransformer.devices import Cluster
from lptransformer.workload import USABLE_MEMORY, Prediction, Work

# A local method has to be so much faster before its other result is worth a trial: below it is within what this
# prediction errs by.
WORTH = 1.1


def choose(methods: Sequence[Prediction]) -> Prediction | None:
    """The fastest that fits; a method with local updates only where it is `WORTH` times as fast as all others."""
    fitting = [one for one in methods if one.fits]
    exact = min((one for one in fitting if not one.local), key=lambda one: one.step_seconds, default=None)
    local = min((one for one in fitting if one.local), key=lambda one: one.step_seconds, default=None)
    if exact is None or local is None:
        return exact or local
    return local if exact.step_seconds >= WORTH * local.step_seconds else exact


def advise(methods: Sequence[Prediction], work: Work, cluster: Cluster) -> list[str]:
    """The recommendation, then its reasons, a sentence or two each."""
    chosen = choose(methods)
    if chosen is None:
        least = min(methods, key=lambda one: one.memory_bytes)
        return [
            f"Nothing fits: what needs least is {name(least)} with {_size(least.memory_bytes)} of "
            f"{_usable(cluster)} usable. It takes more devices, devices with more memory, shorter sequences or a "
            "smaller model; smaller micro-batches were tried."
        ]
    lines = [
        f"Use {chosen.method}, {chosen.pipeline} x {chosen.data} (pipeline x data), ZeRO {chosen.zero_stage}: "
        f"{_seconds(chosen.step_seconds)} per update, {chosen.tokens_per_second:,.0f} tokens/s, "
        f"{_size(chosen.memory_bytes)} of {_usable(cluster)} usable."
    ]
    fitting = [one for one in methods if one.fits]
    local = min((one for one in fitting if one.local), key=lambda one: one.step_seconds, default=None)
    exact = min((one for one in fitting if not one.local), key=lambda one: one.step_seconds, default=None)
    if local is not None and exact is not None:
        ratio = exact.step_seconds / local.step_seconds
        lines.append(_compare(local, exact, ratio))
    lines += _memory(methods, cluster)
    lines += _pipelines(fitting)
    lines += _links(fitting, local)
    if cluster.size > 1:
        lines += _heads(local, work)
    elif local is not None and exact is not None and local.memory_bytes < exact.memory_bytes:
        lines.append(
            "In one process local updates save memory, because activations are kept of one stage at a time: "
            f"{_size(local.memory_bytes)}, where backprop takes {_size(exact.memory_bytes)}."
        )
    if any(one.recompute for one in fitting):
        names = ", ".join(f"{one.recompute:.0%} in {name(one)}" for one in fitting if one.recompute)
        lines.append(
            "Where activations do not fit, backprop makes those of some blocks again, a forward pass more of these: "
            f"{names}. This program keeps them all."
        )
    lines.append(
        "Local updates give other weights than backprop: these are times per update, not times to a loss. What was "
        "measured of the loss is in docs/benchmarks/quality.md, at small scale only."
    )
    lines.append("Not compared: tensor, sequence and expert parallelism, offloading, fused kernels.")
    return lines


def name(one: Prediction) -> str:
    """A method with its split, pipeline x data: "chunked (4 x 8, ZeRO 1)"."""
    return f"{one.method} ({one.pipeline} x {one.data}, ZeRO {one.zero_stage})"


def _compare(local: Prediction, exact: Prediction, ratio: float) -> str:
    if ratio >= WORTH:
        return (
            f"Local updates win: {name(local)} is {ratio:.2f} x as fast as the fastest that trains by backprop, "
            f"{name(exact)} ({_seconds(exact.step_seconds)})."
        )
    if ratio > 1:
        return (
            f"{name(local)} would be {ratio:.2f} x as fast as {name(exact)}: less than {WORTH} x is within the error "
            "of this prediction, and not worth another training result."
        )
    times = f"{1 / ratio:.2f} x as long ({_seconds(local.step_seconds)})"
    return f"Local updates do not pay here: {name(local)} takes {times}."


def _memory(methods: Sequence[Prediction], cluster: Cluster) -> list[str]:
    missing = [f"{name(one)} ({_size(one.memory_bytes)})" for one in methods if not one.fits]
    if not missing:
        return []
    return [f"Does not fit into {_usable(cluster)}, at its smallest: {'; '.join(missing)}."]


def _pipelines(fitting: Sequence[Prediction]) -> list[str]:
    piped = [one for one in fitting if not one.local and one.pipeline > 1]
    if not piped:
        return []
    fastest = min(piped, key=lambda one: one.step_seconds)
    return [
        f"The best pipeline of backprop is {name(fastest)}, with {fastest.micro_batches} micro-batches per replica: "
        f"its ranks wait {fastest.idle_share:.0%} of the time, for the bubble, for blocks that cannot be divided, and "
        "for links."
    ]


def _links(fitting: Sequence[Prediction], local: Prediction | None) -> list[str]:
    lines = []
    for one in fitting:
        if one.method == "data parallel" and one.data > 1:
            share = one.reduction_seconds / one.step_seconds
            lines.append(
                f"Data parallel sends {_size(one.reduced_bytes)} per process and update around its ring; "
                f"{_seconds(one.reduction_seconds)} of that is not hidden behind compute, {share:.0%} of the update."
            )
    for one in fitting:
        if one is local and one.pipeline > 1:
            ring = ""
            if one.data > 1:
                ring = f", and {_size(one.reduced_bytes)} per process around the ring of its replicas ("
                ring += f"{_seconds(one.reduction_seconds)}{_hidden(one)})"
            returned = "nothing back" if one.down_bytes == 0 else f"{_size(one.down_bytes)} back"
            lines.append(
                f"{name(one)} sends {_size(one.up_bytes)} per update up over a border between pipeline ranks, "
                f"{returned}{ring}."
            )
    return lines


def _hidden(one: Prediction) -> str:
    """What ZeRO lets run beside the compute (predict_local.py)."""
    return ", beside the compute" if one.zero_stage == 3 else ", not hidden behind compute"


def _heads(local: Prediction | None, work: Work) -> list[str]:
    costs = work.costs
    ratio = work.num_blocks * costs.block_flops / costs.head_flops
    auxiliary = costs.head_training_flops(False) / costs.head_training_flops(True)
    sentence = (
        f"R, the FLOPs of the body over those of a head, is {ratio:.1f}: with a full head on every rank and all else "
        f"equal, local updates are ahead of 1F1B where m < 1 + R = {1 + ratio:.1f} micro-batches per replica"
    )
    if local is None or local.pipeline == 1:
        return [f"{sentence}."]
    here = "below" if local.micro_batches < 1 + ratio else "not below"
    return [
        f"{sentence}; m = {local.micro_batches} in {name(local)} is {here} that. An auxiliary head as configured costs "
        f"{auxiliary:.2f} of a full one."
    ]


def _usable(cluster: Cluster) -> str:
    return _size(USABLE_MEMORY * cluster.device.memory_bytes)


def _size(size: float) -> str:
    if size >= 1e9:
        return f"{size / 1e9:.1f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms" if seconds > 0 else "nothing"
