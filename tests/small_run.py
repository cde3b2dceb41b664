"""A text and a configuration so small that the command line can train them in a test."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune.\n" * 40
CONFIG: dict[str, Any] = {
    "model": {"hidden_size": 16, "num_layers": 2, "num_heads": 2},
    "data": {"train": "text.txt", "valid": "text.txt", "tokenizer": "bytes", "sequence_length": 16},
    "train": {"steps": 2, "micro_batch_size": 2, "micro_batches_per_update": 2, "lr_scheduler": "constant"},
    "run": {"dir": "run"},
}


def contents(folder: Path) -> dict[str, str]:
    """The sums of all files below a folder, by path: equal where nothing has changed."""
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, config: Mapping[str, Any] = CONFIG) -> Path:
    """Work in `folder`, with the text in text.txt and the configuration in c.yaml, as one process under no launcher."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    (folder / "text.txt").write_text(TEXT)
    (folder / "c.yaml").write_text(yaml.safe_dump(dict(config)))
    return folder
