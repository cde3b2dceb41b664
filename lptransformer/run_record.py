"""From a run folder to a record: what records.py describes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lptransformer import config as configuration
from lptransformer import cost, family, flops, gradients, objective, partition, run_folder, simulate
from lptransformer.config import Config
from lptransformer.config_checks import micro_batch_size
from lptransformer.errors import ModelError, RunError
from lptransformer.metrics import Record
from lptransformer.records import FORMAT, IDENTITY, RECORD, RECORDS, read
from lptransformer.run_log import read_metrics, read_updates
from lptransformer.sources import MANIFEST

PIPELINE_RANKS = 8  # of the pipeline in which every run is simulated, or as many as there are blocks
CURVE_NUMBERS, CURVE_ROWS = 800, 200  # the most that a record holds of the training loss
_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}


def build(run: Path, identity: Mapping[str, Any] | None = None) -> Record:
    """The record of a run folder. `identity` says who it is (IDENTITY); by default the record that is there does.

    Raises RunError where the folder holds no run, or one without an update.
    """
    config = run_folder.read_config(run)
    updates = read_updates(run)
    model = run_folder.read_model_config(run)
    parts, costs = _costs(run, config, model)
    goal = objective.build(model_blocks(model), **config.objective.model_dump())
    plans = partition.cut(goal, config.parallel.pipeline, costs, config.parallel.partition)
    train = config.train
    positions = micro_batch_size(config) * train.micro_batches_per_update * config.data.sequence_length
    hidden_bytes = positions * parts.hidden_size * _BYTES[train.dtype]
    handed_up = hidden_bytes
    if train.border_dtype is not None:  # int8: and four bytes of scale for a token
        handed_up = positions * (2 * parts.hidden_size if train.border_dtype == "bf16" else parts.hidden_size + 4)
    steady = updates[len(updates) // 10 :]  # without the start, where memory and caches are cold
    done = updates[-1]["update"]
    identity = identity or _known_identity(run) or {"name": str(run), "method": method_name(config)}
    return {
        "format": FORMAT,
        **{key: identity[key] for key in IDENTITY if key in identity},
        "complete": done >= train.steps,
        "updates": done,
        "steps": train.steps,
        "tokens_per_update": positions,
        "seconds": _short(updates[-1]["seconds"]),
        "tokens_per_second": _short(median(record["tokens_per_second"] for record in steady)),
        "config": _without_paths(configuration.to_dict(config)),
        "environment": _environment(run),
        "model": {
            "blocks": goal.num_blocks,
            "hidden_size": parts.hidden_size,
            "vocab_size": parts.vocab_size,
            "block_parameters": parts.block_parameters,
        },
        "texts": _texts(run),
        "flops": {
            "block": costs.block_flops,
            "head": costs.head_training_flops(is_last=True),
            "auxiliary": costs.head_training_flops(is_last=False),
        },
        "stages": [
            {
                "stage": plan.index,
                "blocks": [plan.first_block, plan.last_block],
                "pipeline_rank": plan.pipeline_rank,
                "idle_share": _short(median(_entry(record, plan.last_block)["idle_share"] for record in steady)),
                "memory_bytes": max(_entry(record, plan.last_block)["memory_bytes"] for record in updates),
                "hidden_states_bytes": 0 if plan.is_last else handed_up if plan.has_head else hidden_bytes,
                "gradients_bytes": round(hidden_bytes * _crossing(goal, plans, plan.index, train.steps)),
            }
            for plan in plans
        ],
        "evaluations": _evaluations(read_metrics(run), goal, costs, config),
        "training": _curve(updates),
    }


def _entry(record: Record, last_block: int) -> Record:
    """What an update's record says about the stage that ends with a block, or about the one that holds it."""
    return next(entry for entry in record["stages"] if entry["last_block"] >= last_block)


def model_blocks(model: Mapping[str, Any]) -> int:
    return family.saved_config(model).num_hidden_layers


def method_name(config: Config) -> str:
    """A name for the method of a run that no sweep has named: the objective with its numbers, the kind of head."""
    section = configuration.to_dict(config)["objective"]
    chunks = section.get("chunks")
    words = [section["name"]]
    if chunks is not None and section["name"] != "greedy":
        words.append("+".join(map(str, chunks)) if isinstance(chunks, list) else str(chunks))
    if config.head.kind != "private" and section["name"] not in ("backprop", "last", "delayed"):
        words.append(config.head.kind)
    return "-".join(words)


def _costs(run: Path, config: Config, model: Mapping[str, Any]) -> tuple[family.Anatomy, cost.ModelCosts]:
    try:
        parts = family.anatomy(family.saved_config(model))
    except ModelError as error:
        raise RunError(f"{run / run_folder.MODEL}: {error}") from None
    return parts, cost.model_costs(
        parts.block_parameters,
        parts.hidden_size,
        parts.vocab_size,
        config.data.sequence_length,
        **config.head.cost_options(),
    )


