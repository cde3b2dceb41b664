"""A plan for people, as tables and a recommendation with its reasons, and for programs, as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

from lptransformer.console import print_table
from lptransformer.methods.heads import label
from lptransformer.planning.candidates import USABLE_MEMORY, WORTH, Prediction, fastest, recommend
from lptransformer.planning.plan import Plan

_RANKS: tuple[str, ...] = ("pipeline rank", "blocks", "head", "parameters", "weights", "gradients", "optimizer")
_RANKS += ("activations", "messages", "peak", "idle")
_METHODS: tuple[str, ...] = ("method", "pipeline x data", "micro-batch", "m", "ZeRO", "recompute", "seconds/update")
_METHODS += ("tokens/s", "idle", "memory", "border up", "border down", "ring")


def print_plan(plan: Plan) -> None:
    cluster, work = plan.cluster, plan.work
    print(
        f"{cluster.nodes} node(s) of {cluster.devices_per_node} x {cluster.device.name}, {_usable(plan)} usable each; "
        f"within a node {cluster.device.intra_link.name}"
        + (f", between nodes {cluster.link.name}" if cluster.nodes > 1 else "")
    )
    print(
        f"{work.num_blocks} blocks of width {work.hidden_size}, vocabulary {work.vocab_size:,}, {work.dtype}; an "
        f"update is {work.micro_batches} micro-batches x {work.micro_batch_size} windows x {work.sequence_length} "
        f"tokens = {work.tokens:,} tokens; R = {plan.ratio:.2f}\n"
    )
    shown = plan.configured or next((one for one in plan.methods if one.ranks), None)
    if shown is not None:
        what = f"{shown.method}, {'as configured' if plan.configured else 'best split'}"
        place = f"{shown.pipeline} pipeline rank(s) x {shown.data} replica(s)"
        time = f"{_seconds(shown.step_seconds)}/update, {shown.tokens_per_second:,.0f} tokens/s"
        rows = [_rank_row(shown, rank) for rank in range(len(shown.ranks))]
        print_table(f"partition: {what}, {place}, ZeRO {shown.zero_stage}; {time}", _RANKS, rows)
        print()
    title = "methods, each at its best (bytes: memory of one process; traffic per update)"
    print_table(title, _METHODS, [_method_row(one) for one in plan.methods])
    for bound in plan.bounds:
        print(
            f"{bound.method}, {bound.pipeline} x {bound.data}: {_seconds(bound.step_seconds)}/update at best "
            f"({bound.source}; not replayed)"
        )
    print()
    for line in advice(plan):
        print(f"- {line}")


def to_json(plan: Plan) -> str:
    """The whole plan; docs/design.md, section Data and formats on disk, has the keys."""
    content = {
        "cluster": asdict(plan.cluster),
        "work": asdict(replace(plan.work, empty=None)) | {"head": label(plan.work.head)},
        "body_to_head": plan.ratio,
        "configured": None if plan.configured is None else _as_data(plan.configured),
        "methods": [_as_data(one) for one in plan.methods],
        "bounds": [asdict(bound) for bound in plan.bounds],
        "advice": advice(plan),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _as_data(one: Prediction) -> dict[str, Any]:
    """A prediction with what follows from its numbers."""
    return {**asdict(one), "idle_share": one.idle_share}


def advice(plan: Plan) -> list[str]:
    """The recommendation, a line for every reason, and the remarks on the configuration."""
    chosen, exact, local = recommend(plan.methods), fastest(plan.methods, False), fastest(plan.methods, True)
    if chosen is None:
        least = min(plan.methods, key=lambda one: one.memory_bytes)
        return [
            f"Nothing fits: what needs least is {_name(least)} with {_size(least.memory_bytes)} of {_usable(plan)} "
            "usable. It takes more devices, devices with more memory, shorter sequences or a smaller model; smaller "
            "micro-batches were tried.",
            *plan.remarks,
        ]
    lines = [
        f"Use {_name(chosen)}: {_seconds(chosen.step_seconds)} per update, {chosen.tokens_per_second:,.0f} tokens/s, "
        f"{_size(chosen.memory_bytes)} of {_usable(plan)} usable."
    ]
    if exact is not None and local is not None:
        lines.append(_compare(local, exact))
    # A bound that leaves local updates no win is reported too.
    limit = chosen.step_seconds * (WORTH if chosen.local else 1.0)
    ahead = [one for one in plan.bounds if one.step_seconds < limit]
    if ahead:
        times = "; ".join(
            f"{one.method} ({one.pipeline} x {one.data}) {_seconds(one.step_seconds)}, {one.source}" for one in ahead
        )
        behind = f" or less than {WORTH} x behind it" if chosen.local else ""
        lines.append(
            f"Schedules that this program does not have are ahead of that{behind} at best, by bounds: {times}."
        )
    missing = [f"{_name(one)} ({_size(one.memory_bytes)})" for one in plan.methods if not one.fits]
    if missing:
        lines.append(f"Does not fit into {_usable(plan)}, at its smallest: {'; '.join(missing)}.")
    if plan.cluster.size > 1:
        for one in (one for one in (exact, local) if one is not None):
            waits = one.reduction_seconds / one.step_seconds
            lines.append(
                f"{_name(one)} computes nothing for {one.idle_share:.0%} of the time: {waits:.0%} for sums over its "
                f"replicas ({_size(one.reduced_bytes)} per process around a ring), the rest for other pipeline ranks."
            )
        lines.append(
            f"With a full head on every rank and all else equal, local updates are ahead of 1F1B below 1 + R = "
            f"{1 + plan.ratio:.1f} micro-batches per replica (R: the FLOPs of the body over those of a head)."
        )
    lines.append(
        "Local updates give other weights than backprop: these are times per update, not times to a loss "
        "(docs/benchmarks/quality.md has what was measured, at small scale only). Not compared: tensor, sequence and "
        "expert parallelism, the time of an offloaded optimizer, fused kernels."
    )
    return [*lines, *plan.remarks]


def _compare(local: Prediction, exact: Prediction) -> str:
    ratio = exact.step_seconds / local.step_seconds
    if ratio >= WORTH:
        return (
            f"Local updates win: {_name(local)} is {ratio:.2f} x as fast as the fastest that trains by backprop, "
            f"{_name(exact)} ({_seconds(exact.step_seconds)})."
        )
    if ratio > 1:
        return (
            f"{_name(local)} would be {ratio:.2f} x as fast as {_name(exact)}: less than {WORTH} x is within the error "
            "of this prediction, and not worth another training result."
        )
    return (
        f"Local updates do not pay here: {_name(local)} takes {1 / ratio:.2f} x as long "
        f"({_seconds(local.step_seconds)})."
    )


def _name(one: Prediction) -> str:
    """A method with its split, pipeline x data: "chunked (4 x 8, ZeRO 1)"."""
    return f"{one.method} ({one.pipeline} x {one.data}, ZeRO {one.zero_stage})"


def _rank_row(one: Prediction, rank: int) -> tuple[object, ...]:
    row, memory = one.ranks[rank], one.ranks[rank].memory
    parts = (memory.weights + memory.copies, memory.gradients + memory.buckets, memory.optimizer, memory.activations)
    sizes = [_size(part) for part in (*parts, memory.messages, memory.peak)]
    return rank, row.blocks, row.head, f"{row.parameters / 1e6:,.1f} M", *sizes, f"{row.idle_share:.1%}"


def _method_row(one: Prediction) -> tuple[object, ...]:
    return (
        one.method,
        f"{one.pipeline} x {one.data}",
        one.micro_batch_size,
        one.micro_batches,
        one.zero_stage,
        f"{one.recompute:.0%}",
        f"{one.step_seconds:.4g}",
        f"{one.tokens_per_second:,.0f}",
        f"{one.idle_share:.1%}",
        _size(one.memory_bytes) + ("" if one.fits else ", does not fit"),
        *(_size(size) for size in (one.up_bytes, one.down_bytes, one.reduced_bytes)),
    )


def _usable(plan: Plan) -> str:
    return _size(USABLE_MEMORY * plan.cluster.device.memory_bytes)


def _size(size: float) -> str:
    if size == 0:
        return "0"
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds > 0 else "nothing"
