"""The loss of an update is the sum over its label tokens divided by their number, however they are spread over
micro-batches and replicas."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from distributed import Pool
from engine_jobs import load_config, make_stream, train
from parity import compare, expected, gather, learning_rates, runs_of, whole_model_config
from tiers import slow

from lptransformer.engine.interface import TrainingEngine

LABELS = (1, 7, 0, 200)
LONG = ("data.sequence_length=128", "model.num_layers=4", "train.steps=4")
SGD = ("optimizer.name=sgd", "optimizer.momentum=0.9", "train.learning_rate=0.5")
UPDATES = 3


def zero(stage: int) -> str:
    return f"deepspeed.zero_optimization.stage={stage}"


@pytest.mark.parametrize(
    ("objective", "layout", "more"),
    [
        ("objective.chunks=2", ("parallel.data=2",), ()),
        ("objective.chunks=2", ("parallel.data=2", "parallel.pipeline=2"), ("head.token_fraction=0.3",)),
        slow("objective.name=backprop", ("parallel.pipeline=2",), ()),
        slow("objective.name=overlapping", ("parallel.pipeline=2",), ("objective.chunks=4", "train.dtype=fp64")),
        slow("objective.chunks=2", ("parallel.data=2",), (zero(2),)),
        slow("objective.chunks=2", ("parallel.data=1",), (zero(3), "head.token_fraction=0.3")),
    ],
)
def test_it_is_the_plain_loop_bit_for_bit(
    objective: str, layout: tuple[str, ...], more: tuple[str, ...], pool: Pool
) -> None:
    """Clipping is off where DeepSpeed's formula differs by rounding on two replicas."""
    overrides = (*LONG, objective, *more, *(("train.grad_clip=0",) if zero(2) in more else ()))
    parallel = load_config((*overrides, *layout)).parallel
    trained = pool.run(parallel.pipeline * parallel.data, _train, (*overrides, *layout))
    stage = load_config(overrides).deepspeed.get("zero_optimization", {}).get("stage", 0)
    formulas = {"clip_formula": {0: "torch", 2: "zero12", 3: "zero3"}[stage], "replicas": parallel.data}
    formulas["averaging"] = "accumulate_then_average" if stage == 0 else "average_then_accumulate"
    got = gather(trained)
    tolerance = 1e-10 if "train.dtype=fp64" in more else 0.0  # pulls add up gradients in another order
    compare(got, expected(overrides, UPDATES, LABELS, **formulas), tolerance)


def test_labels_are_counted_once_an_update() -> None:
    class Counting:
        calls = 0

        def label_counts(self, index: int) -> list[int]:
            self.calls += 1
            return [index, 7]

    stream = Counting()
    engine: Any = SimpleNamespace(stream=stream, blueprint=SimpleNamespace(micro_batches=4, replicas=1))
    engine._label_tokens = {}
    for update in (0, 1, 0, 1, 2):
        for fraction in (1.0, 0.5, 1.0, 0.5):
            TrainingEngine.label_tokens(engine, update, fraction)
    assert stream.calls == 3 * 4 * 2, "of every update, of four micro-batches, for two heads"
    assert TrainingEngine.label_tokens(engine, 2, 1.0) == 8 + 9 + 10 + 11 + 4 * 7


def _train(overrides: tuple[str, ...]) -> object:
    return train(overrides, UPDATES, labels=LABELS)


def test_it_is_one_plain_batch(pool: Pool) -> None:
    """Four micro-batches on two replicas, and all of their rows at once through the library's model."""
    overrides = (*LONG, "objective.name=backprop", "train.grad_clip=0", "optimizer.weight_decay=0", *SGD)
    config = load_config(overrides)
    hf_config = whole_model_config(config, 64)
    seeded = reference.Net(hf_config, runs_of(config))
    seeded.initialise(config.train.seed)
    model = seeded.model.train()
    stream, step = make_stream(config, LABELS), torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    losses = []
    for update, learning_rate in enumerate(learning_rates(config, UPDATES)):
        batches = [stream.batch(index) for index in range(4 * update, 4 * update + 4)]
        assert sum(batch.label_tokens for batch in batches) == sum(LABELS)
        logits = model(input_ids=torch.cat([batch.input_ids for batch in batches])).logits
        loss = F.cross_entropy(logits.flatten(0, 1), torch.cat([batch.labels for batch in batches]).flatten())
        loss.backward()
        losses.append(loss.item())
        step.param_groups[0]["lr"] = learning_rate
        step.step()
        step.zero_grad()
    got = gather(pool.run(2, _train, (*overrides, "parallel.data=2")))
    assert [loss for (loss,) in got.losses] == pytest.approx(losses, rel=1e-6)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(got.weights[name], weight.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [0, slow(1), slow(2), slow(3)])
def test_an_update_without_a_label_is_skipped_and_counted(stage: int, pool: Pool) -> None:
    overrides = ("objective.chunks=2", "model.num_layers=2", "parallel.data=2", zero(stage))
    trained = pool.run(2, _train_without, overrides)
    for one in trained:
        for index, reports in one.reports.items():
            assert [report.skipped for report in reports] == [True, False]
            assert math.isnan(reports[0].loss) and math.isfinite(reports[1].loss)
            assert reports[1].learning_rate > reports[0].learning_rate  # warm-up goes on
            before, after, later = (weights for weights, _ in one.history[index])
            assert all(torch.equal(before[name], after[name]) for name in before)
            assert any(not torch.equal(after[name], later[name]) for name in before)


def _train_without(overrides: tuple[str, ...]) -> object:
    return train(overrides, 2, history=True, labels=(0, 0, 0, 0, 3, 0, 30, 1))


def test_positions_are_drawn_where_there_are_labels() -> None:
    from lptransformer.models.head import token_positions

    labels = torch.full((3, 12), -100)
    labels[0, 4:8], labels[1, :11] = 5, 5
    chosen = token_positions(0, 1, 2, 3, 12, 0.5, labels)
    assert chosen.shape == (3, 6)  # round(0.5 * 11) = 6 of the second row
    seen = labels.gather(1, chosen) != -100
    assert seen.sum(1).tolist() == [2, 6, 0] and all(len(set(row.tolist())) >= 2 for row in chosen[:1])
    full = labels.clone()
    full[:, :11], full[:, 11] = 5, -100
    assert torch.equal(token_positions(0, 1, 2, 3, 12, 0.5, full), token_positions(0, 1, 2, 3, 12, 0.5))


def test_a_set_knows_its_labels_without_being_read(tmp_path: Path) -> None:
    from saved_runs import make_run

    from lptransformer.data.token_set import TokenSet
    from lptransformer.data.train_stream import TrainStream

    make_run(tmp_path, valid={"short": "Only a few words. " * 9})
    for manifest in (tmp_path / "cache").glob("*/manifest.json"):
        tokens = TokenSet.open(manifest.parent)
        counts = tokens.label_counts(range(len(tokens))).tolist()
        assert counts == [len(tokens.row(row)) - 1 for row in range(len(tokens))]
        stream = TrainStream([tokens], None, seed=0, micro_batch_size=3)
        for index in (0, 5):
            assert stream.label_counts(index) == [int((row != -100).sum()) for row in stream.batch(index).labels]
