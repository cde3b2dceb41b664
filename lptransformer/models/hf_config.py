"""Configurations of Hugging Face causal language models: new ones, of a folder, of a run, of a model in memory; empty
models of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel
from transformers import utils as transformers_utils
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from lptransformer import hub
from lptransformer.errors import ModelError, OptionError

_FLASH = ("flash_attention_2", "flash_attention_3", "flash_attention_4")


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
    return for_training(FAMILIES[family](sizes))


def read_config(folder: str | Path) -> Any:
    """The configuration of a model folder. Raises ModelError when it is missing, broken or no causal LM.

    A model that needs code from the folder is refused too: the library would ask on the terminal whether to run it.
    """
    where = f"the model in {folder}: no causal LM can be read there"
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a file written by anyone can make the library raise
        code = hub.names_code(Path(folder) / "config.json")
        why = "it needs code of its own (auto_map in config.json), which is never run" if code else one_line(error)
        raise ModelError(f"{where}: {why}") from None
    if why := _no_causal_lm(config) or _kernel(config):
        raise ModelError(f"{where}: {why}")
    return for_training(config)


def described(model: Any, scratch: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder below `scratch` with what `save_pretrained` writes of a model but its weights; those as they are in
    memory, not copied, by name.

    Raises ModelError for what is no plain causal LM of the library.
    """
    if not isinstance(model, PreTrainedModel):
        raise ModelError(f"model is a {type(model).__name__}: give a folder, OWNER/NAME, or a transformers causal LM")
    config = copy.deepcopy(model.config)
    config.architectures, config.dtype = [type(model).__name__], model.dtype
    name = Path(model.name_or_path).name
    folder = scratch / (type(model).__name__ if name in ("", "..") else name)
    folder.mkdir()
    (folder / "config.json").write_text(config.to_json_string())
    if model.can_generate() and model.generation_config is not None:
        model.generation_config.to_json_file(folder / "generation_config.json")
    read, name = read_config(folder), type(model).__name__
    right = model_class(read)
    if name != right.__name__:
        raise ModelError(f"model is a {name}: what is trained is its causal LM, {right.__name__}")
    weights = model.state_dict()
    for wanted, shape in ((one, weight.shape) for one, weight in empty_model(right, read).state_dict().items()):
        found = weights.get(wanted)
        if found is None or found.shape != shape or found.is_meta or not found.is_floating_point():
            has = "none" if found is None else f"one of {found.dtype}, {tuple(found.shape)}, on {found.device}"
            raise ModelError(
                f"model, a {name}: for the weight {wanted} {tuple(shape)} it has {has}: give a model without adapters, "
                "quantization or offloading"
            )
    return folder, weights


def _no_causal_lm(config: Any) -> str:
    """Why a configuration is not one of a decoder of text that is trained by itself; empty where it is."""
    name = type(config).__name__
    if config.is_encoder_decoder:
        return f"{name} is of an encoder and a decoder"
    if "text_config" in config.sub_configs:
        return f"{name} is of several models, not of text alone; a folder of its text model can be trained"
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return f"the library has no causal LM of {name}"
    return ""


def _kernel(config: Any) -> str:
    """Which code a configuration names for the library's package `kernels` to fetch from the hub and run; empty for
    none."""
    for name in ("attn_implementation", "experts_implementation"):
        if "/" in (value := str(getattr(config, f"_{name}", None))):
            return f"{name} = {value} is a kernel of the hub, which is code and never run: leave it out of config.json"
    return ""


def saved_config(content: Mapping[str, Any]) -> Any:
    """The configuration that `to_dict()` of one gave. Raises ModelError when it is no causal LM's."""
    try:
        config = CONFIG_MAPPING[content["model_type"]].from_dict(dict(content))
        model_class(config)
    except Exception as error:
        raise ModelError(f"the configuration is of no causal LM: {one_line(error)}") from None
    if why := _kernel(config):
        raise ModelError(why)
    return for_training(config)


