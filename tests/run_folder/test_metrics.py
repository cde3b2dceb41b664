"""lptransformer.run_folder.metrics: sums over stages and replicas, the files, the n-gram baselines."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lptransformer.errors import RunError
from lptransformer.evaluation import ngram
from lptransformer.evaluation.ngram import nll
from lptransformer.run_folder.metrics import (
    Aggregator,
    EvaluationReport,
    MetricsRow,
    StageReport,
    TextCounts,
    perplexity,
    report_from_dict,
)
from lptransformer.run_folder.metrics_log import MetricsWriter, read_metrics

STAGES = [(0, 0, 1), (1, 2, 2), (2, 3, 5)]
TEXT = TextCounts(tokens=100, bytes=400, words=80)


def stage_report(update: int, stage: int, data_rank: int, **changes: Any) -> StageReport:
    values: dict[str, Any] = {
        "loss_sum": 10.0 * update + stage,
        "label_tokens": 4,
        "grad_norm": 0.5 + stage,
        "skipped": False,
        "learning_rate": 0.1 / update,
        "seconds": 2.0,
        "idle_seconds": 0.5,
        "peak_memory_bytes": 1000 + data_rank,
    }
    return StageReport(update=update, stage=stage, data_rank=data_rank, **(values | changes))


def update_row(update: int, losses: list[float | None] | None = None) -> MetricsRow:
    entries = [
        {
            "stage": stage,
            "last_block": 2 * stage + 1,
            "loss": loss,
            "grad_norm": 1.5,
            "skipped": stage == 1,
            "idle_share": 0.25,
            "memory_bytes": 7,
        }
        for stage, loss in enumerate(losses or [3.0, 2.0])
    ]
    numbers = {"tokens": 8 * update, "seconds": 0.5 * update, "tokens_per_second": 16.0, "learning_rate": 0.001}
    numbers |= {"tflops_per_process": 0.25, "mfu": None}
    return {"update": update, **numbers, "stages": entries}


def evaluation_row(update: int, name: str = "emma") -> MetricsRow:
    numbers = {"nll_per_token": 1.0, "perplexity": math.inf, "bits_per_byte": 0.5, "word_perplexity": 9.0, "tokens": 5}
    return {"update": update, "evaluation": name, "exits": [{"stage": 1, "last_block": 3, **numbers}]}


def csv_rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- perplexity


def test_perplexity_by_hand() -> None:
    numbers = perplexity(99 * math.log(2), 99, TextCounts(tokens=100, bytes=50, words=25))
    assert numbers.nll_per_token == pytest.approx(math.log(2))
    assert numbers.perplexity == pytest.approx(2.0)
    assert numbers.bits_per_byte == pytest.approx(2.0)  # 1 bit a token, 2 tokens a byte
    assert numbers.word_perplexity == pytest.approx(16.0)  # 4 tokens a word
    assert numbers.tokens == 99


def test_perplexity_of_numbers_that_are_too_large_or_not_finite() -> None:
    large = perplexity(1e6, 10, TEXT)
    assert large.perplexity == math.inf and large.word_perplexity == math.inf and math.isfinite(large.bits_per_byte)
    assert math.isnan(perplexity(math.nan, 10, TEXT).perplexity)
    assert perplexity(math.inf, 10, TEXT).perplexity == math.inf
    nothing = perplexity(0.0, 0, TextCounts(tokens=1, bytes=0, words=0))
    assert all(
        math.isnan(x)
        for x in (nothing.nll_per_token, nothing.perplexity, nothing.bits_per_byte, nothing.word_perplexity)
    )


# --- reports


@pytest.mark.parametrize(
    "report",
    [
        stage_report(3, 1, 0, loss_sum=None, grad_norm=math.inf, skipped=True),
        EvaluationReport(update=3, evaluation="emma", stage=2, data_rank=1, nll_sum=12.5, label_tokens=7),
    ],
)
def test_reports_survive_json(report: StageReport | EvaluationReport) -> None:
    assert report_from_dict(json.loads(json.dumps(report.to_dict()))) == report


# --- aggregation


def test_replicas_are_summed_before_dividing() -> None:
    aggregator = Aggregator([(0, 0, 3)], data_replicas=2)
    # The mean of the two means would be 3.0, the mean of the idle shares 0.3.
    assert aggregator.add(stage_report(1, 0, 1, loss_sum=10.0, label_tokens=2, seconds=4.0, idle_seconds=2.0)) == []
    (row,) = aggregator.add(stage_report(1, 0, 0, loss_sum=6.0, label_tokens=6, seconds=1.0, idle_seconds=0.1))
    assert row == {
        "update": 1,
        "tokens": 8,
        "seconds": 4.0,
        "tokens_per_second": 2.0,
        "tflops_per_process": None,
        "mfu": None,
        "learning_rate": 0.1,
        "stages": [
            {
                "stage": 0,
                "last_block": 3,
                "loss": 2.0,
                "grad_norm": 0.5,
                "skipped": False,
                "idle_share": pytest.approx(2.1 / 5.0),
                "memory_bytes": 1001,
            }
        ],
    }


def test_any_order_of_arrival_gives_the_same_records_in_the_order_of_the_updates() -> None:
    rng = random.Random(0)
    places = list(itertools.product(range(1, 6), range(3), range(3)))
    reports = [stage_report(u, s, d, loss_sum=rng.random(), seconds=rng.random()) for u, s, d in places]

    def rows_of(arrivals: list[StageReport]) -> list[MetricsRow]:
        aggregator = Aggregator(STAGES, data_replicas=3)
        return [row for report in arrivals for row in aggregator.add(report)]

    expected = rows_of(reports)
    assert [row["update"] for row in expected] == [1, 2, 3, 4, 5]
    assert [row["tokens"] for row in expected] == [12, 24, 36, 48, 60]
    assert [entry["last_block"] for entry in expected[0]["stages"]] == [1, 2, 5]
    for seed in range(20):
        shuffled = list(reports)
        random.Random(seed).shuffle(shuffled)
        assert rows_of(shuffled) == expected  # to the last bit
    assert rows_of(reports[::-1]) == expected


def test_a_later_update_waits_for_an_earlier_one() -> None:
    aggregator = Aggregator([(0, 0, 0), (1, 1, 1)], data_replicas=1)
    assert aggregator.add(stage_report(1, 0, 0)) == []
    assert aggregator.add(stage_report(2, 0, 0)) == []
    assert aggregator.add(stage_report(2, 1, 0)) == []  # update 2 is complete, update 1 is not
    assert [row["update"] for row in aggregator.add(stage_report(1, 1, 0))] == [1, 2]


def test_seconds_are_those_of_the_process_that_took_longest_in_total() -> None:
    aggregator = Aggregator([(0, 0, 0), (1, 1, 1)], data_replicas=1, update=10, tokens=100, seconds=50.0)
    rows = []
    for update, (slow, fast) in enumerate([(3.0, 1.0), (1.0, 2.5)], start=11):
        aggregator.add(stage_report(update, 0, 0, seconds=slow))
        rows += aggregator.add(stage_report(update, 1, 0, seconds=fast))
    assert [row["seconds"] for row in rows] == [53.0, 54.0]  # not 50 + 3 + 2.5
    assert [row["tokens_per_second"] for row in rows] == [4 / 3.0, 4.0]
    assert [row["tokens"] for row in rows] == [104, 108]
    assert [row["update"] for row in rows] == [11, 12]


def test_flops_are_those_of_the_update_over_the_seconds_of_its_row() -> None:
    of_update = {11: 6e12, 12: 2e12}
    aggregator = Aggregator(
        [(0, 0, 0)], data_replicas=1, update=10, process_flops=of_update.__getitem__, peak_flops=8e12
    )
    rows = [
        row
        for update, seconds in ((11, 3.0), (12, 0.5))
        for row in aggregator.add(stage_report(update, 0, 0, seconds=seconds))
    ]
    assert [(row["tflops_per_process"], row["mfu"]) for row in rows] == [(2.0, 0.25), (4.0, 0.5)]


def test_stages_without_a_head_or_a_norm_and_skipped_ones() -> None:
    aggregator = Aggregator([(0, 0, 0), (1, 1, 1)], data_replicas=2)
    for data_rank in range(2):
        aggregator.add(stage_report(1, 0, data_rank, loss_sum=None, label_tokens=0, grad_norm=None))
    aggregator.add(stage_report(1, 1, 0, loss_sum=math.nan, grad_norm=math.nan, skipped=True))
    (row,) = aggregator.add(stage_report(1, 1, 1, loss_sum=1.0, skipped=True))
    below, above = row["stages"]
    assert below["loss"] is None and below["grad_norm"] is None and not below["skipped"]
    assert math.isnan(above["loss"]) and math.isnan(above["grad_norm"]) and above["skipped"]
    assert row["tokens"] == 8


def test_evaluations_are_summed_and_follow_their_update() -> None:
    aggregator = Aggregator([(0, 0, 0), (1, 1, 1)], data_replicas=2, texts={"emma": TEXT})

    def evaluation(stage: int, data_rank: int, nll_sum: float | None, label_tokens: int) -> list[MetricsRow]:
        return aggregator.add(EvaluationReport(1, "emma", stage, data_rank, nll_sum, label_tokens))

    for data_rank in range(2):
        assert evaluation(0, data_rank, None, 0) == []
    assert evaluation(1, 1, 30.0, 10) == []
    assert evaluation(1, 0, 10.0, 90) == []  # complete, but the row of update 1 is not out yet
    for stage, data_rank in [(0, 0), (0, 1), (1, 0)]:
        assert aggregator.add(stage_report(1, stage, data_rank)) == []
    update, row = aggregator.add(stage_report(1, 1, 1))
    assert update["update"] == 1 and "stages" in update
    numbers = {
        "nll_per_token": 0.4,
        "perplexity": pytest.approx(math.exp(0.4)),
        "bits_per_byte": pytest.approx(0.1 / math.log(2)),
        "byte_perplexity": pytest.approx(math.exp(0.1)),
        "word_perplexity": pytest.approx(math.exp(0.5)),
        "tokens": 100,
    }
    assert row == {"update": 1, "evaluation": "emma", "exits": [{"stage": 1, "last_block": 1, **numbers}]}


def test_an_evaluation_before_the_first_update_comes_at_once() -> None:
    aggregator = Aggregator([(0, 0, 0)], data_replicas=1, texts={"emma": TEXT})
    (row,) = aggregator.add(EvaluationReport(0, "emma", 0, 0, 5.0, 5))
    assert row["update"] == 0 and row["exits"][0]["nll_per_token"] == 1.0


def test_reports_that_cannot_be_are_refused() -> None:
    aggregator = Aggregator([(0, 0, 0)], data_replicas=1)
    aggregator.add(stage_report(2, 0, 0))
    with pytest.raises(AssertionError, match="twice"):
        aggregator.add(stage_report(2, 0, 0))
    with pytest.raises(AssertionError, match="unknown stage"):
        aggregator.add(stage_report(1, 1, 0))
    aggregator.add(stage_report(1, 0, 0))
    with pytest.raises(AssertionError, match="already complete"):
        aggregator.add(stage_report(1, 0, 0))
    with pytest.raises(AssertionError, match="unknown set"):
        aggregator.add(EvaluationReport(1, "emma", 0, 0, 1.0, 1))


# --- files


def test_jsonl_is_strict_json_and_is_read_back(tmp_path: Path) -> None:
    rows = [
        update_row(1, [None, math.nan]),
        evaluation_row(1, name="NaN"),
        update_row(2, [-math.inf, 2.5]),
    ]
    writer = MetricsWriter(tmp_path / "run")
    for row in rows:
        writer.write(row)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()  # before close: written at once
    parsed = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [entry["loss"] for entry in parsed[0]["stages"]] == [None, "NaN"]
    assert parsed[1]["exits"][0]["perplexity"] == "Infinity" and parsed[2]["stages"][0]["loss"] == "-Infinity"
    assert str(read_metrics(tmp_path / "run")) == str(rows)  # as text, where nan equals nan
    writer.close()


def test_csv_has_a_row_per_update(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for row in (update_row(1, [None, 2.5]), evaluation_row(1), update_row(2, [math.inf, 0.1 + 0.2])):
        writer.write(row)
    writer.close()
    first, second = csv_rows(tmp_path)
    assert first["update"] == "1" and first["tokens"] == "8" and first["learning_rate"] == "0.001"
    assert first["loss_stage0"] == "" and first["loss_stage1"] == "2.5"
    assert first["skipped_stage0"] == "0" and first["skipped_stage1"] == "1" and first["last_block_stage1"] == "3"
    assert second["loss_stage0"] == "inf" and float(second["loss_stage1"]) == 0.1 + 0.2
    assert (tmp_path / "metrics.csv").read_text().count("\n") == 3


def test_resume_cuts_off_what_came_later(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for update in range(1, 6):
        writer.write(update_row(update))
        writer.write(evaluation_row(update))
    writer.close()

    writer = MetricsWriter(tmp_path, resume_at=3)
    assert [row["update"] for row in read_metrics(tmp_path)] == [1, 1, 2, 2, 3, 3]
    assert [row["update"] for row in csv_rows(tmp_path)] == ["1", "2", "3"]
    for update in (4, 5):
        writer.write(update_row(update, [9.0, 9.0]))
    writer.close()
    updates = [row for row in read_metrics(tmp_path) if "stages" in row]
    assert [row["update"] for row in updates] == [1, 2, 3, 4, 5]
    assert [row["stages"][0]["loss"] for row in updates] == [3.0, 3.0, 3.0, 9.0, 9.0]
    assert [row["loss_stage0"] for row in csv_rows(tmp_path)] == ["3.0", "3.0", "3.0", "9.0", "9.0"]
    assert sorted(path.name for path in tmp_path.glob("metrics*")) == ["metrics.csv", "metrics.jsonl"]


def test_resume_after_the_process_was_killed_in_the_middle_of_a_line(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(update_row(1))
    writer.write(update_row(2))
    writer.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    assert [row["update"] for row in read_metrics(tmp_path)] == [1]
    writer = MetricsWriter(tmp_path, resume_at=2)
    writer.write(update_row(3))
    writer.close()
    assert [row["update"] for row in read_metrics(tmp_path)] == [1, 3]
    assert [row["update"] for row in csv_rows(tmp_path)] == ["1", "3"]


def test_a_failed_cut_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(update_row(1))
    writer.write(update_row(2))
    writer.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_at=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_with_more_stages_keeps_the_rows_before(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(update_row(1, [3.0]))
    writer.close()
    writer = MetricsWriter(tmp_path, resume_at=1)
    writer.write(update_row(2, [2.0, 1.0]))
    writer.write(update_row(3, [2.5]))
    writer.close()
    assert [(row["loss_stage0"], row["loss_stage1"]) for row in csv_rows(tmp_path)] == [
        ("3.0", ""),
        ("2.0", "1.0"),
        ("2.5", ""),
    ]


def test_a_folder_that_holds_records_is_not_appended_to(tmp_path: Path) -> None:
    MetricsWriter(tmp_path).close()
    with pytest.raises(RunError, match=r"metrics\.jsonl already holds"):
        MetricsWriter(tmp_path)


def test_reading_what_is_missing_or_damaged(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        read_metrics(tmp_path / "nowhere")
    row = json.dumps(evaluation_row(1) | {"exits": []})
    for broken in ('{"upd', "[1]", '{"update": 2}'):
        (tmp_path / "metrics.jsonl").write_text(f"{row}\n{broken}\n{row}\n")
        with pytest.raises(RunError, match="line 2, is no row"):
            read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("lines", "kept", "lost"),
    [
        ("u1 broken u2 e2 u3", "u1 u2 e2", "cannot be read, the whole is in metrics.jsonl.broken"),
        ("u1 e2 cut", "u1 e2", "the rows of 1 of 2 updates are missing"),  # the last line, of a process that was killed
        ("broken", "", "the rows of 2 of 2 updates are missing; lines of it cannot be read"),
        ("", "", "the rows of 2 of 2 updates are missing"),
        ("u1 u2 e2 e2", "u1 u2 e2", ""),
        ("u1 u2 e2", "u1 u2 e2", ""),
    ],
)
def test_resume_keeps_what_can_be_read(tmp_path: Path, lines: str, kept: str, lost: str) -> None:
    """u: of an update, e: of an evaluation."""

    def row(word: str) -> MetricsRow:
        number = int(word[1:])
        return update_row(number) if word[0] == "u" else evaluation_row(number) | {"exits": []}

    as_text = {"broken": '{"update": 2\0\n', "cut": '{"update'}
    text = "".join(as_text.get(word) or json.dumps(row(word)) + "\n" for word in lines.split())
    (tmp_path / "metrics.jsonl").write_text(text)
    writer = MetricsWriter(tmp_path, resume_at=2)
    writer.close()
    assert writer.kept == read_metrics(tmp_path) == [row(word) for word in kept.split()]
    assert (lost in writer.lost) if lost else writer.lost == ""
    aside = tmp_path / "metrics.jsonl.broken"
    assert aside.exists() is ("broken" in lines) and (not aside.exists() or aside.read_text() == text)


def test_what_is_synced_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, synced = MetricsWriter(tmp_path), []
    writer.write(update_row(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
        writer.sync()
    assert synced == [str(tmp_path / "metrics.jsonl")]
    writer.close()


def test_reports_say_loss_and_perplexity_beside_their_parts() -> None:
    report = stage_report(1, 0, 0, loss_sum=30.0, label_tokens=10)
    assert (report.loss, report.perplexity) == (3.0, math.exp(3.0))
    assert stage_report(1, 0, 0, loss_sum=None).loss is None and stage_report(1, 0, 0, loss_sum=None).perplexity is None
    evaluation = EvaluationReport(1, "valid", 0, 0, nll_sum=20.0, label_tokens=10)
    assert (evaluation.loss, evaluation.perplexity) == (2.0, math.exp(2.0))
    nothing = EvaluationReport(1, "valid", 0, 0, nll_sum=None, label_tokens=0)
    assert nothing.loss is None and nothing.perplexity is None
    assert "loss" not in report.to_dict(), "the form on the wire stays"


# --- n-gram baselines


def brute_force_nll(train: list[int], valid: list[int], vocab: int, order: int, scored: list[int]) -> float:
    """The model token by token, from counters; `scored` are places in valid."""
    grams = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)}

    def p(token: int, context: tuple[int, ...]) -> float:
        if not context:
            return (grams[1][(token,)] + 1) / (len(train) + vocab)
        after = {gram[-1]: n for gram, n in grams[len(context) + 1].items() if gram[:-1] == context}
        shorter = p(token, context[1:])
        return (after.get(token, 0) + len(after) * shorter) / (sum(after.values()) + len(after)) if after else shorter

    contexts = [tuple(valid[max(0, i - order + 1) : i]) for i in range(len(valid))]
    for context in contexts:
        assert sum(p(token, context) for token in range(vocab)) == pytest.approx(1.0)
    return -sum(math.log(p(valid[place], contexts[place])) for place in scored) / len(scored)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_ngrams_equal_the_brute_force(order: int, chunk: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ngram, "_CHUNK", chunk)
    rng = np.random.default_rng(0)
    vocab = 12
    train = rng.integers(0, 9, 60) ** 2 % 11  # some tokens are never seen
    valid = rng.integers(0, vocab, 50)
    arguments = (train.astype(dtype), valid.astype(dtype), vocab, order)
    expected = brute_force_nll(train.tolist(), valid.tolist(), vocab, order, [*range(50)])
    assert nll(*arguments) == pytest.approx(expected, rel=1e-12)
    of_answers = brute_force_nll(train.tolist(), valid.tolist(), vocab, order, [*range(0, 50, 3)])
    assert nll(*arguments, np.arange(50) % 3 == 0) == pytest.approx(of_answers, rel=1e-12)


def test_ngrams_of_large_vocabularies_do_not_overflow() -> None:
    vocab = 256_000
    ids = np.array([255_999, 255_998] * 50, dtype=np.uint32)
    assert nll(ids, ids[:10], vocab, 3) < nll(ids, ids[:10], vocab, 2) < 2.0 < nll(ids, ids[:10], vocab, 1)


def test_ngrams_at_the_edges() -> None:
    for order in (1, 2, 3):
        assert nll([], [1, 2], 4, order) == pytest.approx(math.log(4))
        assert math.isnan(nll([1], [], 4, order))
        assert nll([3], [1, 2], 4, order) == pytest.approx(math.log(5))
        assert math.isfinite(nll([3, 2, 1], [1], 4, order))
        for ids in ([0, 4], [-1]):
            with pytest.raises(AssertionError, match="outside"):
                nll(ids, [1], 4, order)


def test_bigrams_use_the_order_of_the_tokens() -> None:
    rng = np.random.default_rng(1)
    steps = rng.choice([1, 2], size=20_000)
    chain = np.cumsum(steps) % 16  # two possible next tokens: log 2 nats; the tokens alone are uniform
    train, valid = chain[:15_000], chain[15_000:]
    assert nll(train, valid, 16, 1) == pytest.approx(math.log(16), abs=0.01)
    assert nll(train, valid, 16, 2) == pytest.approx(math.log(2), abs=0.02)
