"""The router loss of mixtures of experts: on one stage the library's own, on several each stage's own layers'."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import TRAINED
from small_blueprint import small_blueprint
from torch import Tensor
from transformers import AutoModelForCausalLM, DogeConfig
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lptransformer.errors import ConfigError, ModelError
from lptransformer.models import family_check, hf_config
from lptransformer.models.blueprint import Blueprint
from lptransformer.models.head import CROSS_ENTROPY, ROUTER, LossBatch
from lptransformer.models.stage import Stage, make_stage

WITH_ROUTERS = [
    "ERNIE 4.5 MoE",
    "GPT-OSS",
    "Granite-MoE",
    "Jamba",
    "JetMoE",
    "Mixtral",
    "OLMoE",
    "Phi-3.5-MoE, without noise",
]
WITH_ROUTERS += ["Qwen2-MoE", "Qwen3-MoE", "Qwen3-Next"]
COEFFICIENT = 0.3


def asking(name: str, coefficient: float = COEFFICIENT) -> Any:
    config = copy.deepcopy(TRAINED[name])
    config.output_router_logits = True
    for key in ("router_aux_loss_coef", "aux_loss_coef"):
        if hasattr(config, key):
            setattr(config, key, coefficient)
    return hf_config.for_training(config)


def batch_of(ids: Tensor, share: float = 1.0) -> LossBatch:
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    return LossBatch(labels, scale=1.0 / (labels != -100).sum().item(), share=share)


def stages_of(config: Any, pipeline: int) -> tuple[Blueprint, list[Stage]]:
    blueprint = small_blueprint(config, "backprop", length=12, pipeline=pipeline)
    return blueprint, [make_stage(plan, blueprint, seed=0) for plan in blueprint.stages]


@pytest.mark.parametrize("name", WITH_ROUTERS)
def test_on_one_stage_loss_and_gradients_are_the_library_s(name: str) -> None:
    config = asking(name)
    family_check.check(config)
    blueprint, (stage,) = stages_of(config, 1)
    parts = blueprint.parts
    untied = copy.deepcopy(config)
    untied.tie_word_embeddings = False
    whole = AutoModelForCausalLM.from_config(untied)
    names = {f"{parts.base}.{key}": f"body.{key}" for key in stage.body.state_dict()}
    names |= {f"{parts.norm}.{key}": f"head.norm.{key}" for key in stage.head.norm.state_dict()}
    names |= {f"{parts.lm_head}.{key}": f"head.readout.{key}" for key in stage.head.readout.state_dict()}
    state = stage.state_dict()
    whole.load_state_dict({key: state[own] for key, own in names.items()})
    ids = family_check._tokens()
    expected = whole(input_ids=ids, labels=ids, use_cache=False)
    expected.loss.backward()
    output = stage(ids, batch_of(ids))
    assert output.loss is not None
    torch.testing.assert_close(output.loss, expected.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(output.losses[ROUTER].loss, COEFFICIENT * expected.aux_loss, rtol=1e-6, atol=0)
    output.loss.backward()
    found = dict(stage.named_parameters())
    for key, weight in whole.named_parameters():
        torch.testing.assert_close(found[names[key]].grad, weight.grad, rtol=1e-5, atol=1e-7)


def test_on_several_stages_each_has_that_of_its_own_layers_and_its_share_of_the_update() -> None:
    config = asking("Mixtral")
    _, stages = stages_of(config, 2)
    hidden = family_check._tokens()
    for stage in stages:
        output = stage(hidden, batch_of(hidden if hidden.dim() == 2 else family_check._tokens(), share=0.25))
        assert set(output.losses) == ({CROSS_ENTROPY, ROUTER} if stage.plan.has_head else {ROUTER})
        name = "input_ids" if stage.plan.is_first else "inputs_embeds"
        logits = stage.body(**{name: hidden}, use_cache=False, output_router_logits=True).router_logits
        assert len(logits) == 2  # of its blocks
        balance = COEFFICIENT * load_balancing_loss_func(logits, 4, 2, None)
        torch.testing.assert_close(output.losses[ROUTER].loss, 0.25 * balance)
        assert (output.nll_sum is None) == (not stage.plan.has_head)
        hidden = output.hidden_states.detach()
    with torch.no_grad():
        assert ROUTER not in stages[0](family_check._tokens(), batch_of(family_check._tokens())).losses


def test_where_no_router_loss_is_asked_for_there_is_none() -> None:
    config = hf_config.for_training(copy.deepcopy(TRAINED["Mixtral"]))
    _, (stage,) = stages_of(config, 1)
    ids = family_check._tokens()
    assert set(stage(ids, batch_of(ids)).losses) == {CROSS_ENTROPY}


def test_what_has_no_known_router_loss_is_refused() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DogeConfig(**sizes, intermediate_size=48, is_moe=True, num_experts=16, output_router_logits=True)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, token, None)
    with pytest.raises(ModelError, match="output_router_logits is true in its config.json, and DogeForCausalLM has no"):
        stages_of(hf_config.for_training(config), 1)


def test_deepspeed_s_own_pipeline_trains_none() -> None:
    from lptransformer.config.load import load
    from lptransformer.models.blueprint import of_model

    raw = {"data": {"train": "none", "sequence_length": 12}, "objective": {"name": "backprop"}}
    with pytest.raises(ConfigError, match="engine=deepspeed_pipeline trains no router losses"):
        of_model(load({**raw, "engine": "deepspeed_pipeline"}), asking("Mixtral"))