def for_training(config: Any) -> Any:
    """Without dropout, without skipped blocks, without a cache of keys and values."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "drop" in name:
            setattr(config, name, 0.0)
    config.use_cache = False
    return config


def with_attention(config: Any, name: str) -> Any:
    """A configuration whose models compute attention so; `auto` leaves it to the library, and to the configuration."""
    if name == "auto":
        return config
    config = copy.deepcopy(config)
    config._attn_implementation = name
    return config


def check_attention(config: Any, name: str) -> None:
    """Raises OptionError where the family cannot compute attention so.

    The library is not asked to try: for some families, or for a missing package, it would fetch a kernel of the hub.
    """
    of_class: Any = model_class(config)
    flash = [one for one in _FLASH if of_class._supports_flash_attn]
    if (own := getattr(of_class, "_compatible_flash_implementations", None)) is not None:
        flash = [one for one in flash if one in own]
    names = ["auto", "eager", *(["sdpa"] if of_class._supports_sdpa else []), *flash]
    names += ["flex_attention"] if of_class._supports_flex_attn else []
    if name not in names:
        raise OptionError("model.attention", name, f"{of_class.__name__} has {', '.join(names)}")


def missing_for_attention(name: str) -> str:
    """What this host lacks to compute attention so; empty for nothing."""
    if name not in (*_FLASH, "flex_attention"):
        return ""
    there = getattr(transformers_utils, f"is_flash_attn_{name[-1]}_available", lambda: False)
    if name in _FLASH and not there():
        return "its package, or the version that transformers needs, does not import"
    return "" if torch.cuda.is_available() else "there is no GPU"


def check_no_noise(config: Any) -> None:
    """Raises ModelError where a configuration asks for random numbers in training that are no dropout: no run could be
    repeated. They are not turned off silently: in some families evaluation depends on the same number (Phi-3.5-MoE)."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and "jitter" in name and value > 0:
            raise ModelError(
                f"{name} = {value} in the model's config.json: its routers draw random numbers in training, so no run "
                "could be repeated: set it to 0 there"
            )


def per_block(config: Any) -> dict[str, list[Any]]:
    """What a configuration has in a list with an entry per block. Ids of tokens may be as many, and are none."""
    depth = config.num_hidden_layers
    lists = {name: one for name, one in config.to_dict().items() if isinstance(one, list) and "token" not in name}
    return {name: one for name, one in lists.items() if len(one) == depth > 1}


def with_older_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json with what transformers 4 reads elsewhere: it looks for the rotary embedding's
    numbers at the top level, and takes its own defaults where there are none."""
    rotary = content.get("rope_parameters")
    if not isinstance(rotary, dict):
        return dict(content)
    local = rotary.get("sliding_attention")
    main = dict(rotary.get("full_attention") or ({} if local else rotary))  # some families have one per kind of layer
    found = {"rope_theta": main.pop("rope_theta", None)}
    if isinstance(local, dict):
        found["rope_local_base_freq"] = local.get("rope_theta")
    if (share := main.pop("partial_rotary_factor", None)) is not None:
        found |= {"partial_rotary_factor": share, "rotary_pct": share}
    found["rotary_emb_base"] = found["rope_theta"] if "rotary_pct" in found else None
    named = {name: value for name, value in found.items() if value is not None and name not in content}
    if local is None:  # else this version would read it instead of what it has per kind of layer
        named["rope_scaling"] = main if main.get("rope_type", "default") != "default" else None
    return {**content, **named}


def model_class(config: Any) -> type[PreTrainedModel]:
    """The causal LM that a configuration is of; KeyError where the library has none."""
    return AutoModelForCausalLM._model_mapping[type(config)]


def empty_model(of_class: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """A model of a class with nothing allocated."""
    with torch.device("meta"), no_init_weights():
        return of_class(config)


def one_line(error: Exception) -> str:
    """An error of the library in one short line: its first two lines that hold text."""
    lines = [line.strip(" -*|\t") for line in str(error).splitlines()]
    return f"{type(error).__name__}: {' '.join([line for line in lines if line][:2])[:300]}"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Tensors of other stages are reported as unexpected by the library; here they are what a piece leaves out."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
