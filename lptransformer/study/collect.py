"""From a run folder to a record: what study/records.py describes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from lptransformer.config.load import to_dict
from lptransformer.config.schema import Config
from lptransformer.data.readers import MANIFEST
from lptransformer.errors import RunError
from lptransformer.evaluation import trained_model
from lptransformer.methods import flops
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.heads import HeadOptions
from lptransformer.models.blueprint import Blueprint
from lptransformer.planning import simulate
from lptransformer.run_folder import history, layout
from lptransformer.run_folder.metrics import MetricsRow
from lptransformer.run_folder.metrics_log import read_metrics, read_updates
from lptransformer.study.records import FORMAT, IDENTITY, RECORD, RECORDS, Record, read

PIPELINE_RANKS = 8  # of the pipeline in which every run is simulated, or as many as there are blocks
CURVE_NUMBERS, CURVE_ROWS = 800, 200  # the most that a record holds of the training loss


def build(run: Path, identity: Mapping[str, Any] | None = None) -> Record:
    """The record of a run folder. `identity` has its name, method and so on (IDENTITY), by default those of the record
    in the folder.

    Raises RunError where the folder holds no run, or one without an update.
    """
    config = layout.read_config(run)
    updates = read_updates(run)
    blueprint = trained_model.blueprint_of(run)
    parts, costs, train = blueprint.parts, blueprint.costs, config.train
    positions = blueprint.tokens
    gradient_bytes = positions * parts.hidden_size * DTYPES[train.dtype].bytes
    steady = updates[len(updates) // 10 :]  # without the start, where memory and caches are cold
    done = updates[-1]["update"]
    identity = identity or _known_identity(run) or {"name": str(run), "method": method_name(config)}
    return {
        "format": FORMAT,
        **{key: identity[key] for key in IDENTITY if key in identity},
        "complete": done >= blueprint.steps,
        "updates": done,
        "steps": blueprint.steps,
        "tokens_per_update": positions,
        "seconds": _short(updates[-1]["seconds"]),
        "tokens_per_second": _short(median(row["tokens_per_second"] for row in steady)),
        "config": _without_paths(to_dict(config), run),
        "environment": _environment(run),
        "model": {
            "blocks": blueprint.objective.num_blocks,
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
                "idle_share": _short(median(_entry(row, plan.last_block)["idle_share"] for row in steady)),
                "memory_bytes": max(_entry(row, plan.last_block)["memory_bytes"] for row in updates),
                "hidden_states_bytes": 0 if plan.is_last else positions * blueprint.token_bytes(plan.index),
                "gradients_bytes": round(gradient_bytes * _crossing(blueprint, plan.index)),
            }
            for plan in blueprint.stages
        ],
        "evaluations": _evaluations(read_metrics(run), blueprint, _has_one_objective(run)),
        "training": _curve(updates),
    }


def _entry(row: MetricsRow, last_block: int) -> dict[str, Any]:
    """What an update's metrics say about the stage that ends with a block, or about the one that holds it."""
    return next(entry for entry in row["stages"] if entry["last_block"] >= last_block)


def method_name(config: Config) -> str:
    """A name for the method of a run that no sweep has named: the objective with its numbers, the kind of head."""
    options = config.objective
    chunks, words = getattr(options, "chunks", None), [options.name]
    if chunks is not None:
        words.append("+".join(map(str, chunks)) if isinstance(chunks, list) else str(chunks))
    if config.head.kind != HeadOptions().kind:
        words.append(config.head.kind)
    return "-".join(words)


def _crossing(blueprint: Blueprint, stage: int) -> float:
    """How many gradients cross the border below a stage per micro-batch, in the mean over a run's updates."""
    counts = [len(plan.crossing(stage)) for plan in blueprint.phases]
    phase_at, steps = blueprint.objective.phase_at, blueprint.steps
    return counts[0] if len(counts) == 1 else fmean(counts[phase_at(update, steps)] for update in range(steps))


def _has_one_objective(run: Path) -> bool:
    """Whether no start of the run went on with another objective."""
    return not any(
        key.startswith("objective.") for start in history.read_starts(run) for key in start.get("changed", ())
    )


