"""What `train.freeze` and `model.tie` leave to train: counted, said, and refused where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from refusals import message, says
from transformers import LlamaConfig

from lptransformer.config.load import load
from lptransformer.errors import ConfigError
from lptransformer.methods.cost import TrainedWeights
from lptransformer.methods.stages import trained_of
from lptransformer.models.blueprint import Blueprint, make_blueprint, of_model
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
