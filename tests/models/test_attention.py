"""`model.attention`: the library's own model with the same setting, and what is refused where."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from families import TRAINED
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from lptransformer.config.load import load
from lptransformer.config.schema import Attention
from lptransformer.errors import ConfigError
from lptransformer.methods.gradient_flow import Duty
from lptransformer.models import hf_config
from lptransformer.models.blueprint import Blueprint, make_blueprint
from lptransformer.models.head import CROSS_ENTROPY, LossBatch
from lptransformer.models.stage import for_training, make_stage
from lptransformer.planning.stage_memory import EmptyStages
from lptransformer.training.build import check_isolation
from lptransformer.training.this_host import check_host

DATA = {"train": "unused.txt", "sequence_length": 12}


def blueprint(folder: Path, attention: str, *more: str) -> Blueprint:
    overrides = [f"model.pretrained={folder}", f"model.attention={attention}", "objective.name=backprop", *more]
    return make_blueprint(load({"data": DATA}, overrides), None, None)


def saved(name: str, folder: Path) -> Path:
    config = copy.deepcopy(TRAINED[name])
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(hf_config.for_training(config)).save_pretrained(folder)
    return folder


def test_the_names_are_the_library_s() -> None:
    names = {"auto", "eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} - {"paged|eager"}
    assert set(get_args(Attention)) == names


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_logits_and_gradients_are_those_of_the_library_s_model(name: str, tmp_path: Path) -> None:
    ids = torch.randint(0, 61, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    folder = saved(name, tmp_path / "model")
    for attention in ("eager", "sdpa"):
        plan = blueprint(folder, attention)
        (stage_plan,) = plan.stages
        stage = for_training(make_stage(stage_plan, plan, seed=0, pretrained=folder), plan)
        assert stage.body.config._attn_implementation == attention
        whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).train()
        with torch.no_grad():
            expected = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state
            assert torch.equal(stage.head.norm(stage.hidden_states(ids)), expected)
        stage(ids, LossBatch(labels, 1.0 / 22)).losses[CROSS_ENTROPY].loss.backward()
        whole(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        ours = {plan.parts.whole_name(key, True): one.grad for key, one in stage.named_parameters()}
        for key, weight in whole.named_parameters():
            torch.testing.assert_close(ours[key], weight.grad, rtol=1e-5, atol=1e-7)


def test_extra_blocks_and_only_the_run_s_own_models_are_computed_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder holds the library's choice, so who reads it needs no such package."""
    config = {"model": {"family": "llama", "hidden_size": 16, "num_layers": 2, "attention": "eager"}, "data": DATA}
    plan = make_blueprint(load({**config, "head": {"blocks": 1}}), 61, None)
    seen: list[Any] = []
    monkeypatch.setattr(
        modeling_llama, "eager_attention_forward", lambda module, *_, **__: seen.append(module.layer_idx) or 1 / 0
    )
    for stage_plan in plan.stages:
        stage = make_stage(stage_plan, plan, seed=0)
        for body in (stage.body, stage.head.blocks):
            if body is not None:
                with pytest.raises(ZeroDivisionError):
                    body(inputs_embeds=torch.zeros(1, 4, 16), use_cache=False)
    assert seen == [0, 1, 1]
    assert "attn" not in str(plan.model_config.to_dict())


@pytest.mark.parametrize(
    ("name", "attention", "right"),
    [
        ("GPT-OSS", "sdpa", "GptOssForCausalLM has auto, eager, flash_attention_4"),
        ("Mamba", "sdpa", "MambaForCausalLM has auto, eager"),
    ],
)
def test_a_family_without_it_is_refused(name: str, attention: str, right: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        blueprint(saved(name, tmp_path / "model"), attention)
    assert f"model.attention = '{attention}' (on the command line): {right}" in str(caught.value)


def test_what_a_host_lacks_is_asked_at_a_start_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan of it is made anywhere, and counts it like sdpa."""
    config = {"model": {"family": "llama", "hidden_size": 16, "num_layers": 2}, "data": DATA}
    flash = load(config, ["model.attention=flash_attention_2", "train.dtype=bf16"])
    with pytest.raises(ConfigError, match="model.attention = 'flash_attention_2' .* does not import; auto, eager"):
        check_host(flash, 1)
    with pytest.raises(ConfigError, match="flex_attention' .*: on this host there is no GPU"):
        check_host(load(config, ["model.attention=flex_attention"]), 1)
    check_host(load(config, ["model.attention=eager"]), 1)
    plan = make_blueprint(flash, 61, None)
    same, eager = replace(plan, attention="sdpa"), replace(plan, attention="eager")
    sizes = [EmptyStages(one).passes(one.stages[0], Duty(1.0, None, (), (), 0), 2) for one in (plan, same, eager)]
    assert sizes[0] == sizes[1] != sizes[2]


def test_flash_attention_keeps_no_documents_apart() -> None:
    config = {"model": {"family": "llama", "hidden_size": 16, "num_layers": 2}, "data": DATA}
    isolated: Any = SimpleNamespace(train=[SimpleNamespace(tokens=SimpleNamespace(isolated=True))], valid={})
    flash = load(config, ["model.attention=flash_attention_2", "train.dtype=bf16"])
    with pytest.raises(ConfigError, match=r"'flash_attention_2' .* see no mask.*data\.isolate_documents=false"):
        check_isolation(flash, make_blueprint(flash, 61, None), isolated)
    plain = load(config)
    check_isolation(plain, make_blueprint(plain, 61, None), isolated)