def _evaluations(metrics: Sequence[MetricsRow], blueprint: Blueprint, one_objective: bool) -> dict[str, Any]:
    """The losses of the exits that the newest evaluation has, nan before they were there; FLOPs are nan without
    `one_objective`, since the blueprint knows the newest alone."""
    objective, costs, steps, many = blueprint.objective, blueprint.costs, blueprint.steps, blueprint.micro_batches
    micro_batch = blueprint.micro_batch_size * blueprint.sequence_length if one_objective else math.nan
    places = {row["update"]: row for row in metrics if "stages" in row}
    newest = {row["evaluation"]: row["exits"] for row in metrics if "evaluation" in row}
    tables: dict[str, Any] = {}
    of_phase = simulate.pipeline_flops(objective, costs, min(PIPELINE_RANKS, objective.num_blocks), many)
    for evaluation in metrics:
        if "evaluation" not in evaluation or evaluation["update"] not in places:
            continue
        name, update = evaluation["evaluation"], evaluation["update"]
        place = places[update]
        blocks = [one["last_block"] for one in newest[name]]
        losses = {one["last_block"]: one["nll_per_token"] for one in evaluation["exits"]}
        spent = flops.spent(objective, costs, update, steps)
        in_pipeline = sum(of_phase[objective.phase_at(done, steps)] for done in range(update))
        columns = ["update", "tokens", "seconds", "total_flops", "serial_flops", "pipeline_flops"]
        row = [
            update,
            place["tokens"],
            _short(place["seconds"]),
            _short(spent.total * micro_batch * many),
            _short(spent.serial * micro_batch),
            _short(in_pipeline * micro_batch),
            *(_short(losses.get(block, math.nan)) for block in blocks),
        ]
        tables.setdefault(name, {"columns": [*columns, *blocks], "rows": []})["rows"].append(row)
    return tables


def _curve(updates: Sequence[MetricsRow]) -> dict[str, Any]:
    """The training loss of every exit that the newest update has, in means over as many updates as keep the rows few
    enough."""
    blocks = [entry["last_block"] for entry in updates[-1]["stages"] if entry["loss"] is not None]
    losses = [{entry["last_block"]: entry["loss"] for entry in row["stages"]} for row in updates]
    rows = min(CURVE_ROWS, CURVE_NUMBERS // (len(blocks) + 2))
    size = math.ceil(len(updates) / rows)
    bins = [slice(start, start + size) for start in range(0, len(updates), size)]
    return {
        "columns": ["update", "seconds", *blocks],
        "rows": [
            [
                updates[of][-1]["update"],
                _short(updates[of][-1]["seconds"], 5),
                *(_mean([by_block.get(block) for by_block in losses[of]]) for block in blocks),
            ]
            for of in bins
        ],
    }


def _mean(losses: Sequence[float | None]) -> float:
    finite = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return _short(fmean(finite), 5) if finite else math.nan


def _texts(run: Path) -> dict[str, Any]:
    return {
        kind: {name: _counts(Path(folder) / MANIFEST, run) for name, folder in sets.items()}
        for kind, sets in layout.read_data(run).items()
    }


def _counts(manifest: Path, run: Path) -> dict[str, int]:
    try:
        content = json.loads(manifest.read_text())
        return {key: int(content[key]) for key in ("tokens", "bytes", "words")}
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"{manifest} cannot be read ({error}): it counts the text of {run}, see data.cache") from None


def _environment(run: Path) -> dict[str, Any]:
    starts = history.read_starts(run)
    keys = ("git_commit", "git_changes", "python", "platform", "cpu_count", "omp_num_threads", "versions")
    return {key: starts[-1].get(key) for key in keys} | {"starts": len(starts)}


def _without_paths(values: dict[str, Any], run: Path) -> dict[str, Any]:
    """A configuration without what holds on one machine only: records are kept and read elsewhere."""
    for section, key in (("data", "train"), ("data", "valid"), ("data", "cache"), ("run", "dir")):
        del values[section][key]
    for section, key in (("data", "tokenizer"), ("model", "pretrained")):
        if values[section][key]:
            values[section][key] = history.public_name(run, values[section][key])
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
    if (path / layout.CONFIG).is_file():
        return [build(path)]
    if (path / RECORDS).is_file():
        return read(path / RECORDS)
    runs = sorted(found.parent for found in path.rglob(layout.CONFIG))
    if not runs:
        raise RunError(f"{path} holds neither a run nor records of runs")
    return [build(run) for run in runs]
