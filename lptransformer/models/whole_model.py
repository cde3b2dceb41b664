"""The whole Hugging Face model of the weights of stages: up to the last of them, whose head is its norm and readout.

Of an auxiliary head a map before the readout, and a temperature, are folded into the readout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lptransformer.errors import ModelError
from lptransformer.models import hf_config
from lptransformer.models.hf_parts import Anatomy


def whole_weights(parts: Anatomy, of_stages: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of embedding, blocks, final norm and readout under the names of the Hugging Face model.

    `of_stages` are the tensors of every stage in order, under their names in a checkpoint. Raises ModelError where the
    head of the last one is more than a norm and a readout.
    """
    found: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for weights in of_stages:
        found |= {f"{parts.base}.{name[5:]}": tensor for name, tensor in weights.items() if name.startswith("body.")}
        head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    norm = "head.norm."
    found |= {f"{parts.norm}.{name[len(norm) :]}": tensor for name, tensor in head.items() if name.startswith(norm)}
    readout, down = head["head.readout.weight"], head.get("head.down.weight")
    if (temperature := head.get("head.readout.temperature")) is not None:
        readout = readout * temperature
    if parts.projection is not None and down is not None and down.shape[0] == parts.readout_width:
        found[f"{parts.projection}.weight"] = down
    elif parts.projection is not None:
        raise ModelError(f"its head has no map to the width {parts.readout_width}, as {parts.projection} is")
    elif down is not None:
        readout = readout @ down
    found[f"{parts.lm_head}.weight"] = readout
    if (bias := head.get("head.readout.bias")) is not None:
        found[f"{parts.lm_head}.bias"] = bias
    folded = {f"head.{name}" for name in ("readout.weight", "readout.bias", "readout.temperature", "down.weight")}
    if more := sorted(name for name in head if not name.startswith(norm) and name not in folded):
        raise ModelError(f"its head is more than a norm and a readout: it has {more[0]}")
    return found


def cut_config(config: Any, depth: int) -> Any:
    """The configuration of the model's first `depth` blocks; lists with an entry per block are cut with it."""
    before, cut = config.num_hidden_layers, copy.deepcopy(config)
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == before and before > 1:
            setattr(cut, name, value[:depth])
    cut.num_hidden_layers = depth
    return cut


def whole_model(config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The causal LM around `weights` (fp32, not copied), untied and in evaluation mode."""
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config.use_cache = True  # generation is slow without, and nothing else depends on it
    config.dtype = torch.float32
    with no_init_weights():
        model = hf_config.model_class(config)(config)
    # The sampling settings of a model folder's configuration are no result of this run.
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    model.load_state_dict(dict(weights), assign=True)
    return model.eval()
