"""`train --dry-run`: what a run would be, before anything is started: its cuts, its FLOPs, its memory.

Stages are built on the meta device, and no process, no run folder and no token set is created.
"""

from __future__ import annotations

from typing import Any

import psutil
import torch

from lptransformer.config.schema import Config
from lptransformer.console import print_table
from lptransformer.data.prepare import vocabulary
from lptransformer.methods import flops
from lptransformer.methods.heads import label
from lptransformer.methods.stages import stage_rows, trained_of, weights_of
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.planning.disk import host_copies
from lptransformer.planning.rank_memory import RankMemory
from lptransformer.planning.stage_memory import EmptyStages
from lptransformer.planning.stage_state import Precision, precision
from lptransformer.processes import on_gpus

MIB = 2**20
_COLUMNS = ("weights", "gradients", "optimizer", "copies", "activations", "buckets", "messages", "peak")


def dry_run(config: Config) -> None:
    """Check all that one process can, print the plan of the run and the memory of every pipeline rank.

    Of `engine: deepspeed_pipeline` the stages and FLOPs alone are known: they are those of the engine local.
    Raises UserError where the run could not start. Training text has to be there, but need not be prepared.
    """
    blueprint = unprepared(config)
    print_stages(f"dry run: {config.run.dir} is not touched", config, blueprint)
    print(_flops_text(config, blueprint))
    if config.engine != "local":
        print(
            f"{config.at('engine')}: the memory of DeepSpeed's own pipeline is not predicted; the same with "
            "--engine=local predicts what the same stages take under 1F1B of this program"
        )
        return
    ranks = predicted(config, blueprint)
    columns = (*_COLUMNS, "host") if any(rank.host for rank in ranks) else _COLUMNS
    lines = [
        (number, *(f"{getattr(rank, name) / MIB:,.1f}" for name in columns), f"{save / MIB:,.1f}", rank.held)
        for number, (rank, save) in enumerate(zip(ranks, host_copies(config, blueprint), strict=True))
    ]
    names = ("pipeline rank", *columns, "saving", "micro-batches held")
    what = "buckets: ZeRO's; saving: beside the peak, in the host's memory, from the first checkpoint on"
    what += "; host: there too, what is offloaded" if "host" in columns else ""
    print_table(f"predicted memory of one process, MiB ({what})", names, lines)
    print(_machine_text(config, max(rank.peak for rank in ranks)))


def unprepared(config: Config) -> Blueprint:
    """The blueprint of a run whose text need not be prepared."""
    data = config.data.model_dump(include={"train", "valid", "tokenizer", "vocab_size"})
    return make_blueprint(config, vocabulary(**data), None)


def print_stages(title: str, config: Config, blueprint: Blueprint) -> None:
    """The stages of a run, a row each."""
    how, stages, costs = _precision(config, blueprint), blueprint.stages, blueprint.costs
    rows = stage_rows(stages, costs, label(blueprint.head), how.trained_bytes(blueprint.objective.delayed), how.weights)
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])
    if costs.trained is not None:
        trained, weights = sum(trained_of(s, costs) for s in stages), sum(weights_of(s, costs)[0] for s in stages)
        why = " and ".join(config.at(key) for key in ("train.freeze", "lora.rank") if config.value(key))
        print(f"{trained:,} of {weights:,} weights train ({trained / weights:.1%}): {why}")


def predicted(config: Config, blueprint: Blueprint, *, alike: bool = False) -> list[RankMemory]:
    """The memory of a process of every pipeline rank, on this machine; with `alike` blocks count as equal."""
    how = _precision(config, blueprint, on_gpu=on_gpus())
    return EmptyStages(blueprint, alike=alike).ranks(blueprint.objective, blueprint.stages, how)


def _precision(config: Config, blueprint: Blueprint, **how: Any) -> Precision:
    zero_stage, replicas = blueprint.zero_stage, blueprint.replicas
    optimizer, deepspeed = config.optimizer, config.deepspeed
    return precision(blueprint.dtype, optimizer, deepspeed, zero_stage=zero_stage, replicas=replicas, **how)


def _flops_text(config: Config, blueprint: Blueprint) -> str:
    steps, tokens = blueprint.steps, blueprint.tokens
    if not steps:
        return f"an update: {tokens} tokens; {config.at('train.epochs')}: its updates are counted when the run starts"
    total = flops.spent(blueprint.objective, blueprint.costs, steps, steps).total * tokens
    return f"an update: {tokens} tokens, {total / steps:.3g} FLOPs; {steps} updates: {total:.3g} FLOPs"


def _machine_text(config: Config, peak: int) -> str:
    processes = config.parallel.pipeline * config.parallel.data
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        has = (
            f"this machine: {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {total / 2**30:.0f} GiB each"
        )
        return f"{has}; the largest process takes {peak / 2**30:.2f} GiB, beside what CUDA needs for itself"
    total = psutil.virtual_memory().total
    has = f"this machine: no GPU, {total / 2**30:.1f} GiB of memory"
    return f"{has}; {processes} processes take up to {processes * peak / 2**30:.2f} GiB, beside what libraries need"
