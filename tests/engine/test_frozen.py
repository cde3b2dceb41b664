"""Frozen weights and tied ones in the engine, on any placement, against plain training in torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import VOCAB_SIZE, Trained, load_config, make_stream, open_engine, optimizer_tensors, train
from parity import compare, expected, gather, largest_difference, learning_rates, optimizer_options
from reference import make_optimizer
from tiers import slow
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

from lptransformer.engine.deepspeed_stage import FrozenStage, TrainedStage
from lptransformer.methods.heads import FittedOptions
from lptransformer.models import hf_config, hf_parts
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.stage import for_training, make_stage
from lptransformer.models.whole_model import whole_weights
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.saved_stage import Frozen, SavedFor, SavedStage, StageContent

UPDATES = 3
SIZES = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_layers": 4, "num_heads": 2, "intermediate_size": None}
SIZES |= {"num_key_value_heads": None, "max_position_embeddings": 16, "end_of_text_id": None}
PRETRAINED = ("model.hidden_size=null", "model.num_layers=null", "model.num_heads=null")
ENDS = "transformer.wte.*, transformer.wpe.*, lm_head.weight"
LOWER = "transformer.wte.*, transformer.wpe.*, 'transformer.h.[0-3].*'"
UPPER = "'transformer.h.[4-7].*', transformer.ln_f.*, lm_head.weight"
TWO, BACKPROP = "objective.chunks=2", "objective.name=backprop"
EXACT = ("train.dtype=fp64", "optimizer.name=sgd", "train.learning_rate=0.5")  # sums have no one order there
OVERLAPPING = ("objective.name=overlapping", "objective.chunks=4", *EXACT)
CASES: dict[str, tuple[str, ...]] = {
    "both ends": (f"train.freeze=[{ENDS}]", TWO),
    "all but biases and norms": ("train.freeze=['*.weight']", TWO),
    "a chunk with its head": (f"train.freeze=[{LOWER}, head.*]", TWO),
    "a chunk, and a head of copies": (f"train.freeze=[{LOWER}, head.*]", TWO, "head.kind=shared"),
    "a chunk but its head": (f"train.freeze=[{LOWER}]", TWO),
    "backprop, the lower half": (f"train.freeze=[{LOWER}]", BACKPROP),
    "backprop, the upper half": (f"train.freeze=[{UPPER}]", BACKPROP),
    "overlapping, a run between": ("train.freeze=['transformer.h.[45].*']", *OVERLAPPING),
    "deep supervision, the upper half": (f"train.freeze=[{UPPER}]", "objective.name=deep_supervision", *EXACT),
    "delayed, the upper half": (f"train.freeze=[{UPPER}]", "objective.name=delayed"),
    "hybrid, the lower half": (f"train.freeze=[{LOWER}]", TWO, "objective.backprop_every=2"),
}


# What is quick: on two ranks, a stage that only computes, one with copies, and pulls through a frozen one.
QUICK = ("a chunk, and a head of copies", "backprop, the upper half", "overlapping, a run between")
PLACED = [(case, pipeline) for case in CASES for pipeline in (1, 2)]


@pytest.mark.parametrize(
    ("case", "pipeline"), [one if one[0] in QUICK and one[1] == 2 else slow(*one) for one in PLACED]
)
def test_what_is_frozen_stays_and_the_rest_trains(pool: Pool, case: str, pipeline: int) -> None:
    overrides = (*CASES[case], f"parallel.pipeline={pipeline}")
    got = gather(pool.run(pipeline, train, overrides, UPDATES), load_config(overrides).head.kind)
    compare(got, expected(CASES[case], UPDATES), tolerance=1e-10 if EXACT[0] in overrides else 0.0)


# --------------------------------------------------------------------------------------------- ZeRO, resume


def whole_and_resumed(overrides: tuple[str, ...], folder: str) -> tuple[Trained, Trained, dict[int, int]]:
    """Four updates at once, and two and two from a checkpoint; numbers of each stage's moments, without padding."""
    whole = train(overrides, 4)
    train(overrides, 2, save=Path(folder))
    continued = train(overrides, 2, load=Path(folder))
    engine = open_engine(overrides)
    engine.train_batch()
    moments = {}
    for index, stage in engine.local.items():
        if isinstance(stage, TrainedStage):
            assert all(p.grad is None for p in stage.engine.module.parameters() if not p.requires_grad)
            moments[index] = sum(one.numel() for one in optimizer_tensors(stage) if one.dim() > 0)
    engine.close()
    return whole, continued, moments


MODES = [
    (0, "fp32"),
    slow(3, "bf16"),
    slow(1, "fp32"),
    slow(2, "fp32"),
    slow(3, "fp32"),
    slow(1, "bf16"),
    slow(2, "bf16"),
]


