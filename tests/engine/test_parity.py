"""The engine over any number of processes equals the plain one-process loop of reference.py, bit for bit.

Conditions: fp32, one thread, no dropout, initial weights seeded per unit, the same chunks of the loss, the clip
formula of the ZeRO stage. Gradients are accumulated over four micro-batches and clipped (the clip is active at every
update, which is asserted), the learning rate warms up from 0 and decays. Where bits cannot be equal the test says why
and how close they are.
"""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
import yaml
from distributed import Pool
from engine_jobs import Trained, load_config, make_stream, train
from parity import compare, expected, gather, learning_rates, runs_of, whole_model_config
from tiers import full, slow
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM

UPDATES = 4
FAMILIES = ("gpt2", "llama")
OBJECTIVES = {
    "chunked-1": "objective.chunks=1",
    "chunked-2": "objective.chunks=2",
    "chunked-4": "objective.chunks=4",
    "greedy": "objective.name=greedy",
}
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9", "train.learning_rate=0.5")
OPTIMIZERS: dict[str, tuple[str, ...]] = {"adamw": (), "sgd": SGD}
ZERO12, ZERO3 = {"clip_formula": "zero12"}, {"clip_formula": "zero3"}
# A gradient norm off by a rounding moves an element of the weights by a rounding of its update, and what follows from
# it. AdamW divides by the size of the gradient: where that is nothing but rounding itself (the bias of GPT-2's keys,
# which no loss depends on) the rounding grows to the size of an update. Measured: 4e-7 with SGD, 2e-4 with AdamW.
TOLERANCE = {"sgd": 2e-6, "adamw": 1e-3}
Cached = dict[tuple[Any, ...], reference.Result]


@pytest.fixture(scope="module")
def results() -> Cached:
    return {}


def run(pool: Pool, results: Cached, overrides: tuple[str, ...], updates: int = UPDATES) -> reference.Result:
    """What the engine gives, under the reference's names; run once for each configuration."""
    if (overrides, updates) not in results:
        results[overrides, updates] = gather(start(pool, overrides, updates))
    return results[overrides, updates]


def start(pool: Pool, overrides: tuple[str, ...], updates: int) -> list[Trained]:
    parallel = load_config(overrides).parallel
    return pool.run(parallel.pipeline * parallel.data, train, overrides, updates)


def settings(family: str, objective: str, optimizer: str, *more: str) -> tuple[str, ...]:
    return (f"model.family={family}", OBJECTIVES[objective], *OPTIMIZERS[optimizer], *more)


def clip_is_active(result: reference.Result, overrides: tuple[str, ...]) -> bool:
    """Whether the gradients of every stage were clipped at every update."""
    clip = load_config(overrides).train.grad_clip
    return 0 < clip < min(norm for norms in result.grad_norms for norm in norms)


def placements() -> list[Any]:
    """Family, objective, optimizer, pipeline ranks: the whole product."""
    found = []
    for case in product(FAMILIES, OBJECTIVES, OPTIMIZERS, (1, 2, 4)):
        family, _, optimizer, ranks = case
        if optimizer == "sgd" and ranks < 4:
            found.append(full(*case) if family == "llama" else slow(*case))
        else:
            found.append(slow(*case) if (family, ranks) == ("llama", 2) else case)
    return found


@pytest.mark.parametrize(("family", "objective", "optimizer", "pipeline"), placements())
def test_the_engine_equals_the_plain_loop(
    pool: Pool, results: Cached, family: str, objective: str, optimizer: str, pipeline: int
) -> None:
    overrides = settings(family, objective, optimizer)
    wanted = expected(overrides, UPDATES)
    assert clip_is_active(wanted, overrides)
    compare(run(pool, results, (*overrides, f"parallel.pipeline={pipeline}")), wanted)


# --------------------------------------------------------------------------------------------- ZeRO, replicas


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


def zero_cases() -> list[Any]:
    cases = product((1, 2, 3), FAMILIES, OPTIMIZERS)
    found = []
    for case in cases:
        stage, *rest = case
        found.append(case if rest != ["llama", "sgd"] else slow(*case) if stage == 1 else full(*case))
    return found


