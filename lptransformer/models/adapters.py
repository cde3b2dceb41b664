"""LoRA (2106.09685): trained low-rank maps beside the linear maps of the blocks, which stay as they were.

`peft` makes and runs them in training; they are merged here, so that whoever reads a run needs no peft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lptransformer.errors import ConfigError, OptionError
from lptransformer.models import hf_config
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.seeds import unit_seed

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_LORA = "default"  # peft's name of the only adapter


@dataclass(frozen=True)
class Target:
    """A linear map that has an adapter; with `transposed` its weight is [in, out]."""

    inputs: int
    outputs: int
    transposed: bool


@dataclass(frozen=True)
class Adapters:
    """What is added to the output of every target: alpha / rank x B A, A [rank, in] and B [out, rank]. The targets are
    by their names in the Hugging Face model."""

    rank: int
    alpha: float
    targets: Mapping[str, Target]

    def weights(self, name: str) -> dict[str, int]:
        """The names of a target's adapter and how many weights they have."""
        target = self.targets[name]
        return {f"{name}.lora_A.weight": self.rank * target.inputs, f"{name}.lora_B.weight": self.rank * target.outputs}

    @property
    def size(self) -> int:
        """Weights of all adapters."""
        return sum(sum(self.weights(name).values()) for name in self.targets)


def find(config: Any, parts: Anatomy, rank: int, alpha: float | None, wanted: list[str] | None) -> Adapters:
    """The adapters of a model: at the linear maps of its blocks whose name ends with a `wanted` one (None: at all).

    Raises OptionError for one that no linear map has.
    """
    model = hf_config.empty_model(hf_config.model_class(config), config)
    linear: dict[str, Target] = {}
    for name, module in model.named_modules():
        if name.startswith(f"{parts.blocks}.") and isinstance(module, nn.Linear | Conv1D):
            transposed = isinstance(module, Conv1D)
            inputs, outputs = module.weight.shape if transposed else module.weight.T.shape
            linear[name] = Target(inputs, outputs, transposed)

    def called(name: str, one: str) -> bool:
        return name == one or name.endswith(f".{one}")

    for one in wanted or []:
        if not any(called(name, one) for name in linear):
            there = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise OptionError("lora.targets", wanted, f"no linear map of the blocks is called {one}; there are {there}")
    targets = {name: one for name, one in linear.items() if wanted is None or any(called(name, w) for w in wanted)}
    return Adapters(rank, 2.0 * rank if alpha is None else alpha, targets)


def add(body: nn.Module, parts: Anatomy, blocks: range, adapters: Adapters, seed: int) -> None:
    """Give the targets in these blocks of a stage's body their adapters, those of every block from a seed of its own.

    Raises ConfigError where peft is not installed.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ConfigError('lora.rank needs peft, which is not installed: pip install "lptransformer[lora]"') from None
    of_block = {block: [n for n in adapters.targets if n.startswith(f"{parts.blocks}.{block}.")] for block in blocks}
    names = {name: name.removeprefix(f"{parts.base}.") for found in of_block.values() for name in found}
    if not names:
        return
    options = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        target_modules=list(names.values()),
        fan_in_fan_out=any(adapters.targets[name].transposed for name in names),
    )
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(options, body)
        for block, found in of_block.items():
            torch.manual_seed(unit_seed(seed, f"adapter {block}"))
            for name in found:
                layer: Any = body.get_submodule(names[name])
                layer.reset_lora_parameters(_LORA, init_lora_weights=True)


def saved_name(name: str) -> str:
    """A stage's tensor in a checkpoint: of a target as without an adapter, of an adapter as peft saves it."""
    return (
        name.replace(".base_layer.", ".")
        .replace(f".lora_A.{_LORA}.", ".lora_A.")
        .replace(f".lora_B.{_LORA}.", ".lora_B.")
    )


def merged(weights: Mapping[str, Tensor], adapters: Adapters, parts: Anatomy) -> dict[str, Tensor]:
    """A stage's tensors, of a checkpoint, as those of a stage without adapters; what one is added to is in fp32."""
    found = {name: tensor for name, tensor in weights.items() if ".lora_" not in name}
    for name, target in adapters.targets.items():
        own = f"body.{name.removeprefix(f'{parts.base}.')}"
        if f"{own}.lora_A.weight" in weights:
            down, up = weights[f"{own}.lora_A.weight"].float(), weights[f"{own}.lora_B.weight"].float()
            change = adapters.alpha / adapters.rank * (up @ down)
            found[f"{own}.weight"] = found[f"{own}.weight"].float() + (change.T if target.transposed else change)
    return found


def write(folder: Path, weights: Mapping[str, Tensor], adapters: Adapters, parts: Anatomy, base: str) -> None:
    """The folder that `PeftModel.from_pretrained` opens beside the model `base`, from the tensors of all stages."""
    named = {parts.whole_name(name, False): one.contiguous() for name, one in weights.items() if ".lora_" in name}
    save_file({f"base_model.model.{name}": one for name, one in named.items()}, folder / WEIGHTS, {"format": "pt"})
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "target_modules": sorted(adapters.targets),
        "fan_in_fan_out": any(target.transposed for target in adapters.targets.values()),
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
