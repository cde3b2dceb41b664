"""The exits of a model, kept beside its folder: `exits.safetensors`, the auxiliary heads by the block they stand after.

The names of tensors are `BLOCK.` and the name below the head; the metadata say the kind of head and its options, which
is what it takes to build them again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from lptransformer.models.blueprint import Blueprint
from lptransformer.models.stage import Stage

FILE = "exits.safetensors"
FORMAT = 1


def write(folder: Path, blueprint: Blueprint, stages: Sequence[Stage]) -> None:
    """The heads of these stages; no file where there are none."""
    tensors = {}
    for stage in stages:
        assert stage.head is not None
        for name, tensor in stage.head.state_dict().items():
            tensors[f"{stage.plan.last_block}.{name}"] = tensor.contiguous()
    if tensors:
        metadata = {"format": str(FORMAT), "head": json.dumps(blueprint.head.model_dump())}
        save_file(tensors, folder / FILE, metadata)