@pytest.mark.parametrize(("stage", "family", "optimizer"), zero_cases())
def test_zero_with_one_replica_equals_the_plain_loop_with_its_clip_formula(
    pool: Pool, results: Cached, stage: int, family: str, optimizer: str
) -> None:
    """Llama at ZeRO 3 to a tolerance: its queries, keys and values read one tensor, and DeepSpeed's hooks around each
    change the order in which autograd adds up the three gradients (GPT-2's are one product, and a sum of two has one
    order). The bits still do not depend on the placement."""
    overrides = settings(family, "chunked-4", optimizer)
    wanted = expected(overrides, UPDATES, **(ZERO3 if stage == 3 else ZERO12))
    assert clip_is_active(wanted, overrides)
    got = run(pool, results, (*overrides, "parallel.pipeline=2", zero(stage)))
    if (stage, family) == (3, "llama"):
        compare(got, wanted, tolerance=1e-5)
        compare(got, run(pool, results, (*overrides, "parallel.pipeline=1", zero(stage))))
    else:
        compare(got, wanted)


# What replicas do to the order of additions.
REPLICAS = {
    0: {"replicas": 2, "averaging": "accumulate_then_average"},
    1: {"replicas": 2, "averaging": "accumulate_then_average", **ZERO12},
    2: {"replicas": 2, "averaging": "average_then_accumulate", **ZERO12},
    3: {"replicas": 2, "averaging": "average_then_accumulate", **ZERO3},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("stage", "clip"), [(0, 0.25), (1, 0), (2, 0), (3, 0.25)])
def test_two_replicas_equal_the_plain_loop(
    pool: Pool, results: Cached, stage: int, clip: float, optimizer: str
) -> None:
    """At ZeRO 1 to 3 each replica sums the squares of its part of the gradients, so that the norms (single precision
    at 1 and 2, double at 3) are a rounding apart; with clipping off at 1 and 2 that reaches no weight."""
    overrides = settings("gpt2", "chunked-2", optimizer, f"train.grad_clip={clip}")
    wanted = expected(overrides, UPDATES, **REPLICAS[stage])
    assert clip_is_active(wanted, overrides) == (clip > 0)
    got = run(pool, results, (*overrides, "parallel.pipeline=2", "parallel.data=2", zero(stage)))
    compare(got, wanted, norm_tolerance={0: 0.0, 1: 3e-7, 2: 3e-7, 3: 1e-15}[stage])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_two_replicas_with_active_clipping_at_zero_1_and_2_are_close_to_the_plain_loop(
    pool: Pool, results: Cached, stage: int, optimizer: str
) -> None:
    """Not equal, because the norm that the gradients are divided by is a rounding apart (see above)."""
    overrides = settings("gpt2", "chunked-2", optimizer)
    wanted = expected(overrides, UPDATES, **REPLICAS[stage])
    assert clip_is_active(wanted, overrides)
    got = run(pool, results, (*overrides, "parallel.pipeline=2", "parallel.data=2", zero(stage)))
    compare(got, wanted, TOLERANCE[optimizer])


# --------------------------------------------------------------------------------------------- cuts, chunks of the loss


@pytest.mark.parametrize("pipeline", [2, 3])
def test_runs_of_unequal_length(pool: Pool, results: Cached, pipeline: int) -> None:
    overrides = ("model.family=llama", "objective.chunks=[3,3,2]")
    assert runs_of(load_config(overrides)) == [(0, 2), (3, 5), (6, 7)]
    wanted = expected(overrides, UPDATES)
    assert clip_is_active(wanted, overrides)
    compare(run(pool, results, (*overrides, f"parallel.pipeline={pipeline}")), wanted)


CUT_SPAN = ("parallel.pipeline=2", "parallel.partition=[5,3]")  # the second run of four blocks lies on both ranks


