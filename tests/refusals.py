"""How a configuration is refused: the message, and what it says."""

from __future__ import annotations

from typing import Any

import pytest

from lptransformer.config.load import load
from lptransformer.errors import ConfigError, UserError

DATA = {"data": {"train": "books/*.txt"}}


def message(source: Any, *overrides: str, kind: type[UserError] = ConfigError) -> str:
    """The message with which `load` refuses."""
    with pytest.raises(kind) as caught:
        load(source, overrides)
    assert isinstance(caught.value, kind) and caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text and "pydantic" not in text
    return text


def says(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, f"{part!r} is missing in: {text}"
