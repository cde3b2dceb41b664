"""The whole Hugging Face model of the weights of stages: up to the last of them, whose head is its norm and readout.

Of an auxiliary head extra blocks stand behind those of the stages, and a map before the readout, and a temperature, are
folded into the readout.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lptransformer.errors import ModelError
from lptransformer.models import hf_config
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.stage import Stage

TRIED_TOKENS = 64  # whose logits are compared
FOLDED = ("readout.weight", "readout.bias", "readout.temperature", "down.weight")  # of a head, into one readout


def exit_model(blueprint: Blueprint, stages: Sequence[Stage]) -> PreTrainedModel:
    """The causal LM up to the exit of the last of these stages (fp32), on their weights: what is not folded is shared.

    The map of a fitted head runs in a hook, so the model is no ordinary one of its family (`is_ordinary`). Raises
    ModelError where the rest is none either.
    """
    parts, last = blueprint.parts, stages[-1]
    of_stages = [dict(stage.state_dict()) for stage in stages]
    fitted = last.head.fitted if last.head is not None else None
    if fitted is not None:  # without blocks it stands for the final norm, and has that in it
        rest = {name.replace("head.norm.norm.", "head.norm."): one for name, one in of_stages[-1].items()}
        of_stages[-1] = {name: rest[name] for name in rest if not name.startswith(("head.map.", "head.norm.linear."))}
    weights = whole_weights(parts, of_stages)
    blocks = [*range(last.plan.last_block + 1), *_blocks_of_head(parts, last.state_dict())]
    model = whole_model(cut_config(blueprint.model_config, blocks), weights)
    if fitted is not None:
        behind = parts.projection or parts.lm_head
        mapped = fitted if fitted.residual else fitted.linear
        before = f"{parts.blocks}.{last.plan.last_block + 1}" if fitted.residual else behind
        model.fitted_map = mapped  # so that it goes to devices and dtypes with the model
        model.get_submodule(before).register_forward_pre_hook(partial(_mapped, mapped), with_kwargs=True)
    return model


def is_ordinary(stage: Stage) -> bool:
    """Whether the model up to the exit of a stage is one of its family."""
    return stage.head is None or stage.head.fitted is None


def _mapped(mapped: nn.Module, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Before a module: its hidden states through the map, the rest as it is."""
    if args:
        return (mapped(args[0]), *args[1:]), named
    return args, named | {"hidden_states": mapped(named["hidden_states"])}


def whole_weights(parts: Anatomy, of_stages: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights of embedding, blocks, final norm and readout under the names of the Hugging Face model.

    `of_stages` are the tensors of every stage in order, under their names in a checkpoint; blocks of the head of the
    last one follow those of the stages. Raises ModelError where that head is more than blocks, a norm and a readout.
    """
    body: dict[str, Tensor] = {}
    head: dict[str, Tensor] = {}
    for weights in of_stages:
        body |= {name[5:]: tensor for name, tensor in weights.items() if name.startswith("body.")}
        head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    found = {f"{parts.base}.{name}": tensor for name, tensor in body.items()}
    in_base, norm = f"{parts.blocks_in_base}.", "head.norm."
    depth = len({name.removeprefix(in_base).partition(".")[0] for name in body if name.startswith(in_base)})
    for place, block in enumerate(_blocks_of_head(parts, head), depth):
        own = f"head.blocks.{in_base}{block}."
        found |= {
            f"{parts.blocks}.{place}.{name[len(own) :]}": one for name, one in head.items() if name.startswith(own)
        }
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
    averages = "head.average."  # of the blocks, which hold them too
    placed = (norm, "head.blocks.", averages, *(f"head.{name}" for name in FOLDED))
    if more := sorted(name for name in head if not name.startswith(placed)):
        raise ModelError(f"its head is more than blocks, a norm and a readout: it has {more[0]}")
    return found


def _blocks_of_head(parts: Anatomy, weights: Mapping[str, Tensor]) -> list[int]:
    """The blocks of the model that those of a stage's head are like, by which they are named in it."""
    prefix = f"head.blocks.{parts.blocks_in_base}."
    return sorted({int(name[len(prefix) :].partition(".")[0]) for name in weights if name.startswith(prefix)})


def cut_config(config: Any, blocks: Sequence[int]) -> Any:
    """The configuration of a model of these blocks of the model; of lists with an entry per block it has theirs."""
    cut = copy.deepcopy(config)
    for name, value in hf_config.per_block(config).items():
        setattr(cut, name, [value[block] for block in blocks])
    cut.num_hidden_layers = len(blocks)
    return cut


def whole_model(config: Any, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The causal LM around `weights` (fp32, not copied), untied and in evaluation mode.

    Raises ModelError where they do not fit the configuration.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = False
    config.use_cache = True  # generation is slow without, and nothing else depends on it
    config.dtype = torch.float32
    with no_init_weights():
        model = hf_config.model_class(config)(config)
    # The sampling settings of a model folder's configuration are no result of this run.
    tokens = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**tokens)
    try:
        model.load_state_dict(dict(weights), assign=True)
    except RuntimeError as error:  # a family whose blocks differ by their place, and a head's block at another one
        raise ModelError(f"its weights are of no {type(model).__name__}: {hf_config.one_line(error)}") from None
    return model.eval()


def tried_ids(blueprint: Blueprint) -> Tensor:
    """The tokens, int64 [1, T], at which the logits of a model are compared with those of its stages."""
    ids = torch.randint(0, blueprint.parts.vocab_size, (1, TRIED_TOKENS), generator=torch.Generator().manual_seed(0))
    return ids[:, : blueprint.sequence_length]


def check_logits(logits: Tensor, own: Tensor, what: str) -> None:
    """Raise ModelError unless a model has the logits of the stages, but for the rounding of a folded readout."""
    off, size = float((logits - own).abs().max()), float(own.abs().max())
    if not off <= 1e-4 * max(size, 1.0):
        raise ModelError(f"{what} does not have the logits of its stages: they differ by up to {off:.3g} of {size:.3g}")