@pytest.mark.parametrize(("stage", "dtype"), MODES)
def test_every_zero_stage_trains_the_rest_and_continues(pool: Pool, tmp_path: Path, stage: int, dtype: str) -> None:
    """Two replicas of two pipeline ranks: a stage that only computes, and one that trains its attention alone."""
    plain = (f"train.freeze=[{LOWER}, head.*, '*.mlp.*', lm_head.weight]", TWO, "train.grad_clip=0")
    placed = ("parallel.pipeline=2", "parallel.data=2", f"train.dtype={dtype}")
    overrides = (*plain, *placed, f"deepspeed.zero_optimization.stage={stage}")
    found = pool.run(4, whole_and_resumed, overrides, str(tmp_path))
    for whole, continued, moments in found:
        for index, weights in whole.weights.items():
            assert all(torch.equal(weight, continued.weights[index][name]) for name, weight in weights.items())
        trained = 4 * (32 * 4 * 32 + 4 * 32 + 4 * 32) + 2 * 32  # attention and norms of four blocks, the last norm
        own = trained if stage == 0 else trained / 2
        assert moments == ({} if whole.pipeline_rank == 0 else {1: pytest.approx(2 * own, rel=0.01)})
    if dtype == "fp32":
        order = "accumulate_then_average" if stage < 2 else "average_then_accumulate"
        wanted = expected(plain, 4, replicas=2, averaging=order)
        compare(gather([whole for whole, *_ in found]), wanted, norm_tolerance=1e-6)


def test_a_map_that_was_fitted_is_loaded_where_nothing_trains(tmp_path: Path) -> None:
    config = load_config(("objective.chunks=2",))
    config.head = FittedOptions(kind="fitted", blocks=1)  # which a configuration takes of a trained model only
    blueprint = make_blueprint(config, 64, None)
    plan = replace(blueprint.stages[0], trained=False)
    saved, fresh = (for_training(make_stage(plan, blueprint, seed=0), blueprint) for _ in range(2))
    assert saved.head is not None and saved.head.fitted is not None
    torch.nn.init.constant_(saved.head.fitted.linear.weight, 0.5)
    state = saved_stage.describe(plan, len(blueprint.stages), 1, {}, "fp32", {}) | {"skipped_in_a_row": 0}
    content = StageContent(state=state, frozen=Frozen(dict(saved.state_dict())))
    checkpoint.finish(tmp_path, 1, saved_stage.write(tmp_path, 1, 0, 0, content))
    kept = SavedFor(plan, [SavedStage(checkpoint.stage_folder(tmp_path, 1, 0))])
    FrozenStage(fresh, torch.float32, torch.device("cpu")).load(kept)
    assert fresh.head is not None and fresh.head.fitted is not None and (fresh.head.fitted.linear.weight == 0.5).all()


# --------------------------------------------------------------------------------------------- tied


def tied_folder(family: str, folder: Path) -> None:
    config = hf_config.new_config(family, **SIZES)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def plain_training(
    folder: Path, overrides: tuple[str, ...], updates: int, model: Any = None
) -> tuple[list[float], dict[str, Tensor]]:
    """The library's tied model in an ordinary loop, or another one: gradient norms and weights."""
    model = model or AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    config = load_config(overrides)
    stream, per_update = make_stream(config), config.train.micro_batches_per_update
    trained = [p for name, p in model.named_parameters() if p.requires_grad and name not in config.train.freeze]
    step, norms = make_optimizer(trained, optimizer_options(config)), []
    for update, rate in enumerate(learning_rates(config, updates)):
        for index in range(update * per_update, (update + 1) * per_update):
            batch = stream.batch(index)
            logits = model(batch.input_ids, use_cache=False).logits.flatten(0, 1)
            loss = F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100, reduction="sum")
            tokens = per_update * int((batch.labels != -100).sum())
            (loss * (1 / tokens)).backward()
        norms.append(clip_grad_norm_(trained, config.train.grad_clip).item())
        for group in step.param_groups:
            group["lr"] = rate
        step.step()
        step.zero_grad()
    return norms, {name: p.detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("family", "zero", "frozen"),
    [
        ("llama", 0, ""),
        slow("gpt2", 3, ""),
        slow("gpt2", 0, ""),
        slow("llama", 2, ""),
        slow("llama", 0, "lm_head.weight"),
    ],
)
def test_a_model_that_stays_tied_is_plain_training_of_it(
    pool: Pool, tmp_path: Path, family: str, zero: int, frozen: str
) -> None:
    """One matrix with one gradient, bit for bit, from a checkpoint too, which holds it under both names."""
    tied_folder(family, tmp_path / "model")
    overrides = (*PRETRAINED, f"model.pretrained={tmp_path / 'model'}", "model.tie=keep", BACKPROP)
    overrides += (f"train.freeze=[{frozen}]", f"deepspeed.zero_optimization.stage={zero}")
    (trained,) = pool.run(1, partial(whole_and_resumed, folder=str(tmp_path)), overrides)
    whole, continued, _ = trained
    embedding = "model.embed_tokens.weight" if family == "llama" else "transformer.wte.weight"
    plain = tuple(one.replace(frozen, embedding) if frozen else one for one in overrides)
    norms, wanted = plain_training(tmp_path / "model", plain, 4)
    assert min(norms) > load_config(overrides).train.grad_clip
    exact = zero == 0
    found = [report.grad_norm for report in whole.reports[0]]
    assert found == (norms if exact else pytest.approx(norms, rel=1e-6))
    assert torch.equal(whole.weights[0]["head.readout.weight"], whole.weights[0][f"body.{embedding.partition('.')[2]}"])
    weights = whole_weights(hf_parts.anatomy(hf_config.read_config(tmp_path / "model")), [whole.weights[0]])
    for name, weight in wanted.items():
        assert torch.equal(weights[name], weight) if exact else largest_difference(weights[name], weight) < 1e-3, name
    assert all(torch.equal(one, continued.weights[0][name]) for name, one in whole.weights[0].items())
