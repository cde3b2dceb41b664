"""Hugging Face causal language models, whole or in pieces.

A *piece* is the base model (embedding, blocks, no head) of any Hugging Face causal LM in which everything that is not
wanted was replaced by an identity before its weights were made or read, so that only the owned tensors ever exist. The
library's own forward runs it: masks and rotary embeddings need no code here. Blocks keep their global indices, so
checkpoint keys and `config.layer_types` stay right.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from lptransformer.errors import ModelError

EMBEDDING = "embedding"
FINAL = "final"


def _gpt2(sizes: dict[str, Any]) -> GPT2Config:
    return GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_layers"],
        n_head=sizes["num_heads"],
        n_inner=sizes["intermediate_size"],
        n_positions=sizes["max_position_embeddings"],
        bos_token_id=sizes["end_of_text_id"],
        eos_token_id=sizes["end_of_text_id"],
    )


def _llama(sizes: dict[str, Any]) -> LlamaConfig:
    hidden_size = sizes["hidden_size"]
    return LlamaConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden_size,
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_key_value_heads"] or sizes["num_heads"],
        # The usual width of a gated MLP: 8/3 of the hidden size, as many weights as a plain MLP of 4 times it.
        intermediate_size=sizes["intermediate_size"] or -(-8 * hidden_size // 3 // 32) * 32,
        max_position_embeddings=sizes["max_position_embeddings"],
        bos_token_id=sizes["end_of_text_id"],
        eos_token_id=sizes["end_of_text_id"],
    )


FAMILIES = {"gpt2": _gpt2, "llama": _llama}


def new_config(family: str, **sizes: Any) -> Any:
    """The Hugging Face configuration of a new model.

    Sizes: vocab_size, hidden_size, num_layers, num_heads, intermediate_size and num_key_value_heads (None = the
    family's usual), max_position_embeddings, end_of_text_id (None = none).
    """
    return _for_training(FAMILIES[family](sizes))


def read_config(folder: str | Path) -> Any:
    """The configuration of a model folder. Raises ModelError when it is missing, broken or no causal LM."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        _model_class(config)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model.pretrained is {folder}: no causal LM can be read there ({error})") from None
    return _for_training(config)


def _for_training(config: Any) -> Any:
    """Untied, without dropout and without special tokens of its own: what every stage and the export agree on."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and (name.endswith("pdrop") or name.endswith("dropout")):
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def _model_class(config: Any) -> type[PreTrainedModel]:
    return AutoModelForCausalLM._model_mapping[type(config)]


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a causal LM are, as module names below the causal LM's class.

    `before` are the modules that only the first stage needs: token embedding, additive position embeddings, and norms,
    projections and dropouts that stand before the blocks. Everything else beside the blocks (rotary embeddings) stays
    with every stage.
    """

    blocks: str
    token_embedding: str
    before: tuple[str, ...]
    norm: str
    lm_head: str
    hidden_size: int
    vocab_size: int
    block_parameters: int


