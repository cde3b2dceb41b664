"""Fitted heads in the engine: fitted once, alike on any placement, trained with frozen parts, resumed without a fit."""

from __future__ import annotations

import contextlib
import io
from collections import ChainMap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import Pool
from engine_jobs import Trained, load_config, make_stream, open_engine, train
from saved_runs import write_text
from tiers import slow
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from lptransformer.config.load import load
from lptransformer.data.token_set import Batch
from lptransformer.engine import fitting
from lptransformer.errors import ConfigError
from lptransformer.evaluation.export import export_run
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.head import RIDGE
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training import build
from lptransformer.training import train as training

DEPTH, HIDDEN, LENGTH = 8, 32, 16
BATCH = 64  # windows of a micro-batch: eight of them hold what the fit takes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of random weights, large enough that its blocks do something."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_embd=HIDDEN, n_layer=DEPTH, n_head=2, n_positions=LENGTH)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path_factory.mktemp("fitted") / "model")
    return tmp_path_factory.getbasetemp() / "fitted0" / "model"


def overrides(folder: Path, *more: str, blocks: int = 2, parallel: tuple[int, int] = (1, 1)) -> tuple[str, ...]:
    return (
        *(f"model.pretrained={folder}", "head.kind=fitted", f"head.blocks={blocks}", "objective.chunks=[2,3,3]"),
        *(("head.train_blocks=false",) if blocks else ()),
        *(f"train.micro_batch_size={BATCH}", "train.micro_batches_per_update=2", "train.warmup_steps=0"),
        *(f"parallel.pipeline={parallel[0]}", f"parallel.data={parallel[1]}", *more),
    )


def start(pool: Pool, overrides: tuple[str, ...], updates: int, **options: Any) -> list[Trained]:
    parallel = load_config(overrides).parallel
    return pool.run(parallel.pipeline * parallel.data, call_train, overrides, updates, options)


def call_train(overrides: tuple[str, ...], updates: int, options: dict[str, Any]) -> Trained:
    return train(overrides, updates, **options)


def weights_of(trained: list[Trained]) -> dict[str, Tensor]:
    """All weights by block and name, wherever they are; replicas agree."""
    found: dict[str, Tensor] = {}
    for one in trained:
        assert not one.error, one.error
        for index, plan in one.plans.items():
            for name, tensor in one.weights[index].items():
                key = f"{plan.last_block}.{name}" if name.startswith("head.") else name
                assert torch.equal(found.setdefault(key, tensor), tensor), f"replicas disagree on {key}"
    return found


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---- what is fitted


