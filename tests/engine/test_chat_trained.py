"""Conversations on two replicas of two pipeline ranks: every rank teaches the same answers, and the loss is that of one
process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from distributed import Pool
from engine_jobs import own_reports
from small_chat import KINDS, SAID, save_tokenizer, taught

import lptransformer
from lptransformer.data.tokenizer import load

UPDATES, MICRO_BATCHES = 3, 4


class Seen(NamedTuple):
    """What one process has seen: of every micro-batch the labels of each row, and the stretches of text that carry
    them; of every update its labels; the losses summed over its own labels, by (stage, update)."""

    counts: list[list[int]]
    texts: list[list[str]]
    label_tokens: list[int]
    loss_sums: dict[tuple[int, int], float]


def train(raw: dict[str, Any], overrides: tuple[str, ...]) -> Seen:
    with lptransformer.initialize(raw, overrides) as engine:
        tokenizer, numbers = load(raw["data"]["tokenizer"]), range(UPDATES * MICRO_BATCHES)
        batches = [engine.stream.batch(number) for number in numbers]
        texts = [[text for row in range(2) for text in taught(batch, row, tokenizer)] for batch in batches]
        reports = [one for _ in range(UPDATES) for one in own_reports(engine, engine.train_batch().reports)]
        return Seen(
            [engine.stream.label_counts(number) for number in numbers],
            texts,
            [engine.label_tokens(update, 1.0) for update in range(UPDATES)],
            {(one.stage, one.update): one.loss_sum for one in reports},
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_ranks_teach_the_answers_and_agree_on_their_number(pool: Pool, tmp_path: Path, kind: str) -> None:
    answers = [" ".join([SAID[number % 2]] * (1 + number % 3)) for number in range(60)]
    roles = ("user", "assistant", "user", "assistant")
    said = [[f"{number}?", one, "And?", SAID[0]] for number, one in enumerate(answers)]
    rows = [[{"role": r, "content": c} for r, c in zip(roles, one, strict=True)] for one in said]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    raw = {
        "model": {"family": "llama", "hidden_size": 16, "num_layers": 2, "num_heads": 2},
        "data": {
            "train": str(tmp_path / "chat.jsonl"),
            "tokenizer": str(save_tokenizer(tmp_path / "tokenizer", kind)),
            "sequence_length": 128,
            "cache": str(tmp_path / "cache"),
        },
        "train": {"micro_batch_size": 2, "micro_batches_per_update": MICRO_BATCHES, "grad_clip": 0},
    }
    (alone,) = pool.run(1, train, raw, ())
    ranks = pool.run(4, train, raw, ("parallel.pipeline=2", "parallel.data=2"))
    assert {text.removesuffix(KINDS[kind][2]).strip() for batch in alone.texts for text in batch} == set(answers)
    assert all(text.endswith(KINDS[kind][2]) for batch in alone.texts for text in batch)
    assert len({sum(counts) for counts in alone.counts}) > 1, "micro-batches of unlike numbers of labels"
    for one in ranks:
        assert one[:3] == alone[:3]
    for update, labels in enumerate(alone.label_tokens):
        assert labels == sum(map(sum, alone.counts[update * MICRO_BATCHES : (update + 1) * MICRO_BATCHES]))
    assert len(alone.loss_sums) == 2 * UPDATES
    for key, loss_sum in alone.loss_sums.items():  # two replicas add up in another order
        both = [one.loss_sums[key] for one in ranks if key in one.loss_sums]
        assert len(both) == 2 and sum(both) == pytest.approx(loss_sum, rel=1e-5)