def anatomy(config: Any) -> Anatomy:
    """Find the parts of the model that `config` describes, from an empty model (nothing is allocated).

    Raises ModelError when the model does not have the shape that can be cut: one list of blocks, norm after it, head.
    """
    with torch.device("meta"), no_init_weights():
        model = _model_class(config)._from_config(config)
    names = {module: name for name, module in model.named_modules()}
    depth = config.num_hidden_layers
    lists = [m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise ModelError(f"{type(model).__name__} cannot be cut: {len(lists)} lists of {depth} blocks instead of one")
    blocks = lists[0]
    parent = model.get_submodule(names[blocks].rpartition(".")[0])
    children = list(parent.children())
    is_norm = [("norm" in type(child).__name__.lower()) for child in children]
    norms = [child for child, norm in zip(children, is_norm, strict=True) if norm][-1:]
    token_embedding, lm_head = model.get_input_embeddings(), model.get_output_embeddings()
    if len(norms) != 1 or not isinstance(lm_head, nn.Linear) or lm_head.bias is not None:
        raise ModelError(f"{type(model).__name__} cannot be cut: it needs a norm beside its blocks and a plain head")
    before = [
        child
        for child, norm in zip(children, is_norm, strict=True)
        if isinstance(child, nn.Embedding | nn.Dropout) or (norm and child is not norms[0])
    ]
    return Anatomy(
        blocks=names[blocks],
        token_embedding=names[token_embedding],
        before=tuple(names[child] for child in before),
        norm=names[norms[0]],
        lm_head=names[lm_head],
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        block_parameters=sum(p.numel() for p in blocks[0].parameters()),
    )


class _Zero(nn.Module):
    """Stands for an additive position embedding after the first stage."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(())  # a scalar takes the dtype and device of what it is added to


@dataclass
class Piece:
    """The owned parts of a model. `base` runs the embedding and blocks; its own final norm is an identity."""

    base: nn.Module
    norm: nn.Module | None
    readout: nn.Linear | None


def _piece_class(config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> type[PreTrainedModel]:
    base_class = _model_class(config)

    def __init__(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        base_class.__init__(self, config, *args, **kwargs)
        block_list = self.get_submodule(parts.blocks)
        for index in range(len(block_list)):
            if index not in blocks:
                block_list[index] = _Passing()
        if not embedding:
            _drop_embedding(self, parts)
        if not final:
            self.set_submodule(parts.norm, nn.Identity())
            self.set_submodule(parts.lm_head, nn.Identity())

    # The library finds key conversions and tied weights by the class's name and module: keep both.
    return type(base_class.__name__, (base_class,), {"__init__": __init__, "__module__": base_class.__module__})


def _drop_embedding(model: PreTrainedModel, parts: Anatomy) -> None:
    for name in parts.before:
        additive = isinstance(model.get_submodule(name), nn.Embedding) and name != parts.token_embedding
        model.set_submodule(name, _Zero() if additive else nn.Identity())


class _Passing(nn.Module):
    """Stands for a block of another stage: hands the hidden states on, whatever else blocks are called with."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


def _finish(model: PreTrainedModel, parts: Anatomy, final: bool) -> Piece:
    norm = model.get_submodule(parts.norm) if final else None
    readout = model.get_submodule(parts.lm_head) if final else None
    model.set_submodule(parts.norm, nn.Identity())
    assert readout is None or isinstance(readout, nn.Linear)
    return Piece(model.base_model, norm, readout)


def unit_seed(seed: int, unit: str) -> int:
    """The seed of one unit (`embedding`, `block 3`, `final`, `head 3`): the same however the model is partitioned."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:8], "big") >> 1


@contextlib.contextmanager
def _seeded(seed: int, unit: str) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(unit_seed(seed, unit))
        yield


def new_piece(config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool, seed: int) -> Piece:
    """The owned parts of a new model, fp32 on the CPU, initialised as the family does, each unit from its own seed."""
    with torch.device("meta"), no_init_weights():
        model = _piece_class(config, parts, blocks, embedding, final)(config)
    model.to_empty(device="cpu")
    units = {f"block {index}": [f"{parts.blocks}.{index}"] for index in blocks}
    if embedding:
        units[EMBEDDING] = list(parts.before)
    if final:
        units[FINAL] = [parts.norm, parts.lm_head]
    model.apply(model._init_weights)  # buffers such as rotary frequencies; the weights follow from their own seeds
    for unit, names in units.items():
        with _seeded(seed, unit):
            for name in names:
                model.get_submodule(name).apply(model._init_weights)
    model.train()
    return _finish(model, parts, final)


def new_head(config: Any, parts: Anatomy, block: int, seed: int) -> tuple[nn.Module, nn.Linear]:
    """Norm and readout for an auxiliary head after `block`: of the classes of the model's own, new weights."""
    with torch.device("meta"), no_init_weights():
        model = _piece_class(config, parts, range(0), False, True)(config)
    norm, readout = model.get_submodule(parts.norm), model.get_submodule(parts.lm_head)
    norm.to_empty(device="cpu"), readout.to_empty(device="cpu")
    with _seeded(seed, f"head {block}"):
        norm.apply(model._init_weights), readout.apply(model._init_weights)
    assert isinstance(readout, nn.Linear)
    return norm.train(), readout.train()


def load_piece(folder: str | Path, config: Any, parts: Anatomy, blocks: range, embedding: bool, final: bool) -> Piece:
    """The owned parts of a model folder, fp32 on the CPU. Only the owned tensors are read.

    A tied readout is read as a copy of the embedding. Raises ModelError when a tensor is missing, truncated or of
    another shape.
    """
    tied = final and config.tie_word_embeddings
    as_stored = copy.deepcopy(config)
    as_stored.tie_word_embeddings = tied
    piece_class = _piece_class(config, parts, blocks, embedding or tied, final)
    try:
        with _quiet_transformers():
            model, loading = piece_class.from_pretrained(
                folder, config=as_stored, dtype=torch.float32, output_loading_info=True, local_files_only=True
            )
    except Exception as error:  # safetensors and the library raise many types for a damaged file
        raise ModelError(f"model.pretrained is {folder}: the weights cannot be read ({error})") from None
    problems = sorted(loading["missing_keys"]) + sorted(str(key) for key in loading["mismatched_keys"])
    if problems:
        raise ModelError(f"model.pretrained is {folder}: tensors missing or of another shape: {', '.join(problems)}")
    piece = _finish(model.train(), parts, final)
    if piece.readout is not None:
        piece.readout.weight = nn.Parameter(piece.readout.weight.detach().clone())
    if tied and not embedding:
        _drop_embedding(model, parts)
    return piece


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Tensors of other stages are reported as unexpected by the library; here they are what a piece leaves out."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
