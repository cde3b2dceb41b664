"""Families of Hugging Face as tiny models: trained in pieces as the library trains them, or refused with the reason."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REFUSED, TRAINED, page
from transformers import AutoModelForCausalLM, LlamaConfig

from lptransformer.config.load import load
from lptransformer.errors import ModelError
from lptransformer.models import family_check, hf_config
from lptransformer.models.blueprint import make_blueprint

ROOT = Path(__file__).parents[2]


def prepared(config: Any) -> Any:
    return hf_config.for_training(copy.deepcopy(config))


@pytest.mark.parametrize("name", TRAINED)
def test_pieces_train_as_the_library_s_model_does(name: str) -> None:
    family_check.check(prepared(TRAINED[name]))


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_wrongly_is_refused(name: str) -> None:
    config, _ = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        family_check.check(prepared(config))
    message = str(caught.value)
    assert "cannot be" in message and "\n" not in message
    if name == "BART's decoder":
        assert "final norm does not take what its last block gives" in message
    if "is_causal" in name:
        assert "it is not causal: the last token changes the logits before it" in message


def test_the_page_is_that_of_the_list() -> None:
    assert (ROOT / "docs" / "families.md").read_text() == page()


def test_large_models_are_tried_small() -> None:
    large = LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    small = family_check.shrunk(large)
    assert (small.num_hidden_layers, small.vocab_size) == (2, 256)
    assert family_check._parameters(small) <= family_check.MOST_PARAMETERS
    assert small.num_attention_heads // small.num_key_value_heads == 8


def test_a_large_model_is_not_built_where_a_small_one_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures that route to more experts than the small model has; every process would build the whole."""
    config = copy.deepcopy(TRAINED["Qwen3-MoE"])
    config.num_experts_per_tok = 8
    monkeypatch.setattr(family_check, "LARGEST", 10)
    with pytest.raises(ModelError, match="too many"):
        family_check.check(prepared(config))


def test_two_blocks_of_every_kind_are_kept() -> None:
    kinds = ["full_attention", *["sliding_attention"] * 3] * 2
    config = copy.deepcopy(TRAINED["Gemma 3"])
    config.num_hidden_layers, config.layer_types = 8, kinds
    assert family_check.shrunk(config).layer_types == ["full_attention", *["sliding_attention"] * 2, "full_attention"]


def test_a_folder_that_sees_the_future_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(TRAINED["Llama"])
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"is_causal": False}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")  # nobody reads it
    raw = {"model": {"pretrained": str(tmp_path / "model")}, "data": {"train": "x", "sequence_length": 16}}
    with pytest.raises(ModelError, match="it is not causal"):
        make_blueprint(load(raw), None, None)


def test_a_check_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    family_check._passed.clear()
    family_check.check(prepared(TRAINED["Llama"]))
    assert torch.equal(torch.rand(3), expected)