@pytest.mark.parametrize("family", FAMILIES)
def test_a_partition_that_cuts_through_a_span(pool: Pool, family: str) -> None:
    overrides = (f"model.family={family}", "objective.chunks=[4,4]")
    wanted = expected(overrides, UPDATES)
    assert clip_is_active(wanted, overrides)
    trained = start(pool, (*overrides, *CUT_SPAN), UPDATES)
    plans = [plan for one in trained for plan in one.plans.values()]
    assert [(p.first_block, p.last_block, p.pipeline_rank) for p in plans] == [(0, 3, 0), (4, 4, 0), (5, 7, 1)]
    assert [p.has_head for p in plans] == [True, False, True]
    compare(gather(trained), wanted)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("stage", [1, 2])
def test_a_partition_that_cuts_through_a_span_at_zero_1_and_2(
    pool: Pool, results: Cached, stage: int, optimizer: str
) -> None:
    """Not equal: the norm of each stage is rounded to single precision before they are put together."""
    overrides = ("objective.chunks=[4,4]", *OPTIMIZERS[optimizer])
    wanted = expected(overrides, UPDATES, **ZERO12)
    assert clip_is_active(wanted, overrides)
    compare(run(pool, results, (*overrides, *CUT_SPAN, zero(stage))), wanted, TOLERANCE[optimizer])


@pytest.mark.parametrize(("family", "chunk_tokens"), [("gpt2", 8), ("llama", 5)])
def test_a_loss_in_several_chunks(pool: Pool, results: Cached, family: str, chunk_tokens: int) -> None:
    """32 rows: four chunks of 8, or six of 5 and one of 2."""
    overrides = settings(family, "chunked-2", "adamw", f"loss.chunk_tokens={chunk_tokens}")
    wanted = expected(overrides, UPDATES)
    assert clip_is_active(wanted, overrides)
    compare(run(pool, results, (*overrides, "parallel.pipeline=2")), wanted)


# --------------------------------------------------------------------------------------------- ordinary training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_chunk_equals_ordinary_training_of_the_whole_model(
    pool: Pool, results: Cached, family: str, optimizer: str
) -> None:
    """The loop that anybody would write: the library's model, its own labels and loss, torch's clipping."""
    overrides = settings(family, "chunked-1", optimizer)
    config = load_config(overrides)
    stream, options, sizes = make_stream(config), config.optimizer, config.train
    hf_config = whole_model_config(config, stream.vocab_size)
    seeded = reference.Net(hf_config, runs_of(config))
    seeded.initialise(sizes.seed)
    model = AutoModelForCausalLM.from_config(hf_config)
    model.load_state_dict(seeded.model.state_dict())
    model.train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    if optimizer == "sgd":
        step: torch.optim.Optimizer = torch.optim.SGD(groups, lr=0.0, momentum=options.momentum)
    else:
        step = torch.optim.AdamW(groups, lr=0.0, betas=(options.beta1, options.beta2), eps=options.eps)

    accumulation = sizes.micro_batches_per_update
    label_tokens = accumulation * sizes.micro_batch_size * (config.data.sequence_length - 1)
    losses, norms = [], []
    for update, learning_rate in enumerate(learning_rates(config, UPDATES)):
        total = 0.0
        for index in range(accumulation):
            ids = stream.batch(update * accumulation + index).input_ids
            loss = model(input_ids=ids, labels=ids, num_items_in_batch=label_tokens).loss
            loss.backward()
            total += loss.item()
        losses.append([total])
        norms.append([clip_grad_norm_(model.parameters(), sizes.grad_clip).item()])
        for group in step.param_groups:
            group["lr"] = learning_rate
        step.step()
        step.zero_grad()

    weights = {name: p.detach() for name, p in model.named_parameters()}
    got = run(pool, results, (*overrides, "parallel.pipeline=2"))
    exact = reference.Result(got.losses, norms, weights)
    compare(got, exact)
    # The library divides every micro-batch's loss in single precision, the engine their sum in double.
    assert [loss for losses in got.losses for loss in losses] == pytest.approx([loss for [loss] in losses], rel=1e-6)


# --------------------------------------------------------------------------------------------- the comparison can fail


