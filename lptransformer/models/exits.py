"""The exits of a model, kept beside its folder: `exits.safetensors`, the auxiliary heads by the block they stand after.

The names of tensors are `BLOCK.` and the name below the head; the metadata say the kind of head and its options, which
is what it takes to build them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lptransformer.config.schema import section_type
from lptransformer.errors import ModelError
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import Head
from lptransformer.models.stage import Stage, empty_head

FILE = "exits.safetensors"
FORMAT = "1"


def write(folder: Path, blueprint: Blueprint, stages: Sequence[Stage]) -> None:
    """The heads of these stages; no file where there are none."""
    tensors = {}
    for stage in stages:
        assert stage.head is not None
        for name, tensor in stage.head.state_dict().items():
            tensors[f"{stage.plan.last_block}.{name}"] = tensor.contiguous()
    if tensors:
        save_file(tensors, folder / FILE, {"format": FORMAT, "head": json.dumps(blueprint.head.model_dump())})


def kept(folder: Path) -> list[int]:
    """The blocks after which there is an exit beside a model folder. Raises ModelError where the file is damaged."""
    path = folder / FILE
    if not path.is_file():
        return []
    try:
        with safe_open(path, "pt") as file:
            if file.metadata().get("format") != FORMAT:
                raise ModelError(f"{path}: has format {file.metadata().get('format')}, and this version reads {FORMAT}")
            return sorted({int(name.partition(".")[0]) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None


def read(folder: Path, blueprint: Blueprint, block: int) -> Head:
    """The head after a block, fp32. Raises ModelError where it does not fit the model."""
    path = folder / FILE
    with safe_open(path, "pt") as file:
        options = json.loads(file.metadata()["head"])
    head = section_type("head", options["kind"]).model_validate(options)
    made = empty_head(block, replace(blueprint, head=head))  # type: ignore[arg-type]
    of_block = f"{block}."
    weights = {name.removeprefix(of_block): one for name, one in load_file(path).items() if name.startswith(of_block)}
    try:
        made.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{path}: the exit after block {block} does not fit the model: {error}") from None
    return made.eval()
