"""A plan for people, as tables and sentences, and for programs, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lptransformer.plan import PIPELINE_ENGINE, Plan
from lptransformer.progress import table
from lptransformer.workload import USABLE_MEMORY, Prediction

_RANKS: tuple[str, ...] = ("pipeline rank", "blocks", "head", "parameters", "MFLOP/token", "weights", "gradients")
_RANKS += ("optimizer", "activations", "of micro-batches", "messages", "peak", "idle")
_METHODS: tuple[str, ...] = ("method", "pipeline x data", "micro-batch", "m", "ZeRO", "recompute", "seconds/update")
_METHODS += ("tokens/s", "idle", "memory", "fits", "border up", "border down", "ring")


def print_plan(plan: Plan) -> None:
    cluster, work = plan.cluster, plan.work
    print(
        f"{cluster.nodes} node(s) of {cluster.devices_per_node} x {cluster.device.name}, "
        f"{USABLE_MEMORY * cluster.device.memory_bytes / 1e9:.1f} GB usable each; within a node "
        f"{cluster.device.intra_link.name}" + (f", between nodes {cluster.link.name}" if cluster.nodes > 1 else "")
    )
    print(
        f"{work.num_blocks} blocks of width {work.hidden_size}, vocabulary {work.vocab_size:,}, {work.dtype}; an "
        f"update is {work.micro_batches} micro-batches x {work.micro_batch_size} windows x {work.sequence_length} "
        f"tokens = {work.tokens:,} tokens; R = {plan.ratio:.2f}\n"
    )
    shown = plan.configured or next((one for one in plan.methods if one.ranks), None)
    if shown is not None:
        what = "the run as configured" if plan.configured else f"{shown.method}, best split"
        if shown.method == PIPELINE_ENGINE:
            what += f" ({PIPELINE_ENGINE})"
        place = f"{shown.pipeline} pipeline rank(s) x {shown.data} replica(s)"
        time = f"{_seconds(shown.step_seconds)} s/update, {shown.tokens_per_second:,.0f} tokens/s"
        table(f"partition: {what}, {place}, ZeRO {shown.zero_stage}; {time}", _RANKS, _rank_rows(shown))
        print()
    table("methods, each at its best (bytes: memory of one process; traffic per update)", _METHODS, _rows(plan.methods))
    print()
    for line in plan.advice:
        print(f"- {line}")


def to_json(plan: Plan) -> str:
    """The whole plan; docs/design.md, section Formats, has the keys."""
    content = {
        "cluster": asdict(plan.cluster),
        "work": asdict(plan.work),
        "body_to_head": plan.ratio,
        "configured": None if plan.configured is None else _as_data(plan.configured),
        "methods": [_as_data(one) for one in plan.methods],
        "advice": plan.advice,
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def _as_data(one: Prediction) -> dict[str, Any]:
    """A prediction with what follows from its numbers."""
    return {**asdict(one), "idle_share": one.idle_share}


def _rank_rows(one: Prediction) -> list[tuple[object, ...]]:
    return [
        (
            rank.pipeline_rank,
            rank.blocks,
            rank.head,
            f"{rank.parameters / 1e6:,.1f} M",
            f"{rank.forward_flops / 1e6:,.1f}",
            _size(rank.memory.weights + rank.memory.copies),
            _size(rank.memory.gradients + rank.memory.buckets),
            _size(rank.memory.optimizer),
            _size(rank.memory.activations),
            rank.memory.held,
            _size(rank.memory.messages),
            _size(rank.memory.peak),
            f"{rank.idle_share:.1%}",
        )
        for rank in one.ranks
    ]


def _rows(methods: Sequence[Prediction]) -> list[tuple[object, ...]]:
    return [
        (
            one.method,
            f"{one.pipeline} x {one.data}",
            one.micro_batch_size,
            one.micro_batches,
            one.zero_stage,
            f"{one.recompute:.0%}",
            _seconds(one.step_seconds),
            f"{one.tokens_per_second:,.0f}",
            f"{one.idle_share:.1%}",
            _size(one.memory_bytes),
            "yes" if one.fits else "NO",
            _size(one.up_bytes),
            _size(one.down_bytes),
            _size(one.reduced_bytes),
        )
        for one in methods
    ]


def _size(size: float) -> str:
    if size == 0:
        return "0"
    if size >= 1e9:
        return f"{size / 1e9:,.2f} GB"
    return f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"


def _seconds(seconds: float) -> str:
    return f"{seconds:.4g}"