def faults() -> list[Any]:
    quick = [("gpt2", "greedy", "adamw"), ("llama", "chunked-2", "sgd")]
    pairs = [("gpt2", "chunked-2", "adamw"), ("gpt2", "chunked-4", "sgd"), ("llama", "chunked-4", "adamw")]
    pairs += [("llama", "greedy", "sgd")]
    found = [("gpt2", "chunked-1", "adamw", "loss_scale")]  # the other two need a border
    for case in product(FAMILIES, ("chunked-2", "chunked-4", "greedy"), OPTIMIZERS):
        for fault in ("no_detach", "loss_scale", "stale_weights"):
            with_fault = (*case, fault)
            found.append(with_fault if case in quick else slow(*with_fault) if case in pairs else full(*with_fault))
    return found


@pytest.mark.parametrize(("family", "objective", "optimizer", "fault"), faults())
def test_a_planted_error_is_found(
    pool: Pool, results: Cached, family: str, objective: str, optimizer: str, fault: str
) -> None:
    """Gradients that cross a border, a loss per micro-batch instead of per update, hidden states from weights of one
    update before: with each in the plain loop the same comparison fails, and more than rounding apart."""
    overrides = settings(family, objective, optimizer)
    got = run(pool, results, (*overrides, "parallel.pipeline=4"))
    compare(got, expected(overrides, UPDATES))
    with pytest.raises(AssertionError, match="weights model|weights transformer"):
        compare(got, expected(overrides, UPDATES, fault=fault))
    with pytest.raises(AssertionError, match="differences"):
        compare(got, expected(overrides, UPDATES, fault=fault), tolerance=1e-3)


def test_the_wrong_clip_formula_is_found(pool: Pool, results: Cached) -> None:
    overrides = settings("gpt2", "chunked-4", "adamw")
    got = run(pool, results, (*overrides, "parallel.pipeline=2", zero(3)))
    with pytest.raises(AssertionError, match="grad norm of span 0 at update 1"):
        compare(got, expected(overrides, UPDATES))


# --------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.slow
def test_bf16_trains_and_does_not_depend_on_the_placement(pool: Pool, results: Cached, stage: int) -> None:
    overrides = ("model.family=llama", "objective.chunks=2", "train.dtype=bf16", "train.grad_clip=1", zero(stage))
    overrides += ("train.warmup_steps=0",)
    together = run(pool, results, (*overrides, "parallel.pipeline=1"), 10)
    apart = run(pool, results, (*overrides, "parallel.pipeline=2"), 10)
    assert {tensor.dtype for tensor in together.weights.values()} == {torch.bfloat16}
    compare(apart, together)
    assert all(tensor.isfinite().all() for tensor in together.weights.values())
    assert all(math.isfinite(norm) for norms in together.grad_norms for norm in norms)
    for first, last in zip(together.losses[0], together.losses[-1], strict=True):
        assert last < first - 0.1
    in_fp32 = expected(tuple(o for o in overrides if "dtype" not in o), 10)
    for ours, theirs in zip(together.losses, in_fp32.losses, strict=True):
        assert ours == pytest.approx(theirs, rel=0.01)


# --------------------------------------------------------------------------------------------- full size


def test_parity_at_the_size_of_the_quick_start(pool: Pool, results: Cached) -> None:
    """Its model, windows, micro-batches and pipeline ranks, from its own configuration; the data is random."""
    quickstart = yaml.safe_load((Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text())
    quickstart["train"] |= {"eval_every": 0, "warmup_steps": 1, "steps": 12, "grad_clip": 0.25}
    sections = ("model", "objective", "parallel", "train")
    overrides = tuple(f"{section}.{key}={value}" for section in sections for key, value in quickstart[section].items())
    overrides += tuple(f"data.{key}={quickstart['data'][key]}" for key in ("vocab_size", "sequence_length"))
    config = load_config(overrides)
    assert config.parallel.pipeline == 2 and config.model.hidden_size >= 128
    assert make_stream(config).vocab_size == quickstart["data"]["vocab_size"]
    wanted = expected(overrides, 3)
    assert clip_is_active(wanted, overrides)
    compare(run(pool, results, overrides, 3), wanted)
