"""Run folders without training: what `train` leaves behind, with weights from seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lptransformer import files
from lptransformer.config.load import load
from lptransformer.data.prepare import prepare_all
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.stage import make_stage
from lptransformer.run_folder import checkpoint, layout, saved_stage
from lptransformer.run_folder.saved_stage import StageContent

WINDOW = 16
TEXT = "The moor was wide, and the wind had a voice of its own; who heard it once never lost it. " * 12
FEW = {"hidden_size": 32, "num_layers": 4, "num_heads": 4}


def write_text(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_run(
    folder: Path,
    *,
    model: Mapping[str, Any] | None = None,
    head: Mapping[str, Any] | None = None,
    chunks: int = 2,
    pipeline: int = 1,
    tokenizer: str = "bytes",
    valid: Mapping[str, str] | None = None,
    data: Mapping[str, Any] | None = None,
    updates: tuple[int, ...] = (10,),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A run in `folder`/run, with its texts in `folder`/texts and its token sets in `folder`/cache.

    `valid` are the texts of the validation sets; `data` are keys of that section that replace these.
    Each of `updates` gets a complete checkpoint with other weights.
    """
    train = write_text(folder / "texts" / "train.txt", TEXT * 3)
    texts = {name: write_text(folder / "texts" / f"{name}.txt", text) for name, text in (valid or {}).items()}
    raw = {
        "model": {**FEW, **(model or {})},
        "data": {
            "train": str(train),
            "valid": {name: str(path) for name, path in texts.items()},
            "tokenizer": tokenizer,
            "sequence_length": WINDOW,
            "cache": str(folder / "cache"),
        },
        "objective": {"chunks": chunks},
        "parallel": {"pipeline": pipeline},
        "head": head or {},
        "loss": {"chunk_tokens": 24},
        "run": {"dir": str(folder / "run")},
    }
    raw["data"].update(data or {})
    if tokenizer == "sentencepiece":
        raw["data"]["vocab_size"] = 300
    config = load(raw)
    prepared = prepare_all(**config.data.model_dump(), progress=False)
    blueprint = make_blueprint(config, prepared.tokenizer.vocab_size, prepared.tokenizer.end_of_text_id)
    run = folder / "run"
    valid_sets = {name: str(one.folder.absolute()) for name, one in prepared.valid.items()}
    model_config = blueprint.model_config.to_dict()
    layout.create(run, config, model_config, prepared.tokenizer_folder, {"valid": valid_sets}, ["a test"])
    for update in updates:
        sums: dict[str, Any] = {}
        for plan in blueprint.stages:
            stage = make_stage(plan, blueprint, seed=update, pretrained=config.model.pretrained)
            weights = {name: _shaken(name, tensor, update) for name, tensor in stage.state_dict().items()}
            weights = {name: weight.to(dtype) for name, weight in weights.items()}
            position = {"epoch": 0, "offset": update}
            state = saved_stage.describe(
                plan, len(blueprint.stages), update, position, config.train.dtype, blueprint.head.model_dump()
            )
            content = StageContent(state=state, weights=weights)
            sums |= saved_stage.write(run, update, plan.index, 0, content)
        checkpoint.finish(run, update, sums)
    return run


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> None:
    """Change the weights of a saved stage, and say so in the marker of its checkpoint."""
    path = folder / saved_stage.WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path)
    remark(folder.parent)


def remark(folder: Path) -> None:
    """Give the marker of a checkpoint the sums of its files as they are."""
    marker = json.loads((folder / checkpoint.COMPLETE).read_text())
    marker["files"] = {path: files.record(folder / path) for path in marker["files"]}
    (folder / checkpoint.COMPLETE).write_text(json.dumps(marker))


def _shaken(name: str, weight: Tensor, seed: int) -> Tensor:
    """No weight keeps a value that would hide a mistake, such as a bias of 0 or a norm of 1."""
    generator = torch.Generator().manual_seed(seed * 1000 + len(name))
    return weight + 0.1 * torch.randn(weight.shape, generator=generator)
