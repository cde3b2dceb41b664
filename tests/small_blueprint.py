"""Blueprints of small models for tests, without the checks of a configuration: any head, any objective."""

from __future__ import annotations

import copy
from typing import Any

from lptransformer.config.load import load
from lptransformer.methods.heads import HEADS
from lptransformer.models import blueprint as blueprints
from lptransformer.models.blueprint import Blueprint


def small_blueprint(
    model_config: Any,
    name: str = "chunked",
    *,
    head: dict[str, Any] | None = None,
    length: int = 12,
    chunk_tokens: int = 7,
    pipeline: int = 1,
    **options: Any,
) -> Blueprint:
    """The blueprint of a run of windows of `length` tokens; `options` are those of the objective."""
    config = load(
        {
            "model": {"num_layers": model_config.num_hidden_layers},
            "data": {"train": "unused.txt", "sequence_length": length},
            "parallel": {"pipeline": pipeline},
            "objective": {"name": name, **options},
            "loss": {"chunk_tokens": chunk_tokens},
        }
    )
    head = head or {}
    config.head = HEADS[head.get("kind", "private")].options(**head)
    return blueprints.of_model(config, copy.deepcopy(model_config))