def _crossing(goal: objective.Objective, plans: Sequence[partition.StagePlan], stage: int, steps: int) -> float:
    """How many gradients cross the border below a stage per micro-batch, in the mean over a run's updates."""
    counts = [len(gradients.crossing(gradients.flows(phase, plans), stage)) for phase in goal.phases]
    return counts[0] if len(counts) == 1 else fmean(counts[goal.phase_at(update, steps)] for update in range(steps))


def _evaluations(
    metrics: Sequence[Record], goal: objective.Objective, costs: cost.ModelCosts, config: Config
) -> dict[str, Any]:
    train = config.train
    micro_batch = micro_batch_size(config) * config.data.sequence_length
    places = {record["update"]: record for record in metrics if "stages" in record}
    tables: dict[str, Any] = {}
    ranks = min(PIPELINE_RANKS, goal.num_blocks)
    of_phase = simulate.pipeline_flops(goal, costs, ranks, train.micro_batches_per_update)
    for record in metrics:
        if "evaluation" not in record or record["update"] not in places:
            continue
        place, exits, update = places[record["update"]], record["exits"], record["update"]
        spent = flops.spent(goal, costs, update, train.steps)
        in_pipeline = sum(of_phase[goal.phase_at(done, train.steps)] for done in range(update))
        columns = ["update", "tokens", "seconds", "total_flops", "serial_flops", "pipeline_flops"]
        columns += [one["last_block"] for one in exits]
        row = [
            update,
            place["tokens"],
            _short(place["seconds"]),
            _short(spent.total * micro_batch * train.micro_batches_per_update),
            _short(spent.serial * micro_batch),
            _short(in_pipeline * micro_batch),
            *(_short(one["nll_per_token"]) for one in exits),
        ]
        tables.setdefault(record["evaluation"], {"columns": columns, "rows": []})["rows"].append(row)
    return tables


def _curve(updates: Sequence[Record]) -> dict[str, Any]:
    """The training loss of every exit, in means over so many updates that the rows are few enough."""
    heads = [i for i, entry in enumerate(updates[0]["stages"]) if entry["loss"] is not None]
    rows = min(CURVE_ROWS, CURVE_NUMBERS // (len(heads) + 2))
    size = math.ceil(len(updates) / rows)
    bins = [updates[start : start + size] for start in range(0, len(updates), size)]
    columns = ["update", "seconds", *(updates[0]["stages"][i]["last_block"] for i in heads)]
    return {
        "columns": columns,
        "rows": [
            [
                of[-1]["update"],
                _short(of[-1]["seconds"], 5),
                *(_mean([u["stages"][i]["loss"] for u in of]) for i in heads),
            ]
            for of in bins
        ],
    }


def _mean(losses: Sequence[float]) -> float:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return _short(fmean(finite), 5) if finite else math.nan


def _texts(run: Path) -> dict[str, Any]:
    return {
        kind: {name: _counts(Path(folder) / MANIFEST, run) for name, folder in sets.items()}
        for kind, sets in run_folder.read_data(run).items()
    }


def _counts(manifest: Path, run: Path) -> dict[str, int]:
    try:
        content = json.loads(manifest.read_text())
        return {key: int(content[key]) for key in ("tokens", "bytes", "words")}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{manifest} cannot be read ({error}): it counts the text of {run}, see data.cache") from None


def _environment(run: Path) -> dict[str, Any]:
    starts = json.loads((run / run_folder.ENVIRONMENT).read_text())
    keys = ("git_commit", "git_changes", "python", "platform", "cpu_count", "omp_num_threads", "versions")
    return {key: starts[-1].get(key) for key in keys} | {"starts": len(starts)}


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what holds on one machine only: records are kept and read elsewhere."""
    for section, key in (("data", "train"), ("data", "valid"), ("data", "cache"), ("run", "dir")):
        del values[section][key]
    for section, key in (("data", "tokenizer"), ("model", "pretrained")):
        if values[section][key]:
            values[section][key] = Path(values[section][key]).name
    return {section: keys for section, keys in values.items() if keys != {}}


def _short(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


def _known_identity(run: Path) -> dict[str, Any]:
    path = run / RECORD
    if not path.is_file():
        return {}
    record = read(path)[0]
    return {key: record[key] for key in IDENTITY if key in record}


def collect(path: Path) -> list[Record]:
    """The records of a run folder, of a folder that holds runs (a sweep's), or of a file of records.

    Raises RunError where there is none.
    """
    if path.is_file():
        return read(path)
    if (path / run_folder.CONFIG).is_file():
        return [build(path)]
    if (path / RECORDS).is_file():
        return read(path / RECORDS)
    runs = sorted(found.parent for found in path.rglob(run_folder.CONFIG))
    if not runs:
        raise RunError(f"{path} holds neither a run nor records of runs")
    return [build(run) for run in runs]