def expected_map(folder: Path, exit_block: int, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """By the library's own model and numpy's least squares: the first 8,192 tokens, position 0 left out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    stream = make_stream(load_config(overrides(folder)))
    ids = torch.cat([stream.batch(number).input_ids for number in range(8)])
    assert ids.numel() == 8192
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states  # the last one is behind the norm
    x, y = (states[number][:, 1:].flatten(0, 1).double() for number in (exit_block + 1, DEPTH - blocks))
    normed = torch.nn.functional.layer_norm(x, (HIDDEN,)).numpy()
    wanted = (y - x if blocks else y).numpy()
    root = np.sqrt(RIDGE * ((normed - normed.mean(0)) ** 2).sum(0).mean())
    above = np.hstack([normed, np.ones((len(normed), 1))])
    below = np.hstack([root * np.eye(HIDDEN), np.zeros((HIDDEN, 1))])
    rows = np.vstack([above, below]), np.vstack([wanted, np.zeros((HIDDEN, HIDDEN))])
    found = np.linalg.lstsq(*rows, rcond=None)[0]
    return found[:HIDDEN].T, found[HIDDEN]


@pytest.mark.parametrize("blocks", [2, slow(0), slow(4)])
def test_maps_are_those_of_least_squares_on_any_placement(pool: Pool, folder: Path, blocks: int) -> None:
    alone = weights_of(start(pool, overrides(folder, blocks=blocks), 0))
    for block in (1, 4):
        name = f"{block}.head.{'map' if blocks else 'norm'}.linear"
        weight, bias = expected_map(folder, block, blocks)
        if blocks == 4 and block == 4:  # three blocks are above it: its map has nothing to bridge
            weight, bias = np.zeros_like(weight), np.zeros_like(bias)
        assert np.allclose(alone[f"{name}.weight"].numpy(), weight, atol=2e-5)
        assert np.allclose(alone[f"{name}.bias"].numpy(), bias, atol=2e-5)
    for parallel in [(2, 1), (1, 2), (3, 1)]:
        assert same(weights_of(start(pool, overrides(folder, blocks=blocks, parallel=parallel), 0)), alone), parallel


class Windows:
    """A stream of five windows in an epoch, two in a micro-batch."""

    def batch(self, index: int) -> Batch:
        rows = torch.arange(index * 2, index * 2 + 2) % 5
        ids = rows[:, None] * 10 + torch.arange(4)
        return Batch(ids, ids)

    def position(self, index: int) -> dict[str, int]:
        return dict(zip(("epoch", "offset"), divmod(index * 2, 5), strict=True))


def test_padding_and_first_tokens_of_isolated_documents_do_not_count() -> None:
    class Padded(Windows):
        def batch(self, index: int) -> Batch:
            labels, places = torch.full((2, 8), -100), torch.arange(8).repeat(2, 1)
            labels[0, 5], labels[1, 6] = 1, 1
            places[1, 3:] -= 3
            return Batch(torch.arange(16).view(2, 8), labels, places)

    config = load_config(("data.sequence_length=8", "train.micro_batch_size=2"))
    found = fitting._first_tokens(make_blueprint(config, 64, None), Padded())  # type: ignore[arg-type]
    batch, counted = next(found)
    assert batch.input_ids[counted].tolist() == [1, 2, 3, 4, 5, 6, *(9, 10, 12, 13, 14, 15)]


@pytest.mark.parametrize(("most", "seen"), [(8192, [0, 1, 2, 3, 4]), (12, [0, 1, 2]), (10, [0, 1, 2])])
def test_the_first_tokens_in_training_order_count_and_of_few_all(
    most: int, seen: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "FIT_TOKENS", most)
    config = load_config(("data.sequence_length=4", "train.micro_batch_size=2"))
    found = fitting._first_tokens(make_blueprint(config, 64, None), Windows())  # type: ignore[arg-type]
    ids = torch.cat([batch.input_ids[counted] for batch, counted in found]).tolist()
    assert ids == [row * 10 + place for row in seen for place in (1, 2, 3)][: 7 if most == 10 else None]


def test_balanced_chunks_and_a_partition_that_cuts_them_go_with_no_zero_3(folder: Path) -> None:
    """Balanced chunks are known when the model is; the configuration alone sees equal ones."""
    keys = [f"model.pretrained={folder}", "head.kind=fitted", "head.blocks=2", "head.train_blocks=true"]
    keys += ["parallel.pipeline=2", "deepspeed.zero_optimization.stage=3"]
    plan = make_blueprint(load_config(keys), None, None)
    first, second = (stage.num_blocks for stage in plan.stages)
    assert first < second == DEPTH - first
    with pytest.raises(
        ConfigError, match=rf"stage = 3 .* parallel.partition = \[4, 4\] .*\[{first}, {second}\] blocks"
    ):
        make_blueprint(load_config([*keys, "parallel.partition=[4,4]"]), None, None)


# ---- how it trains


MODES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]


def zero(stage: int, dtype: str = "fp32") -> tuple[str, str]:
    return f"deepspeed.zero_optimization.stage={stage}", f"train.dtype={dtype}"


@pytest.mark.parametrize("mode", [MODES[4], *(slow(mode) for mode in MODES if mode != MODES[4])], ids=str)
def test_what_is_frozen_stays_and_all_else_learns_at_every_zero_stage(
    pool: Pool, folder: Path, mode: tuple[int, str]
) -> None:
    how = ("train.grad_clip=0", *zero(*mode))
    trained = start(pool, overrides(folder, *how, parallel=(1, 2)), 3)
    begun = weights_of(start(pool, overrides(folder, *how, parallel=(1, 2)), 0))
    ended = weights_of(trained)
    frozen = {name for name in ended if not name.startswith("7.") and ("readout" in name or "head.blocks" in name)}
    assert len(frozen) == 2 * (1 + 2 * 12)  # two heads, each with a readout and two blocks of twelve tensors
    assert {name for name in ended if torch.equal(ended[name], begun[name])} == frozen
    assert {tensor.dtype for tensor in ended.values()} == {torch.bfloat16 if mode[1] == "bf16" else torch.float32}
    if mode[1] == "fp32":
        plain = weights_of(start(pool, overrides(folder, "train.grad_clip=0", *zero(0), parallel=(1, 2)), 3))
        assert all(torch.allclose(ended[name], plain[name], atol=1e-5) for name in plain)


def test_two_pipeline_ranks_train_to_the_same_bits(pool: Pool, folder: Path) -> None:
    """Frozen blocks in the lower head, trained ones in another run."""
    for more in ((), ("head.train_blocks=true", "head.token_fraction=0.5")):
        one, two = (start(pool, overrides(folder, *more, parallel=(ranks, 1)), 2) for ranks in (1, 2))
        assert same(weights_of(one), weights_of(two))


def test_frozen_parts_are_there_once_in_a_process(pool: Pool, folder: Path) -> None:
    (places,) = pool.run(1, places_of_frozen, overrides(folder, *zero(1, "bf16")))
    lower, upper = places
    assert lower == upper and len(lower) == 25


def places_of_frozen(overrides: tuple[str, ...]) -> list[dict[str, int]]:
    engine = open_engine(overrides)
    engine.train_batch()
    heads = [stage.engine.module.head for stage in engine.local.values()][:2]  # type: ignore[union-attr]
    found = [{name: head.get_buffer(name).data_ptr() for name in head.frozen} for head in heads]
    engine.close()
    return found


# ---- resume


@pytest.mark.parametrize(
    ("mode", "parallel"), [((0, "fp32"), (2, 1)), slow((3, "fp32"), (1, 2)), slow((1, "bf16"), (2, 1))], ids=str
)
def test_four_updates_equal_two_and_two_from_a_checkpoint(
    pool: Pool, folder: Path, tmp_path: Path, mode: tuple[int, str], parallel: tuple[int, int]
) -> None:
    keys = overrides(folder, *zero(*mode), parallel=parallel)
    whole = weights_of(start(pool, keys, 4))
    start(pool, keys, 2, save=tmp_path)
    assert same(weights_of(start(pool, keys, 2, load=tmp_path)), whole)
    stored = saved_stage.read_weights(checkpoint.stage_folder(tmp_path, 2, 0))
    assert {"head.map.linear.weight", "head.readout.weight", "head.blocks.h.7.mlp.c_fc.weight"} <= stored.keys()


def train_and_keep(overrides: tuple[str, ...], run: Path, model: Path) -> None:
    """Two updates, saved, and the model as transformers has it."""
    engine = open_engine(overrides)
    engine.train_batch()
    engine.train_batch()
    engine.save_checkpoint(run)
    engine.pretrained_model().save_pretrained(model)
    engine.close()


def maps(overrides: tuple[str, ...], run: Path | None) -> dict[int, dict[str, Tensor]]:
    """The fitted maps and frozen parts of the heads of this process, by block, before the next update."""
    engine = open_engine(overrides, resumed=run)
    if run is not None:
        engine.load_checkpoint(run)
    found = {
        stage.plan.last_block: {name: one.clone() for name, one in stage.weights().items() if name.startswith("head.")}
        for stage in engine.local.values()
    }
    engine.close()
    return found


@pytest.mark.parametrize(("mode", "parallel"), [((0, "fp32"), (2, 1)), slow((1, "fp32"), (1, 2))], ids=str)
def test_a_head_that_is_new_on_resume_is_fitted_to_the_loaded_weights(
    pool: Pool, folder: Path, tmp_path: Path, mode: tuple[int, str], parallel: tuple[int, int]
) -> None:
    """As a run that starts from those weights would fit it; its frozen parts are the run's own."""
    pool.run(1, train_and_keep, overrides(folder, "train.learning_rate=0.01"), tmp_path / "run", tmp_path / "model")
    cut = ("objective.chunks=[2,2,4]", *zero(*mode))
    resumed, fresh = (
        dict(ChainMap(*pool.run(2, maps, overrides(where, *cut, parallel=parallel), run)))
        for where, run in ((folder, tmp_path / "run"), (tmp_path / "model", None))
    )
    before = weights_of(start(pool, overrides(folder, "train.learning_rate=0.01"), 2))
    for name, tensor in resumed[3].items():
        if not name.startswith("head.norm."):  # it trains, from the model's before training on
            wanted = fresh[3][name] if name.startswith("head.map.") else before[f"1.{name}"]
            assert torch.equal(tensor, wanted), name
    assert any(not torch.equal(tensor, fresh[3][name]) for name, tensor in resumed[3].items()), "the model has moved"
    assert all(torch.equal(tensor, before[f"1.{name}"]) for name, tensor in resumed[1].items()), "the old head stays"


# ---- a whole run


def _train(raw: dict[str, Any], resume: bool, until: int | None, *overrides: str) -> None:
    """In a process of its own; a run that is resumed must not fit."""

    def refuse(*_: Any) -> None:
        raise AssertionError("it fits again")

    before = build.fit_heads
    build.fit_heads = refuse if resume else before
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            training.train(load(raw, overrides), resume=resume, until=until)
    finally:
        build.fit_heads = before


def first_losses(run: Path) -> list[float]:
    """Of every exit in the first update."""
    return [stage["loss"] for stage in read_metrics(run)[0]["stages"] if stage["loss"] is not None]


@pytest.mark.slow
def test_an_exit_begins_near_the_model_and_a_resumed_run_fits_nothing(pool: Pool, tmp_path: Path) -> None:
    book = (Path(__file__).parents[2] / "data/books/train/frankenstein.txt").read_text()
    raw: dict[str, Any] = {
        "model": {"family": "llama", "hidden_size": 64, "num_layers": 6, "num_heads": 4},
        "data": {
            "train": str(write_text(tmp_path / "novel.txt", book[:400_000])),
            "tokenizer": "bytes",
            "sequence_length": 64,
            "cache": str(tmp_path / "cache"),
        },
        "objective": {"name": "backprop"},
        "train": {"steps": 250, "micro_batch_size": 16, "micro_batches_per_update": 1, "learning_rate": 4e-3},
        "run": {"dir": str(tmp_path / "before")},
    }
    pool.run(1, _train, raw, False, None)
    export_run(tmp_path / "before", tmp_path / "model")
    raw["model"], raw["objective"] = {"pretrained": str(tmp_path / "model")}, {"chunks": 2}
    raw["data"] |= {"train": str(write_text(tmp_path / "other.txt", book[-30_000:]))}
    del raw["data"]["tokenizer"]
    raw["train"] |= {"steps": 2, "learning_rate": 1e-4}
    heads = {
        "copied": ("head.kind=private",),
        "fitted": ("head.kind=fitted", "head.blocks=0"),
        "blocks": ("head.kind=fitted", "head.blocks=2"),
    }
    exits = {}
    for name, keys in heads.items():
        pool.run(1, _train, raw, False, None, *keys, f"run.dir={tmp_path / name}")
        exits[name], own = first_losses(tmp_path / name)
    far = exits["copied"] - own
    assert exits["blocks"] < own + 0.5 * far and exits["fitted"] < own + 0.7 * far, (exits, own)

    stopped = (*heads["blocks"], f"run.dir={tmp_path / 'stopped'}")
    pool.run(1, _train, raw, False, 1, *stopped)
    pool.run(1, _train, raw, True, None, *stopped)
    whole, resumed = (
        [saved_stage.read_weights(folder) for folder in saved_stage.folders(tmp_path / name, 2)]
        for name in ("blocks", "stopped")
    )
    assert all(same(one, other) for one, other in zip(whole, resumed, strict=True))
