"""Families of every build through the real engine: backprop over two pipeline ranks is plain training of the library's
model, and chunked training goes on from a folder with every kind of head."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import VOCAB_SIZE, load_config, make_stream, train
from families import TRAINED
from transformers import AutoModelForCausalLM, PreTrainedModel

from lptransformer.models import hf_config, hf_parts
from lptransformer.models.whole_model import whole_weights

pytestmark = pytest.mark.slow
# A bias in the head, blocks that give tuples, maps beside the blocks and no final norm, state spaces, with attention,
# mixtures of experts, soft caps and windows, layers of several kinds.
FAMILIES = ["GPT-J", "Bloom", "OPT, projected, norms behind", "Mamba", "Jamba", "Mixtral", "Gemma 2", "Qwen3-Next"]
UPDATES, LEARNING_RATE = 2, 0.1
PLAIN = ("model.hidden_size=null", "model.num_layers=null", "model.num_heads=null", "train.grad_clip=0")
PLAIN += (
    "optimizer.name=sgd",
    "optimizer.momentum=0",
    "optimizer.weight_decay=0",
    f"train.learning_rate={LEARNING_RATE}",
)
PLAIN += ("train.lr_scheduler=constant", "train.warmup_steps=0")


def model_folder(name: str, folder: Path) -> PreTrainedModel:
    """An untied model of the family, saved there: tied ones are trained as two."""
    config = copy.deepcopy(TRAINED[name])
    config.tie_word_embeddings, config.vocab_size = False, VOCAB_SIZE
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(hf_config.for_training(config))
    model.save_pretrained(folder)
    return model.train()


def plain_training(model: Any, overrides: tuple[str, ...], micro_batches: int) -> dict[str, torch.Tensor]:
    stream = make_stream(load_config(overrides))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    for update in range(UPDATES):
        for index in range(update * micro_batches, (update + 1) * micro_batches):
            ids = stream.batch(index).input_ids
            (model(input_ids=ids, labels=ids, use_cache=False).loss / micro_batches).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: one.detach() for key, one in model.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_backprop_over_two_ranks_is_plain_training(name: str, pool: Pool, tmp_path: Path) -> None:
    model = model_folder(name, tmp_path / "model")
    parts = hf_parts.anatomy(model.config)
    overrides = (*PLAIN, f"model.pretrained={tmp_path / 'model'}", "objective.name=backprop", "parallel.pipeline=2")
    trained = pool.run(2, train, overrides, UPDATES)
    found = whole_weights(parts, (trained[rank].weights[rank] for rank in (0, 1)))
    before = {key: one.detach().clone() for key, one in model.named_parameters()}
    expected = plain_training(model, overrides, 4)
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(before[key], weight) for key, weight in expected.items())


def test_a_router_loss_is_that_of_plain_training(pool: Pool, tmp_path: Path) -> None:
    model = model_folder("Mixtral", tmp_path / "model")
    model.config.output_router_logits = True
    model.router_aux_loss_coef = model.config.router_aux_loss_coef = 0.5  # type: ignore[assignment]
    model.config.save_pretrained(tmp_path / "model")
    overrides = (*PLAIN, f"model.pretrained={tmp_path / 'model'}", "objective.name=backprop", "parallel.data=2")
    trained = pool.run(2, train, overrides, UPDATES)
    found = whole_weights(hf_parts.anatomy(model.config), [trained[0].weights[0]])
    for key, weight in plain_training(model, overrides, 4).items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["private", "shared", "low_rank"])
@pytest.mark.parametrize("name", ["GPT-J", "OPT, projected, norms behind", "Mixtral"])
def test_chunks_are_trained_with_every_kind_of_head(name: str, head: str, pool: Pool, tmp_path: Path) -> None:
    """One replica and pipeline rank, and two of each, give the same weights."""
    model_folder(name, tmp_path / "model")
    overrides = (*PLAIN, f"model.pretrained={tmp_path / 'model'}", "objective.chunks=2", f"head.kind={head}")
    overrides += ("head.rank=4",) if head == "low_rank" else ()
    (alone,) = pool.run(1, train, overrides, UPDATES)
    apart = pool.run(2, train, (*overrides, "parallel.pipeline=2"), UPDATES)
    for stage in (0, 1):
        for key, weight in alone.weights[stage].items():
            assert torch.equal(weight, apart[stage].weights[stage][key]), key
