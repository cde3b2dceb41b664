"""From the stages of a run to a Hugging Face model folder: config, safetensors, tokenizer."""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from lptransformer.errors import RunError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.trained_model import RunModel
from lptransformer.models import hf_config
from lptransformer.run_folder import layout


def export_run(run: Path, out: Path, step: int | None = None) -> int:
    """Write the model of the checkpoint after `step` updates (the newest one by default) to the folder `out`.

    `AutoModelForCausalLM.from_pretrained(out)` is the model up to the last exit, in fp32 and untied, with the logits of
    `RunModel.logits`; auxiliary heads stay behind. Returns the number of updates. The folder appears when it is
    complete. Raises RunError when `out` is a file or not empty, and where the run is missing or damaged.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "is a folder that is not empty" if out.is_dir() else "is a file"
        raise RunError(f"OUT is {out}: that {what}; give a new folder, or an empty one")
    update = trained_model.find_update(run, step)
    tokenizer = run / layout.TOKENIZER
    if not tokenizer.is_dir():
        raise RunError(f"{run} has no folder {layout.TOKENIZER}: a run keeps its tokenizer there")
    run_parts = trained_model.load(run, update)
    model = assemble(run_parts.blueprint.model_config, whole_weights(run_parts))
    unfinished = out.absolute().parent / f".unfinished-{out.absolute().name}-{uuid.uuid4().hex[:12]}"
    try:
        unfinished.mkdir(parents=True)
        for path in tokenizer.iterdir():
            shutil.copyfile(path, unfinished / path.name)
        with hf_config.quiet_transformers():
            model.save_pretrained(unfinished)
        for path in unfinished.iterdir():
            path.chmod(unfinished.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
        os.rename(unfinished, out)
    except OSError as error:
        raise RunError(f"OUT is {out}: it cannot be written: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return update


def whole_weights(model: RunModel) -> dict[str, Tensor]:
    """The weights of embedding, blocks, final norm and readout under the names of the Hugging Face model."""
    parts = model.blueprint.parts
    weights: dict[str, Tensor] = {}
    for stage in model.stages:
        weights |= {f"{parts.base}.{name}": parameter.detach() for name, parameter in stage.body.named_parameters()}
    head = model.stages[-1].head
    assert head is not None
    weights |= {f"{parts.norm}.{name}": parameter.detach() for name, parameter in head.norm.named_parameters()}
    weights[f"{parts.lm_head}.weight"] = head.readout.weight.detach()
    return weights


def assemble(config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The whole causal LM around `weights` (not copied), which are all its parameters. For saving only: its buffers
    are not allocated."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config.use_cache = True  # generation is slow without, and nothing else depends on it
    config.dtype = torch.float32
    model = hf_config.empty_model(hf_config.model_class(config), config)
    # The sampling settings of a model folder's configuration are no result of this run.
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.load_state_dict(dict(weights), assign=True)
    return model
