"""Run folders whose files are damaged, each told in one line with its folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lptransformer.errors import ModelError, RunError
from lptransformer.evaluation import trained_model
from lptransformer.run_folder import checkpoint


def test_a_model_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(content: object) -> None:
        raise ModelError("no such family")

    for name in ("read_config", "read_model_config"):
        monkeypatch.setattr(trained_model.layout, name, lambda run: {})
    monkeypatch.setattr(trained_model, "saved_config", damaged)
    with pytest.raises(RunError, match=f"{tmp_path}: its configuration or model.json is damaged: no such family"):
        trained_model.blueprint_of(tmp_path)


@pytest.mark.parametrize("text", ["{}", "not JSON", '{"plan": {"index": 0}, "num_stages": 1}'])
def test_a_state_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / checkpoint.STATE).write_text(text)
    with pytest.raises(RunError, match=f"{tmp_path / checkpoint.STATE} cannot be read"):
        checkpoint.read_state(tmp_path)
