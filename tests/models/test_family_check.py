"""Families of Hugging Face as tiny models: trained in pieces as the library trains them, or refused with the reason."""

from __future__ import annotations

import copy
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from families import BLOCKS, LEAKING, REFUSED, TRAINED, page
from transformers import AutoModelForCausalLM, BartConfig, BltConfig, Gemma3Config, LlamaConfig, T5Config, ViTConfig

from lptransformer.config.load import load
from lptransformer.errors import ModelError
from lptransformer.models import family_check, hf_config, hf_parts
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.hf_parts import Anatomy
from lptransformer.models.whole_model import cut_config

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-6
CUTS = {2: [range(0, 2), range(2, 4)], 4: [range(one, one + 1) for one in range(BLOCKS)]}


@pytest.fixture(autouse=True)
def nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(family_check, "_passed", set())


def prepared(config: Any) -> Any:
    return hf_config.for_training(copy.deepcopy(config))


def tiny(config: Any) -> tuple[Any, Any, Anatomy]:
    """The library's model, its configuration, its parts."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config), config, hf_parts.anatomy(config)


@pytest.mark.parametrize("name", TRAINED)
def test_pieces_train_as_the_library_s_model_does(name: str) -> None:
    """Documents in a window, too: four pieces are then the library's model, whether it keeps them apart or not."""
    whole, config, parts = tiny(prepared(TRAINED[name]))
    family_check.compare(whole, config, parts, CUTS[4], TOLERANCE)
    whole.eval()
    joined, ids = family_check.pieces(whole, config, parts, CUTS[4]), family_check._tokens()
    half = ids.shape[1] // 2
    packed = (torch.arange(ids.shape[1]) % half).expand_as(ids)
    with torch.no_grad():
        logits = whole(input_ids=ids, position_ids=packed, use_cache=False).logits
        ours = (
            joined[-1].head(16, parts.logit_rule).logits(family_check.hidden_states(joined, ids, position_ids=packed))
        )
    assert torch.equal(ours, logits)
    assert (family_check.leak(whole) > 1e-5) == (name in LEAKING)


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_tied_or_not_in_two_pieces(name: str) -> None:
    config = prepared(TRAINED[name])
    for tied in (True, False):
        config.tie_word_embeddings = tied
        family_check.compare(*tiny(config), CUTS[2], TOLERANCE)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_train_wrongly_is_refused(name: str) -> None:
    config, why = REFUSED[name]
    with pytest.raises(ModelError) as caught:
        family_check.check(prepared(config))
    message = str(caught.value)
    assert "cannot be" in message and why in message and "\n" not in message


def test_documents_that_are_not_kept_apart_are_refused_where_they_have_to_be() -> None:
    family_check.check(prepared(TRAINED["Llama"]), apart=True)
    family_check.check(prepared(TRAINED["OPT"]))
    with pytest.raises(ModelError, match="OPTForCausalLM does not keep the documents of a window apart"):
        family_check.check(prepared(TRAINED["OPT"]), apart=True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (T5Config(), "T5Config is of an encoder and a decoder"),
        (BartConfig(), "BartConfig is of an encoder and a decoder"),
        (Gemma3Config(), "Gemma3Config is of several models, not of text alone"),
        (ViTConfig(), "the library has no causal LM of ViTConfig"),
    ],
)
def test_what_is_no_decoder_of_text_is_refused_by_name(config: Any, why: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=f"model: no causal LM can be read there: {why}"):
        hf_config.read_config(tmp_path / "model")


def test_a_configuration_that_the_library_cannot_build_is_refused_in_one_line() -> None:
    with pytest.raises(ModelError, match="cannot be cut: it cannot be run: AttributeError") as caught:
        family_check.check(prepared(BltConfig()))
    assert "\n" not in str(caught.value)


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


def test_ids_of_tokens_are_no_list_per_block() -> None:
    config = copy.deepcopy(TRAINED["Gemma 3"])
    config.eos_token_id = [3, 4, 5, 6]
    assert cut_config(config, [0, 2]).eos_token_id == [3, 4, 5, 6]
    assert cut_config(config, [0, 2]).layer_types == [config.layer_types[0], config.layer_types[2]]
    assert family_check.shrunk(config).num_hidden_layers == 2


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


def test_noise_for_routers_is_refused_in_training_and_never_turned_off_silently() -> None:
    """Phi-3.5-MoE uses the number in evaluation too."""
    for name, of in (("router_jitter_noise", 0.01), ("input_jitter_noise", 0.1)):
        config = prepared(TRAINED["Phi-3.5-MoE, without noise"])
        setattr(config, name, of)
        assert getattr(hf_config.for_training(config), name) == of
        with pytest.raises(ModelError, match=f"{name} = {of} in the model's config.json: its routers draw random"):
            hf_config.check_no_noise(config)
    hf_config.check_no_noise(prepared(TRAINED["Mixtral"]))


def test_a_check_leaves_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    family_check.check(prepared(TRAINED["Llama"]))
    assert torch.equal(torch.rand(3), expected)


def _tries(config: Any) -> int:
    """How often a process tries a model that it is asked for twice; run in a process of its own."""
    tried: list[Any] = []
    compare = family_check.compare
    family_check.compare = lambda *of: tried.append(of) or compare(*of)
    family_check.check(config)
    family_check.check(config)
    return len(tried)


def test_one_process_of_a_host_tries_it_for_all() -> None:
    config, other = prepared(TRAINED["Llama"]), prepared(TRAINED["Llama"])
    other.rms_norm_eps = 1e-3
    for asked, expected in (([config] * 3, 1), ([config], 0), ([other], 1)):
        with ProcessPoolExecutor(len(asked), multiprocessing.get_context("fork")) as pool:
            assert sum(pool.map(_tries, asked)) == expected


def test_what_was_refused_is_refused_again_and_a_cache_is_not_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(ModelError, match="not causal"):
            family_check.check(prepared(REFUSED["Llama with is_causal: false"][0]))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    family_check.check(prepared(TRAINED["Llama"]))


@pytest.mark.parametrize("name", TRAINED)
def test_a_configuration_says_how_large_the_model_is(name: str, tmp_path: Path) -> None:
    """Families have other words for it, and some have no attention heads."""
    prepared(TRAINED[name]).save_pretrained(tmp_path / "model")
    raw = {"model": {"pretrained": str(tmp_path / "model")}, "data": {"train": "x", "sequence_length": 16}}
    model = load(raw).model
    assert (model.hidden_size, model.num_layers) == (32, BLOCKS)
