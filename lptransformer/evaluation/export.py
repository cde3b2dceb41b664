"""From the stages of a run to a Hugging Face model folder: config, safetensors, tokenizer, a model card.

What the run's model was made from comes back as it was: its dtype, its generation settings, its tokenizer's files. The
folder is opened once, as anybody will open it, and gives the run's logits, or nothing is left of it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lptransformer import files
from lptransformer.console import bar
from lptransformer.errors import ModelError, RunError, UserError
from lptransformer.evaluation import model_card, trained_model
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.models import adapters, exits, hf_config
from lptransformer.models.stage import Stage
from lptransformer.models.whole_model import check_logits, exit_model, is_ordinary, tried_ids
from lptransformer.run_folder import layout, saved_stage

EXPORTED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD = "5GB"  # the largest file of weights
Tie = Literal["auto", "keep", "separate"]


@dataclass(frozen=True)
class Exported:
    """Updates of the checkpoint, and what a person should know: a line each."""

    update: int
    notes: tuple[str, ...]


def export_run(
    run: Path,
    out: Path,
    step: int | None = None,
    *,
    tie: Tie = "auto",
    dtype: str | None = None,
    exit_block: int | None = None,
    keep_exits: bool = False,
) -> Exported:
    """Write the model of the checkpoint after `step` updates (the newest one by default) to the folder `out`.

    `AutoModelForCausalLM.from_pretrained(out)` is the model up to the last exit, or the one after `exit_block`, with
    the logits of `RunModel.logits`. `tie`: embedding and readout are one matrix where they are equal and the model
    was tied before (auto), or must be (keep), or are two (separate). `dtype` is by default that of the model folder
    that the run started from, else fp32. Auxiliary heads stay behind, or beside the model (`keep_exits`;
    models/exits.py). The folder appears when it is complete. Raises RunError when `out` is a file or not empty, and
    where the run is missing or damaged; ModelError where the exit, or what is to be tied, does not allow it.
    """
    _check_empty(out)
    update = trained_model.find_update(run, step)
    if not (run / layout.TOKENIZER).is_dir():
        raise RunError(f"{run} has no folder {layout.TOKENIZER}: {layout.WITHOUT_TOKENIZER}")
    with bar("exporting", 2 * len(saved_stage.folders(run, update))) as advance:  # reading, then writing
        model = trained_model.load(run, update, advance=advance)
        stages = model.stages[: stage_of_exit(model, exit_block).plan.index + 1]
        notes = _write(run, model, stages, out, tie, dtype, keep_exits, advance)
    return Exported(update, tuple(notes))


def export_adapter(run: Path, out: Path, step: int | None = None) -> Exported:
    """Write the adapters of the checkpoint after `step` updates to the folder `out`, as peft saves them.

    `PeftModel.from_pretrained(base, out)` is the run's model, where `base` is the one that it started from. Raises
    RunError as `export_run`, and where the run has no adapters.
    """
    _check_empty(out)
    update = trained_model.find_update(run, step)
    blueprint, pretrained = trained_model.blueprint_of(run), layout.read_config(run).model.pretrained
    if blueprint.adapters is None or pretrained is None:
        raise RunError(f"--adapter: {run} has none (lora.rank is null): export it without")
    weights: dict[str, Tensor] = {}
    for folder in saved_stage.folders(run, update):
        weights |= saved_stage.read_weights(folder, lambda name: ".lora_" in name)
    with _appearing(out) as unfinished:
        adapters.write(unfinished, weights, blueprint.adapters, blueprint.parts, pretrained)
    return Exported(update, (f"it belongs to {pretrained}",))


def _check_empty(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is a folder that is not empty" if out.is_dir() else "is a file"
        raise RunError(f"OUT is {out}: that {what}; give a new folder, or an empty one")


@contextlib.contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that takes the place of `out` when all is in it; nothing is left of it where that fails."""
    try:
        with files.unfinished(out.absolute()) as unfinished:
            yield unfinished
            for path in unfinished.iterdir():
                path.chmod(unfinished.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
            files.sync_all(unfinished)
            os.rename(unfinished, out)
            files.sync(out.absolute().parent)
    except OSError as error:
        raise RunError(f"OUT is {out}: it cannot be written: {error}") from None


def stage_of_exit(model: RunModel, block: int | None) -> Stage:
    """The stage whose head is the exit after `block`, the last one for None. Raises UserError where there is none."""
    by_block = {stage.plan.last_block: stage for stage in model.exits}
    if block is not None and block not in by_block:
        there = ", ".join(map(str, by_block))
        raise UserError(
            f"--exit {block}: the run has exits after the blocks {there} (counted from 0, as evaluate does)"
        )
    return by_block[max(by_block) if block is None else block]


def _write(
    run: Path,
    model: RunModel,
    stages: list[Stage],
    out: Path,
    tie: Tie,
    dtype: str | None,
    keep_exits: bool,
    advance: Callable[[int], None],
) -> list[str]:
    config, ids = model.blueprint.model_config, tried_ids(model.blueprint)
    if not is_ordinary(stages[-1]):
        raise ModelError(
            f"--exit {stages[-1].plan.last_block}: it is no ordinary model: in its fitted head a linear map stands "
            "before copies of the last blocks or the readout, and the family has no place for it. `evaluate` and "
            "`generate` take it with the whole model: export with --keep-exits"
        )
    try:
        whole: Any = exit_model(model.blueprint, stages)
    except ModelError as error:
        raise ModelError(f"--exit {stages[-1].plan.last_block}: it is no ordinary model: {error}") from None
    own = replace(model, stages=stages).logits(ids)
    name = dtype or _own_dtype(config)
    was_tied = bool(config.tie_word_embeddings) and layout.read_config(run).model.pretrained is not None
    notes = [_tie(whole, tie, was_tied, EXPORTED[name].itemsize)]
    whole.to(EXPORTED[name])
    whole.config.dtype = whole.dtype
    with _appearing(out) as unfinished:
        for path in (run / layout.TOKENIZER).iterdir():
            shutil.copyfile(path, unfinished / path.name)
        with hf_config.quiet_transformers():
            whole.save_pretrained(unfinished, max_shard_size=SHARD)
        _as_before(run / layout.PRETRAINED, unfinished)
        _for_older_versions(unfinished)
        if keep_exits:
            exits.write(unfinished, model.blueprint, [stage for stage in stages[:-1] if stage.head is not None])
        del whole
        gc.collect()
        advance(len(model.stages))
        notes += _compare(unfinished, ids, own, name)
        (unfinished / "README.md").write_text(model_card.text(run, model, stages[-1].plan.last_block, name))
    return [note for note in notes if note]


def _own_dtype(config: Any) -> str:
    """The name of the dtype that the model's folder said, fp32 of a new model."""
    said = str(config.dtype).removeprefix("torch.")
    return next((name for name, of in EXPORTED.items() if str(of) == f"torch.{said}"), "fp32")


@torch.no_grad()
def _tie(model: Any, tie: Tie, was_tied: bool, bytes_per_weight: int) -> str:
    """Make embedding and readout one matrix, or leave them two; says which where that is news."""
    readout, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    differ = float("inf") if readout.shape != embedding.shape else float((readout - embedding).abs().max())
    if tie == "keep" and differ > 0:
        raise ModelError(
            f"--tie keep: embedding and readout differ by up to {differ:.3g} (they were trained apart): give separate"
        )
    if tie == "keep" or (tie == "auto" and was_tied and differ == 0):
        model.config.tie_word_embeddings = True
        model.tie_weights()
        return ""
    if not was_tied:
        return ""
    return (
        f"embedding and readout were one matrix before training, and are two now (they differ by up to {differ:.3g}): "
        f"{readout.numel() * bytes_per_weight / 1e6:.0f} MB more"
    )


def _as_before(pretrained: Path, folder: Path) -> None:
    """What training has no use for, as the model folder had it: dropout, and all of the generation settings."""
    if (before := pretrained / "config.json").is_file():
        path = folder / "config.json"
        dropout = {name: value for name, value in json.loads(before.read_text()).items() if "drop" in name}
        path.write_text(json.dumps(json.loads(path.read_text()) | dropout))
    if (before := pretrained / "generation_config.json").is_file():
        shutil.copyfile(before, folder / "generation_config.json")


def _for_older_versions(folder: Path) -> None:
    """What transformers 4 reads under other names: the rotary embedding's numbers, the tokenizer's class, its extra
    tokens."""
    config = folder / "config.json"
    config.write_text(json.dumps(hf_config.with_older_names(json.loads(config.read_text())), indent=2) + "\n")
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(content.get("extra_special_tokens"), list):
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _compare(folder: Path, ids: Tensor, own: Tensor, dtype: str) -> list[str]:
    """Open the folder; its logits are those of the run, in fp32 bit for bit (a folded readout: but for rounding)."""
    with torch.no_grad(), hf_config.quiet_transformers():
        opened: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        logits = opened.eval()(ids, use_cache=False).logits.float()
    if dtype != "fp32":
        off, size = float((logits - own).abs().max()), float(own.abs().max())
        return [
            f"rounding to {dtype} changes logits by up to {off:.3g} (the largest is {size:.3g}); --dtype fp32 does not"
        ]
    check_logits(logits, own, "the exported model")
    return []
