"""The committed configuration, throughput.yaml: from its sections to works and contenders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from contenders import deepspeed_pipeline, torch_pipelining
from contenders.face import Spec, Work

from lptransformer.methods.cost import ModelCosts
from lptransformer.models.blueprint import make_blueprint
from side_by_side import splits

HERE = Path(__file__).parent.parent
CONFIGURATION, SPLITS = HERE / "throughput.yaml", HERE / "splits.yaml"
ONE_PROCESS = ("one_process",)
WITHOUT_SPLIT = (*ONE_PROCESS, "deepspeed_data")
Section = dict[str, Any]


def section(name: str, smoke: bool) -> Section:
    """A setting; with `smoke` what its `smoke` says instead, tiny, for tests."""
    found = yaml.safe_load(CONFIGURATION.read_text())[name]
    tiny = found.pop("smoke", {})
    if smoke:
        found |= tiny
        found["contenders"] = [one for one in found["contenders"] if one["name"] not in tiny.get("without", [])]
    return found


def named(entries: Iterable[Mapping[str, Any]], wanted: Iterable[str]) -> list[Mapping[str, Any]]:
    """The contenders whose names contain one of the wanted words; all where nothing is wanted."""
    words = list(wanted)
    return [entry for entry in entries if not words or any(word in entry["name"] for word in words)]


def work_of(one: Section, ranks: int, micro_batches: int) -> Work:
    """The work of a case. `block_seconds` of an emulation is the share of a block in a stage's forward pass."""
    seconds = None
    if "stage_seconds" in one:
        # Forward, gradient at the input and gradient of the weights are equal thirds.
        seconds = one["stage_seconds"] / 3 / (one["base"]["model"]["num_layers"] / ranks)
    return Work(one["base"], one["vocab_size"], ranks, micro_batches, seconds)


def of_kind(kind: str) -> tuple[str, ...]:
    """What a kind of contender changes in its configuration."""
    return deepspeed_pipeline.BASELINE if kind == "deepspeed_pipeline" else ()


def specs(entries: Iterable[Mapping[str, Any]], work: Work) -> list[Spec]:
    """The contenders at their work, each with its split: equal, or the best that was measured or else computed."""
    scanned = splits.read(SPLITS)
    found = []
    for entry in entries:
        split = None
        if entry["kind"] not in WITHOUT_SPLIT:
            split = splits.equal(blocks_of(work), len(rank_of_stage(entry, work)))
            if entry["split"] == "best":
                computed = promising(entry, work, 1)[0]
                measured = splits.best(scanned, entry["name"], work.micro_batches, computed)
                fits = (sum(measured), len(measured)) == (sum(computed), len(computed))  # it was measured on one model
                split = measured if fits else computed
        found.append(spec_of(entry, split))
    return found


def spec_of(entry: Mapping[str, Any], split: splits.Split | None) -> Spec:
    """A contender with a split: of ours it cuts the chunks, of the others the stages."""
    config = tuple(entry.get("config", ()))
    if entry["kind"] == "local":
        assert split is not None
        config, split = (*config, f"objective.chunks={list(split)}"), None
    return Spec(entry["name"], entry["kind"], config, split, entry.get("schedule"), entry.get("threads", 1))


def blocks_of(work: Work) -> int:
    return work.base["model"]["num_layers"]


def rank_of_stage(entry: Mapping[str, Any], work: Work) -> list[int]:
    """The pipeline rank of every part of the split: chunks of ours, stages of the others."""
    if entry["kind"] == "torch_pipelining":
        return torch_pipelining.rank_of_stage(entry["schedule"], work.ranks)
    parts = work.ranks * entry.get("chunks_per_rank", 1)
    return [part * work.ranks // parts for part in range(parts)]


def promising(entry: Mapping[str, Any], work: Work, count: int) -> list[splits.Split]:
    """Splits to look at, the most promising by computed cost first."""
    ranks = rank_of_stage(entry, work)
    heads = [0.0] * len(ranks)
    costs = _costs(entry, work)
    if entry["kind"] == "local":
        auxiliary = (costs.auxiliary_flops + costs.auxiliary_backward_flops) / (3 * costs.block_flops)
        without = 1 if any("overlapping" in text for text in entry["config"]) else 0  # its first run has no head
        heads[without:] = [auxiliary] * (len(heads) - without)
    heads[-1] = costs.head_flops / costs.block_flops
    return splits.candidates(blocks_of(work), ranks, heads, count)


def _costs(entry: Mapping[str, Any], work: Work) -> ModelCosts:
    """Of the model with the heads of a contender."""
    heads = tuple(text for text in entry.get("config", ()) if text.startswith("head."))
    return make_blueprint(Spec("", "", heads).config_of(work), work.vocab_size, None).costs


def head_ratio(work: Work) -> float:
    """R: forward FLOPs of all blocks over those of the model's head."""
    costs = _costs({}, work)
    return blocks_of(work) * costs.block_flops / costs.head_flops
