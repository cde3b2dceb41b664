"""What `train.freeze`, `model.tie` and `lora` leave to train: counted, said, and refused where they cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import message, says
from transformers import GPT2Config, LlamaConfig

from lptransformer.config.load import load
from lptransformer.errors import ConfigError
from lptransformer.methods.cost import TrainedWeights
from lptransformer.methods.stages import trained_of
from lptransformer.models import hf_parts
from lptransformer.models.adapters import find, merged
from lptransformer.models.blueprint import Blueprint, make_blueprint, of_model
from lptransformer.models.stage import for_training, load_stage, make_stage
from lptransformer.planning.dry_run import print_stages

RAW: dict[str, Any] = {
    "model": {"family": "llama", "hidden_size": 8, "num_layers": 4, "num_heads": 2, "intermediate_size": 12},
    "data": {"train": "unused", "sequence_length": 16},
}
V, ATTENTION, MLP = 300, 4 * 8 * 8, 3 * 8 * 12


def blueprint(*patterns: str, **more: Any) -> Blueprint:
    return make_blueprint(load({**RAW, **more, "train": {"freeze": list(patterns)}}), V, None)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.embed_tokens.*"], TrainedWeights(0, (ATTENTION + MLP + 16,) * 4, 8 + 8 * V, {1: 8 + 8 * V})),
        (["*.mlp.*", "lm_head.weight"], TrainedWeights(8 * V, (ATTENTION + 16,) * 4, 8, {1: 8 + 8 * V})),
        (["head.readout.*", "model.layers.2.*"], TrainedWeights(8 * V, (560, 560, 0, 560), 8 + 8 * V, {1: 8})),
        (["*norm*"], TrainedWeights(8 * V, (ATTENTION + MLP,) * 4, 8 * V, {1: 8 * V})),
    ],
)
def test_what_trains_is_counted_by_name(patterns: list[str], expected: TrainedWeights) -> None:
    found = blueprint(*patterns)
    assert found.costs.trained == expected
    total = expected.embedding + sum(expected.blocks) + expected.head + sum(expected.auxiliary.values())
    assert sum(trained_of(stage, found.costs) for stage in found.stages) == total


def test_a_stage_with_nothing_to_train_only_computes() -> None:
    lower = ["model.embed_tokens.*", "model.layers.[01].*"]
    assert [stage.trained for stage in blueprint(*lower).stages] == [True, True], "its head trains"
    assert [stage.trained for stage in blueprint(*lower, "head.*").stages] == [False, True]
    backprop = {"objective": {"name": "backprop"}, "parallel": {"pipeline": 2, "partition": [2, 2]}}
    assert blueprint(*lower, **backprop).phases[0].flows == (), "nothing below trains"
    last = blueprint("model.layers.3.self_attn.*", objective={"name": "last", "trained_blocks": 2})
    assert [trained_of(stage, last.costs) for stage in last.stages] == [0, 560 + MLP + 16 + 8 + 8 * V]


def test_the_start_says_how_many_weights_train(capsys: pytest.CaptureFixture[str]) -> None:
    config = load({**RAW, "train": {"freeze": ["model.embed_tokens.*", "head.*"]}})
    print_stages("stages", config, make_blueprint(config, V, None))
    trained, weights = 4 * 560 + 8 + 8 * V, 4 * 560 + 2 * 8 + 3 * 8 * V
    said = f"{trained:,} of {weights:,} weights train ({trained / weights:.1%}): train.freeze = ['model.embed_tokens.*'"
    assert said in capsys.readouterr().out.replace("\n", " ")
    print_stages("stages", load(RAW), blueprint())
    assert "weights train" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("patterns", "parts"),
    [
        (["model.embed_tokns.*"], ["no weight is called model.embed_tokns.*", "near it are model.embed_tokens.weight"]),
        (["*.mlp.*", "lm_head"], ["no weight is called lm_head;", "lm_head.weight"]),
        (["transformer.h.0.*"], ["no weight is called transformer.h.0.*", "model.layers.3."]),
        (["head.down.*"], ["no weight is called head.down.*", "head.norm.weight"]),
        (["*"], ["it leaves nothing to train"]),
    ],
)
def test_a_pattern_that_freezes_nothing_or_all_is_refused(patterns: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        blueprint(*patterns)
    says(str(caught.value), f"train.freeze = {patterns!r} (in the given mapping)", *parts)


def test_a_pattern_that_yaml_takes_for_an_alias_is_refused_with_the_remedy() -> None:
    for pattern in ("*.mlp.*", "*mlp*"):
        says(
            message(RAW, f"--train.freeze=[{pattern}]"),
            "train.freeze on the command line",
            "begins with * has to be in",
        )


TIE = {"train": "books/*.txt", "tokenizer": "bytes"}
SIZES = {"num_layers": 4, "num_heads": 2, "hidden_size": 8}


def test_where_a_model_cannot_stay_tied_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    config = LlamaConfig(**{"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 300})
    config.save_pretrained(folder)
    raw = {"data": TIE, "model": {"pretrained": str(folder), "tie": "keep"}}
    says(message({"data": TIE, "model": {"tie": "keep"}}), "model.tie = 'keep'", "a new model has two matrices")
    kept = "model.tie = 'keep' (in the given mapping) with"
    says(message(raw), kept, "objective.chunks = 2", "in two stages", "objective.name=backprop")
    backprop = "--objective.name=backprop"
    says(message(raw, backprop, "--parallel.pipeline=2"), kept, "parallel.pipeline = 2", "on two pipeline ranks")
    says(message(raw, "--objective.name=greedy"), kept, "objective.name = 'greedy'")
    engine = ["--engine=deepspeed_pipeline", backprop]
    says(message(raw, *engine), "engine = 'deepspeed_pipeline'", kept[:17], "trains all weights")
    freeze = {"data": TIE, "train": {"freeze": ["*.mlp.*"]}}
    says(message(freeze, *engine), "engine = 'deepspeed_pipeline'", "train.freeze = ['*.mlp.*']")
    with pytest.raises(ConfigError) as caught:
        of_model(load(raw, [backprop]), config)
    says(str(caught.value), "model.tie = 'keep'", "two matrices", "give separate")


# ---------------------------------------------------------------------------------------------- LoRA

LLAMA = LlamaConfig(
    **{"num_hidden_layers": 4, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 300}
)


def with_lora(folder: Path, *overrides: str) -> Blueprint:
    LLAMA.save_pretrained(folder)
    raw = {"data": TIE, "model": {"pretrained": str(folder)}, "lora": {"rank": 2}}
    return make_blueprint(load(raw, overrides), None, None)


def test_adapters_train_in_place_of_the_model(tmp_path: Path) -> None:
    both = 4 * 2 * (8 + 8) + 3 * 2 * (8 + 12)
    found = with_lora(tmp_path)
    assert found.adapters is not None and found.adapters.alpha == 4 and len(found.adapters.targets) == 4 * 7
    assert found.costs.trained == TrainedWeights(
        0, (both,) * 4, 0, {1: 8 + (8 * 8 + 8) + 8}
    )  # a map and its norm, the norm
    few = with_lora(tmp_path, "--lora.targets=[q_proj, mlp.down_proj]", "--train.freeze=[head.*, '*.1.*.lora_A.*']")
    one = 2 * (8 + 8) + 2 * (12 + 8)
    assert few.costs.trained == TrainedWeights(0, (one, one - 2 * 8 - 2 * 12, one, one), 0, {1: 0})
    assert [trained_of(stage, few.costs) for stage in few.stages] == [2 * one - 40, 2 * one]


def test_adapters_are_merged_where_a_run_is_read(tmp_path: Path) -> None:
    """By hand, of linear maps that are stored either way."""
    conv = GPT2Config(n_layer=1, n_embd=6, n_head=2, vocab_size=31)
    parts = hf_parts.anatomy(conv)
    found = find(conv, parts, 2, 3.0, ["c_attn"])
    weight, down, up = torch.randn(6, 18), torch.randn(2, 6), torch.randn(18, 2)
    name = "body.h.0.attn.c_attn"
    saved = {f"{name}.weight": weight, f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    (after,) = merged(saved, found, parts).values()
    rows = torch.randn(5, 6)
    torch.testing.assert_close(rows @ after, rows @ weight + 1.5 * rows @ down.T @ up.T)

    blueprint = with_lora(tmp_path, "--lora.targets=[o_proj]")
    plan = blueprint.stages[0]
    weights = dict(make_stage(plan, blueprint, seed=0).state_dict())
    name = "body.layers.1.self_attn.o_proj"
    before, down, up = weights[f"{name}.weight"], torch.randn(2, 8), torch.randn(8, 2)
    stage = load_stage(plan, blueprint, weights | {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up})
    torch.testing.assert_close(stage.state_dict()[f"{name}.weight"], before + 2 * up @ down)


def test_lora_that_cannot_be_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError) as caught:
        with_lora(tmp_path, "--lora.targets=[q_proj, c_attn, lm_head]")
    there = "there are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    says(str(caught.value), "lora.targets = ['q_proj', 'c_attn', 'lm_head'] (on the command line)", "c_attn", there)
    raw = {"data": TIE, "model": {"pretrained": str(tmp_path)}}
    says(message({"data": TIE, "lora": {"rank": 4}}), "lora.rank = 4", "has no meaning with model.pretrained = None")
    says(message({**raw, "lora": {"alpha": 4.0}}), "lora.alpha = 4.0", "has no meaning with lora.rank = None")
    averaged = ["--head.blocks=1", "--head.ema_decay=0.9", "--lora.rank=2"]
    says(message(raw, *averaged), "head.ema_decay = 0.9", "lora.rank = 2")
    engine = ["--engine=deepspeed_pipeline", "--objective.name=backprop", "--lora.rank=2"]
    says(message(raw, *engine), "engine = 'deepspeed_pipeline'", "lora.rank = 2")
    says(message(raw, "--lora.targets=[]", "--lora.rank=2"), "lora.targets", "a list of names, or null")
    monkeypatch.setitem(sys.modules, "peft", None)
    blueprint = with_lora(tmp_path)
    with pytest.raises(ConfigError, match=r'lora.rank needs peft.*pip install "lptransformer\[lora\]"'):
        for_training(make_stage(blueprint.stages[0], blueprint, seed=0), blueprint)
