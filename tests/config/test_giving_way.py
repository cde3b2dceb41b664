"""What a typed value leaves without meaning in the file gives way, with a line; what is typed never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lptransformer.config.load import load, to_dict
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError

DATA = {"train": "t.txt", "valid": "v.txt"}
STABLE = {"lr_scheduler": "warmup_stable_decay"}
# Sections of the file, what is typed, and of each key that gives way its value afterwards (None: as if not given).
CASES: list[tuple[dict[str, Any], list[str], dict[str, Any]]] = [
    ({"objective": {"chunks": 4}}, ["objective.name=backprop"], {"objective.chunks": None}),
    ({"objective": {"chunks": 4}}, ["objective.name=last"], {"objective.chunks": None}),
    (
        {"objective": {"name": "last", "trained_blocks": 2}},
        ["objective.name=chunked"],
        {"objective.trained_blocks": None},
    ),
    (
        {"head": {"kind": "low_rank", "rank": 8, "blocks": 1}},
        ["objective.name=backprop"],
        {"head.kind": "private", "head.rank": None, "head.blocks": 0},
    ),
    ({"head": {"kind": "low_rank", "rank": 8}}, ["head.kind=private"], {"head.rank": None}),
    ({"head": {"kind": "shared", "refresh_every": 4}}, ["head.kind=private"], {"head.refresh_every": 1}),
    ({"head": {"blocks": 1, "ema_decay": 0.9}}, ["head.blocks=0"], {"head.ema_decay": None}),
    ({"border": {"codec": "int8"}}, ["objective.name=backprop"], {"border.codec": "none"}),
    ({"border": {"codec": "int8"}}, ["objective.name=overlapping"], {"border.codec": "none"}),
    ({"border": {"codec": "bf16"}}, ["train.dtype=bf16"], {"border.codec": "none"}),
    ({"train": {"tf32": True}}, ["train.dtype=bf16"], {"train.tf32": False}),
    ({"train": {"warmup_steps": 20}}, ["train.lr_scheduler=constant"], {"train.warmup_steps": 0}),
    ({"train": {"warmup_steps": 20}}, ["train.steps=4"], {"train.warmup_steps": 4}),
    ({"train": STABLE | {"decay_steps": 20}}, ["train.steps=12"], {"train.decay_steps": 12}),
    ({"train": STABLE | {"decay_steps": 20}}, ["train.lr_scheduler=cosine"], {"train.decay_steps": None}),
    ({"objective": {"backprop_every": 10}}, ["train.steps=4"], {"objective.backprop_every": None}),
    ({"objective": {"backprop_share": 0.1}}, ["train.steps=4"], {"objective.backprop_share": 0.0}),
    ({"train": {"epochs": 2.0}}, ["train.steps=4"], {"train.epochs": None}),
    ({"train": {"steps": 9}}, ["train.epochs=2"], {"train.steps": None}),
    ({"run": {"trace": [5, 9]}}, ["train.steps=4"], {"run.trace": None}),
    ({"run": {"profile": [5, 9]}}, ["train.steps=4"], {"run.profile": None}),
    ({"train": {"eval_every": 5}}, ["data.valid=null"], {"train.eval_every": 0}),
    ({"data": {**DATA, "vocab_size": 300}}, ["data.tokenizer=bytes"], {"data.vocab_size": 4096}),
    ({"optimizer": {"beta1": 0.8, "eps": 1e-6}}, ["optimizer.name=sgd"], {"optimizer.beta1": 0.9}),
    ({"optimizer": {"name": "sgd", "momentum": 0.5}}, ["optimizer.name=adamw"], {"optimizer.momentum": None}),
    (
        {"model": {"family": "llama", "num_key_value_heads": 2}},
        ["model.family=gpt2"],
        {"model.num_key_value_heads": None},
    ),
    (
        {"parallel": {"pipeline": 2, "partition": [1, 3]}},
        ["parallel.pipeline=1"],
        {"parallel.partition": "balanced"},
    ),
    (
        {"parallel": {"pipeline": 2, "partition": [1, 3]}},
        ["model.num_layers=6"],
        {"parallel.partition": "balanced"},
    ),
    (
        {"objective": {"name": "chunked", "chunks": 4}, "head": {"kind": "shared"}},
        ["engine=deepspeed_pipeline"],
        {"objective.name": "backprop", "objective.chunks": None, "head.kind": "private"},
    ),
    ({"run": {"trace": [1, 2]}}, ["engine=deepspeed_pipeline"], {"run.trace": None}),
]


def given(sections: dict[str, Any], typed: list[str]) -> Config:
    return load({"data": DATA, **sections}, [f"--{one}" for one in typed])


@pytest.mark.parametrize(("sections", "typed", "after"), CASES, ids=[f"{t[0]} over {list(s)}" for s, t, _ in CASES])
def test_a_key_of_the_file_gives_way(sections: dict[str, Any], typed: list[str], after: dict[str, Any]) -> None:
    config = given(sections, typed)
    assert {key: config.value(key) for key in after} == after
    named = [note.partition(" = ")[0] for note in config.notes]
    in_file = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    assert set(named) >= set(after) & in_file and set(named) <= in_file | {"objective.name"}
    for note in config.notes:
        assert "\n" not in note and "(in the given mapping)" in note and "on the command line)" in note
    assert load(to_dict(config)).notes == [], "the result stands by itself"


@pytest.mark.parametrize(("sections", "typed", "after"), CASES, ids=[f"{t[0]} over {list(s)}" for s, t, _ in CASES])
def test_what_is_typed_is_refused_there(sections: dict[str, Any], typed: list[str], after: dict[str, Any]) -> None:
    keys = [f"{section}.{key}={json.dumps(value)}" for section, of in sections.items() for key, value in of.items()]
    with pytest.raises(ConfigError, match="on the command line"):
        given({}, [*(key for key in keys if key.partition("=")[0] not in typed[0]), *typed])


@pytest.mark.parametrize(("sections", "typed", "after"), CASES, ids=[f"{t[0]} over {list(s)}" for s, t, _ in CASES])
def test_a_file_that_contradicts_itself_is_refused(
    sections: dict[str, Any], typed: list[str], after: dict[str, Any]
) -> None:
    if typed[0] == "data.valid=null":
        return  # nothing is written there
    values = {key: dict(of) for key, of in {"data": DATA, **sections}.items()}
    key, _, value = typed[0].partition("=")
    section, _, name = key.rpartition(".")
    if name in values.get(section, {}):
        return  # the file says one value of a key
    if section:
        values.setdefault(section, {})[name] = json.loads(value) if value.isdigit() else value
    else:
        values[name] = value  # type: ignore[assignment]
    with pytest.raises(ConfigError):
        load(values)


def test_the_engine_of_a_file_brings_backprop_where_nothing_else_is_asked_for() -> None:
    config = load({"engine": "deepspeed_pipeline", "data": DATA})
    assert config.objective.name == "backprop" and config.notes == []


def test_a_pretrained_model_that_is_typed_brings_its_sizes_and_its_tokenizer(tmp_path: Path) -> None:
    sizes = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    sections = {
        "model": {"family": "gpt2", "hidden_size": 32, "num_layers": 4},
        "data": {**DATA, "tokenizer": "sentencepiece", "vocab_size": 300},
    }
    config = given(sections, [f"model.pretrained={tmp_path}"])
    assert (config.model.family, config.model.hidden_size) == ("llama", 64)
    assert config.data.tokenizer == str(tmp_path)
    gone = {"data.tokenizer", "data.vocab_size", "model.family", "model.hidden_size"}
    assert {note.partition(" = ")[0] for note in config.notes} == gone
    with pytest.raises(ConfigError, match="hidden_size.*contradicts"):
        given({}, [f"model.pretrained={tmp_path}", "model.hidden_size=32"])


def test_one_line_says_what_gives_way_and_why() -> None:
    config = given(
        {"train": {"warmup_steps": 20}, "objective": {"chunks": 4}}, ["train.steps=4", "objective.name=last"]
    )
    assert config.notes == [
        "objective.chunks = 4 (in the given mapping) is left out, with objective.name = 'last' (on the command line)",
        "train.warmup_steps = 20 (in the given mapping) becomes 4, with train.steps = 4 (on the command line)",
    ]
