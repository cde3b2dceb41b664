"""Records of runs, their comparison, Pareto fronts, tables in documents, plots: on runs whose losses are a formula."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from fake_runs import falling, make_run

from lptransformer import files
from lptransformer.__main__ import COMPARISON, parser
from lptransformer.errors import RunError, UserError
from lptransformer.study import collect, comparison, plots, records
from lptransformer.study.comparison import Point, choices, deciding_set, depth_gain_kept, difference, estimate, find
from lptransformer.study.markdown_tables import ResultTable, markdown, update
from lptransformer.study.report import report
from lptransformer.study.result_tables import Question, points, short, tables
from lptransformer.training.launcher import run

CHOOSE = {"set": "choose", "exit_block": None}


def build(folder: Path, *overrides: str, method: str | None = None, **options: Any) -> dict[str, Any]:
    made = make_run(folder, overrides, **options)
    identity = {"name": folder.name, "method": method, "score": CHOOSE} if method else None
    return collect.build(made, identity)


def record(
    method: str, learning_rate: float, loss: float, seed: int = 0, told: float | None = None, updates: int = 100
) -> dict[str, Any]:
    """A record with two evaluations, of which the first is 1 nat worse; on `report` the loss is `told`."""
    columns = ["update", "tokens", "seconds", "total_flops", "serial_flops", "pipeline_flops", 1, 3]

    def rows(end: float) -> list[list[float]]:
        half = updates // 2
        return [
            [u, 10 * u, 0.5 * u, 1e6 * u, 1e5 * u, 2e5 * u, end + 1 + d, end + d]
            for u, d in ((half, 1.0), (updates, 0.0))
        ]

    sets = {"choose": rows(loss), "report": rows(loss if told is None else told)}
    return {
        "format": records.FORMAT,
        "name": f"{method} {learning_rate:g} {seed}",
        "method": method,
        "score": CHOOSE,
        "updates": updates,
        "steps": 100,
        "seconds": 50.0,
        "tokens_per_second": 1000.0,
        "config": {"train": {"learning_rate": learning_rate, "seed": seed}},
        "texts": {"valid": dict.fromkeys(sets, {"tokens": 1000, "bytes": 2000, "words": 400})},
        "stages": _stages(),
        "evaluations": {name: {"columns": columns, "rows": of} for name, of in sets.items()},
        "training": {"columns": ["update", "seconds", 1, 3], "rows": [[50, 25.0, 3.0, 2.5], [100, 50.0, 2.5, 2.0]]},
    }


def _stages() -> list[dict[str, Any]]:
    sent = {"hidden_states_bytes": 2**20, "gradients_bytes": 0}
    return [
        {"stage": 0, "blocks": [0, 1], "idle_share": 0.0, "memory_bytes": 2**20, **sent},
        {"stage": 1, "blocks": [2, 3], "idle_share": 0.5, "memory_bytes": 2**21, **dict.fromkeys(sent, 0)},
    ]


# --- records


def test_a_record_says_what_the_run_was(tmp_path: Path) -> None:
    overrides = ["--objective.name=chunked", "--objective.chunks=2", "--train.micro_batch_size=3"]
    found = build(tmp_path / "run", *overrides, seconds=2.0)
    assert found["method"] == "chunked-2" and found["updates"] == found["steps"] == 40 and found["complete"]
    assert found["tokens_per_update"] == 3 * 2 * 256
    assert found["tokens_per_second"] == 510 and found["seconds"] == 80
    table = found["evaluations"]["report"]
    assert table["columns"] == ["update", "tokens", "seconds", "total_flops", "serial_flops", "pipeline_flops", 1, 3]
    last = table["rows"][-1]
    assert last[:3] == [40, 40800, 80.0]
    assert last[6:] == pytest.approx([falling(2.5)(40, 1), falling(2.5)(40, 3)], abs=1e-5)
    # 4 blocks and two heads; two micro-batches beside each other; serial is one chunk of 2 blocks and its head.
    block, head = found["flops"]["block"], found["flops"]["head"]
    assert block == 2 * found["model"]["block_parameters"] + 2 * 256 * 16 and head == 3 * 2 * 16 * 257
    assert last[3] == pytest.approx(40 * 2 * 3 * 256 * (12 * block + 2 * head), rel=1e-5)
    assert last[4] == pytest.approx(40 * 3 * 256 * (6 * block + head), rel=1e-5)
    # On four ranks each chunk is laid over two, which run 1F1B: three steps for two micro-batches.
    assert last[5] == pytest.approx(40 * 3 * 256 * (9 * block + 2 * head), rel=1e-5)
    sent = [(stage["hidden_states_bytes"], stage["gradients_bytes"]) for stage in found["stages"]]
    assert sent == [(3 * 2 * 256 * 16 * 4, 0), (0, 0)]
    assert [stage["memory_bytes"] for stage in found["stages"]] == [2**20, 2**21]
    assert found["texts"]["valid"]["choose"] == {"tokens": 1000, "bytes": 1000, "words": 200}


def test_gradients_that_cross_borders_are_counted_by_phase(tmp_path: Path) -> None:
    overlapping = ["--objective.name=overlapping", "--objective.chunks=4"]
    down = [stage["gradients_bytes"] for stage in build(tmp_path / "a", *overlapping)["stages"]]
    one = 2 * 2 * 256 * 16 * 4
    assert down == [0, one, one, one]
    hybrid = ["--objective.name=chunked", "--objective.chunks=2", "--objective.backprop_every=4"]
    down = [stage["gradients_bytes"] for stage in build(tmp_path / "b", *hybrid)["stages"]]
    assert down == [0, one // 4]


def test_a_record_is_small_whatever_the_run(tmp_path: Path) -> None:
    noise = random.Random(0)
    deep = ["--model.num_layers=16", "--objective.name=greedy", "--train.steps=1500"]
    found = build(tmp_path / "run", *deep, loss=lambda u, b: 3 + noise.random(), every=75)
    records.write(tmp_path / "r.json", found)
    assert (tmp_path / "r.json").stat().st_size < 20_000
    assert len(found["training"]["rows"]) <= 200 and len(found["evaluations"]["choose"]["rows"]) == 20


def test_the_training_curve_is_means_of_neighbours(tmp_path: Path) -> None:
    found = build(tmp_path / "run", "--objective.name=backprop", "--train.steps=400", loss=lambda u, b: float(u % 2))
    rows = found["training"]["rows"]
    assert len(rows) == 200 and rows[0] == [2, 1.0, 0.5] and rows[-1] == [400, 200.0, 0.5]


def test_records_come_back_as_they_were_and_say_nothing_of_the_machine(tmp_path: Path) -> None:
    overrides = [f"--data.train={tmp_path}/secret.txt", f"--data.cache={tmp_path}/cache"]
    diverged = build(tmp_path / "run", *overrides, loss=lambda u, b: math.nan if u > 20 else 3.0)
    path = tmp_path / "record.json"
    records.write(path, diverged)
    first = path.read_bytes()
    (again,) = records.read(path)
    assert math.isnan(again["evaluations"]["choose"]["rows"][-1][-1])
    records.write(path, again)
    assert path.read_bytes() == first
    assert str(tmp_path) not in first.decode().replace(str(tmp_path / "run"), "")  # the name of a run that has no other
    records.write(path, [diverged, diverged])
    assert len(records.read(path)) == 2 and json.loads(path.read_text())[1]["updates"] == 40


def test_a_record_of_before_is_of_the_same_setting(tmp_path: Path) -> None:
    new = build(tmp_path / "run", "--objective.name=backprop")
    assert new["config"]["border"] == {"codec": "none"}
    old = json.loads(json.dumps(new))
    old["format"] = min(records.READABLE)
    del old["config"]["border"]  # chunks alone had the key, below `train`
    old["config"]["head"]["chunk_tokens"] = old["config"].pop("loss")["chunk_tokens"]
    path = tmp_path / "old.json"
    records.write(path, old)
    assert new["config"]["loss"].pop("fused") == "auto"  # which did not exist
    assert records.read(path)[0]["config"] == new["config"]


def test_a_run_keeps_the_name_that_a_sweep_gave_it(tmp_path: Path) -> None:
    made = make_run(tmp_path / "run")
    identity = {"name": "mine/lr=1", "method": "mine", "score": CHOOSE}
    records.write(made / "record.json", collect.build(made, identity))
    (found,) = collect.collect(made)
    assert {key: found[key] for key in identity} == identity


def test_what_can_be_collected(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / "sweep" / name)
    assert len(collect.collect(tmp_path / "sweep")) == 2
    records.write(tmp_path / "sweep" / "records.json", collect.collect(tmp_path / "sweep" / "a"))
    assert len(collect.collect(tmp_path / "sweep")) == 1, "a sweep's own records count"
    assert len(collect.collect(tmp_path / "sweep" / "records.json")) == 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"format": 0}')
    (tmp_path / "broken.json").write_text(json.dumps({"format": records.FORMAT, "training": 3}))
    for path, word in (
        ("empty", "neither"),
        ("other.json", f"format {records.FORMAT}"),
        ("broken.json", "incomplete"),
        ("no", "neither"),
    ):
        with pytest.raises(RunError, match=word):
            collect.collect(tmp_path / path)


def test_an_idle_share_that_was_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path / "run", ["--objective.name=backprop"], idle=math.nan)
    report(made)
    assert re.search(r"0 \(blocks 0-3\) +- +1 MiB", capsys.readouterr().out)
    path = made / "record.json"
    text = path.read_bytes()
    assert json.loads(text)["stages"][0]["idle_share"] is None
    (found,) = records.read(path)
    assert math.isnan(found["stages"][0]["idle_share"]) and found["stages"][0]["memory_bytes"] == 2**20
    assert by_name(tables([found], Question()))["cost"].rows[0][3] == "-"
    records.write(path, found)
    assert path.read_bytes() == text


@pytest.mark.parametrize("before", ["backprop", "chunked"])
def test_a_run_that_was_resumed_with_other_exits(before: str, tmp_path: Path) -> None:
    """Exits are known by their block, not by the number of their stage; those of the newest rows count."""
    overrides = {"backprop": ["--objective.name=backprop"], "chunked": ["--objective.name=chunked"]}
    overrides["chunked"].append("--objective.chunks=2")
    (after,) = overrides.keys() - {before}
    old = make_run(tmp_path / "old", overrides[before], updates=20)
    new = make_run(tmp_path / "new", overrides[after])
    rows = [json.loads(line) for line in (new / "metrics.jsonl").read_text().splitlines()]
    later = [json.dumps(row) + "\n" for row in rows if row["update"] > 20]
    (new / "metrics.jsonl").write_text((old / "metrics.jsonl").read_text() + "".join(later))
    starts = [{}, {"resumed_after": 20, "changed": {"objective.name": [before, after]}}]
    (new / "environment.json").write_text(json.dumps(starts))
    report(new)
    (found,) = records.read(new / "record.json")
    blocks, table = [3] if after == "backprop" else [1, 3], found["evaluations"]["choose"]
    assert table["columns"][6:] == found["training"]["columns"][2:] == blocks
    for start, of in ((6, table), (2, found["training"])):
        for row in of["rows"]:
            there = [falling(1.5)(row[0], block) if row[0] > 20 or block == 3 else math.nan for block in blocks]
            assert row[start:] == pytest.approx(there, abs=1e-4, nan_ok=True)
    assert all(math.isnan(cost) for row in table["rows"] for cost in row[3:6]), "of which objective is not known"
    assert [stage["blocks"] for stage in found["stages"]] == ([[0, 3]] if after == "backprop" else [[0, 1], [2, 3]])
    compared = by_name(tables([found, record("other", 0.1, 1.0)], Question()))
    assert [row[0] for row in compared["equal-cost-choose"].rows] == ["other"]
    assert compared["cost"].rows[0][4:6] == ("-", "-") and compared["quality-choose"].rows[0][4] == "1.5202"


# --- comparison


def test_the_setting_is_chosen_on_one_set_and_told_on_the_other() -> None:
    runs = [record("a", 0.1, loss=2.0, told=9.0), record("a", 0.2, loss=1.9, told=9.5)]
    (choice,) = choices(runs)
    assert choice.setting == "0.2 (highest tried)" and choice.estimate("report").mean == 9.5
    (other,) = choices(runs, choose="report")
    assert other.setting == "0.1 (lowest tried)"


def test_the_sweep_says_which_set_decides() -> None:
    runs = [record("a", 0.1, loss=2.0, told=1.0), record("a", 0.2, loss=1.0, told=2.0)]
    for one in runs:
        one["score"] = {"set": "report", "exit_block": 1}
    assert deciding_set(runs) == ("report", 1)
    assert choices(runs)[0].setting.startswith("0.1")
    assert deciding_set(runs, choose="choose") == ("choose", None)


def test_an_optimum_inside_the_grid_is_not_marked() -> None:
    (choice,) = choices([record("a", rate, loss) for rate, loss in ((0.1, 2.0), (0.2, 1.9), (0.4, 2.1))])
    assert choice.setting == "0.2"


def test_seeds_are_one_setting_and_its_mean_decides() -> None:
    lucky = [record("a", 0.1, loss, seed) for seed, loss in enumerate((1.0, 3.0, 3.0))]
    steady = [record("a", 0.2, loss, seed) for seed, loss in enumerate((2.0, 2.1, 2.2))]
    (choice,) = choices([*lucky, *steady])
    assert choice.setting.startswith("0.2") and sorted(choice.runs) == [0, 1, 2]
    assert choice.estimate("choose").mean == pytest.approx(2.1)
    assert choice.estimate("choose").error == pytest.approx(0.1 / math.sqrt(3))


def with_key(key: str, *values: Any) -> list[dict[str, Any]]:
    """Runs of one method, in each of which a key has another value, a seed and a loss each."""
    runs = [record("a", 0.1, 2.0 + seed, seed) for seed in range(len(values))]
    section, _, name = key.partition(".")
    for one, value in zip(runs, values, strict=True):
        one["config"].setdefault(section, {})[name] = value
    return runs


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.eval_every", (0, 500)),
        ("checkpoint.keep_last", (None, 2)),
        ("run.trackers", ([], ["tensorboard"])),
        ("parallel.timeout_seconds", (1800, 60)),
        ("train.max_skipped_updates", (10, 100)),
    ],
)
def test_what_changes_no_weight_makes_no_other_setting(key: str, values: tuple[Any, Any]) -> None:
    (choice,) = choices(with_key(key, *values))
    assert sorted(choice.runs) == [0, 1] and choice.setting == "0.1"
    assert choice.estimate("report").mean == 2.5


@pytest.mark.parametrize("key", ["data.bos", "train.steps", "train.patience", "parallel.in_flight"])
def test_what_decides_from_the_start_makes_another_setting(key: str) -> None:
    (choice,) = choices(with_key(key, 1, 2))
    assert sorted(choice.runs) == [0] and choice.setting == f"0.1, {key.partition('.')[2]} 1 (lowest tried)"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out=.*file: no folder can be made there"):
        files.make_folder(tmp_path / "file", "--out")


def test_runs_that_were_stopped_early_do_not_compete() -> None:
    (choice,) = choices([record("a", 0.1, loss=1.0, updates=50), record("a", 0.2, loss=2.0)])
    assert choice.setting.startswith("0.2")


def test_a_seed_that_was_stopped_early_counts_as_one_that_diverged() -> None:
    base = [record("b", 0.1, 1.0, seed) for seed in range(3)]
    seeds = [record("a", 0.1, 2.0, seed, updates=100 if seed != 1 else 30) for seed in range(3)]
    a, b = choices([*seeds, *base])
    assert sorted(a.runs) == [0, 1, 2] and math.isnan(a.estimate("report").mean)
    assert math.isnan(difference(a, b, "report").mean) and math.isnan(depth_gain_kept(a, b, a, "report").mean)
    quality = by_name(tables([*seeds, *base], Question("b")))["quality-report"]
    assert quality.rows[0] == ("a", "0.1", "3", *"-----", "-")
    worse = [record("a", 0.2, 3.0, seed) for seed in range(3)]
    (choice,) = choices([*seeds, *worse])
    assert choice.setting == "0.2 (highest tried)" and choice.estimate("report").mean == 3.0
    short = [record("a", 0.3, 1.0, seed, updates=30) for seed in range(3)]
    assert choices([*short, *seeds])[0].setting.startswith("0.1"), "the furthest is shown where none is whole"
    for one in seeds:
        one["config"]["train"]["patience"] = 3
    assert choices(seeds)[0].estimate("report").mean == 2.0, "it decides when training ends"


def test_a_diverged_setting_is_never_the_best() -> None:
    (choice,) = choices([record("a", 0.1, loss=math.nan), record("a", 0.2, loss=2.0)])
    assert choice.setting.startswith("0.2")


def test_differences_are_paired_by_seed() -> None:
    base = [record("b", 0.1, loss, seed) for seed, loss in enumerate((1.0, 2.0, 3.0))]
    other = [record("a", 0.1, loss, seed) for seed, loss in ((2, 3.3), (1, 2.2), (7, 9.0))]
    a, b = choices([*other, *base])
    found = difference(a, b, "choose")
    assert found.mean == pytest.approx(0.25) and found.error == pytest.approx(0.05)  # of 0.2 and 0.3
    assert math.isnan(difference(choices([record("a", 0.1, 1.0, seed=9)])[0], b, "choose").mean)


def test_the_share_of_the_depth_gain() -> None:
    def of(method: str, losses: tuple[float, ...]) -> list[dict[str, Any]]:
        return [record(method, 0.1, loss, seed) for seed, loss in enumerate(losses)]

    deep, shallow, a = choices([*of("deep", (1.0, 1.1)), *of("shallow", (2.0, 2.1)), *of("a", (1.1, 1.4))])
    kept = depth_gain_kept(a, deep, shallow, "choose")
    assert kept.mean == pytest.approx(0.8)
    assert kept.error == pytest.approx(0.1)  # of 0.9 and 0.7: the jackknife of two is half their distance
    assert depth_gain_kept(deep, deep, shallow, "choose").mean == 1.0


def test_an_estimate_of_one_value_has_no_error() -> None:
    assert estimate([1.5]).text() == "1.500"
    assert estimate([1.0, 2.0]).text(2) == "1.50 ± 0.50"
    assert estimate([1.0, math.nan]).text() == "-" and estimate([]).text() == "-"


def test_what_no_run_has_is_refused_with_what_there_is() -> None:
    found = choices([record("a", 0.1, 1.0)])
    with pytest.raises(RunError, match=r"--deep full: no run has this method; there are a"):
        find(found, "full", "--deep")
    with pytest.raises(RunError, match=r"no evaluation on emma; there are those on: choose, report"):
        choices([record("a", 0.1, 1.0)], choose="emma")


# --- fronts


def test_a_front_holds_what_nothing_beats() -> None:
    noise = random.Random(1)
    cloud = [Point(noise.random(), loss := noise.random(), loss) for _ in range(200)] + [Point(0.5, math.nan, 0.0)]
    front = comparison.front(cloud)
    assert [p.cost for p in front] == sorted(p.cost for p in front)
    assert [p.loss for p in front] == sorted((p.loss for p in front), reverse=True)
    for point in cloud[:-1]:
        beaten = any(p.cost <= point.cost and p.loss <= point.loss for p in front)
        assert beaten, point
    for point in front:
        assert not any(p.cost <= point.cost and p.loss < point.loss for p in cloud)


def test_of_points_with_the_same_cost_or_loss_the_better_one_stays() -> None:
    best = Point(1, 1.0, 0.5)
    assert comparison.front([Point(1, 2.0, 0.1), Point(2, 1.0, 0.2), best, Point(1, 3.0, 0.3)]) == [best]


def test_reading_a_front() -> None:
    front = comparison.front([Point(1, 3.0, 0.1), Point(2, 2.0, 0.2), Point(2, 2.5, 0.3), Point(4, 2.2, 0.4)])
    assert comparison.within(front, 3) == Point(2, 2.0, 0.2) and comparison.within(front, 0.5) is None
    assert comparison.reaching(front, 2.5) == Point(2, 2.0, 0.2) and comparison.reaching(front, 1.0) is None


def test_every_evaluation_of_every_run_is_a_point() -> None:
    runs = [record("a", 0.1, 2.0, told=5.0), record("a", 0.2, 1.0, told=6.0), record("b", 0.1, 3.0)]
    found = points(runs, "report", "seconds", decides="choose")
    assert found["a"] == [Point(25, 3.0, 6.0), Point(50, 2.0, 5.0), Point(25, 2.0, 7.0), Point(50, 1.0, 6.0)]
    assert len(found["b"]) == 2


# --- tables


def by_name(found: list[ResultTable]) -> dict[str, ResultTable]:
    return {table.name: table for table in found}


def test_the_tables_of_a_comparison() -> None:
    runs = [record("backprop", 0.1, 1.0, told=1.5), record("few", 0.1, 2.0, told=2.5)]
    runs += [record("local", 0.1, 1.2, told=1.7), record("local", 0.2, 1.1, told=1.6)]
    found = by_name(tables(runs, Question("backprop", "backprop", "few")))
    quality = found["quality-report"]
    (local,) = [dict(zip(quality.columns, row, strict=True)) for row in quality.rows if row[0] == "local"]
    assert local["learning rate"] == "0.2 (highest tried)" and local["nats/token"] == "1.6000"
    assert local["perplexity"] == f"{math.exp(1.6):.3f}" and local["tokens"] == "1000"
    assert local["bits/byte"] == f"{1.6 / math.log(2) / 2:.4f}"
    assert local["word perplexity"] == f"{math.exp(1.6 * 2.5):.1f}"
    assert local["perplexity to backprop"] == f"+{100 * (math.exp(0.1) - 1):.2f} %"
    assert local["depth gain kept"] == "90 %"
    assert found["exits-choose"].columns == ("method", "after block 1", "after block 3")
    assert found["exits-choose"].rows[0] == ("backprop", "2.000", "1.000")
    at_cost = dict((row[0], row[1:]) for row in found["equal-cost-report"].rows)
    assert at_cost["local"] == (f"1.6000 ({math.exp(1.6):.2f})",) * 4
    to_loss = dict((row[0], row[1:]) for row in found["equal-loss-choose"].rows)
    # The worst method's best loss is 2.0: backprop has it halfway, at update 50.
    assert to_loss == {
        "backprop": ("50M", "5M", "10M", "25"),
        "few": ("100M", "10M", "20M", "50"),
        "local": ("100M", "10M", "20M", "50"),
    }
    assert found["cost"].rows[0][:4] == ("backprop", "1,000", "2 MiB", "50%")
    assert len(found["runs"].rows) == 4


def test_equal_cost_is_what_the_baseline_spent() -> None:
    runs = [record("backprop", 0.1, 1.0), record("long", 0.1, 0.5, updates=200), record("short", 0.1, 2.0, updates=50)]
    found = by_name(tables(runs, Question("backprop")))["equal-cost-choose"]
    assert found.columns[4] == "50 seconds"
    assert [row[4] for row in found.rows] == ["1.0000 (2.72)", "1.5000 (4.48)", "2.0000 (7.39) (less spent)"]
    found = by_name(tables(runs, Question()))["equal-cost-choose"]
    assert found.columns[4] == "25 seconds" and [row[4][:6] for row in found.rows] == ["2.0000", "-", "2.0000"]


def test_numbers_with_units() -> None:
    assert [short(x) for x in (0.5, 999, 4096, 12345, 2.5e6, 3.14e15)] == [
        "0.5",
        "999",
        "4096",
        "12.3k",
        "2.5M",
        "3.14P",
    ]


DOCUMENT = "# Title\n\n<!-- table:one -->\nold\n<!-- end -->\nprose\n\n<!-- table:x/one -->\nolder\n<!-- end -->\n"
ONE = ResultTable("one", "A title", ("name", "value"), (("a|b", "1"), ("c", None)))


def test_a_document_s_tables_are_rewritten_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "doc.md"
    path.write_text(DOCUMENT)
    assert update(path, [ONE]) == ["one"]
    text = path.read_text()
    assert text == DOCUMENT.replace("old\n<!-- end -->\nprose", f"{markdown(ONE)}<!-- end -->\nprose")
    assert "| name | value |\n| --- | ---: |\n| a\\|b | 1 |\n| c | - |\n" in text
    assert update(path, [ONE]) == ["one"] and path.read_text() == text, "a second time changes nothing"
    assert update(path, [ONE], prefix="x") == ["x/one"]
    assert "old" not in path.read_text()


def test_a_document_that_is_not_there_is_made_with_all_tables(tmp_path: Path) -> None:
    update(tmp_path / "doc.md", [ONE, ResultTable("two", "", ("a",), ())])
    assert update(tmp_path / "doc.md", [ONE, ResultTable("two", "", ("a",), ())]) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("nothing", "no table of this report"),
        ("<!-- table:won -->\n<!-- end -->\n", "'won'"),
        ("<!-- table:one -->\nnever ends\n", "needs an <!-- end -->"),
        ("<!-- table:one -->\n<!-- table:two -->\n<!-- end -->\n", "needs an <!-- end -->"),
    ],
)
def test_a_document_that_cannot_be_meant(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "doc.md"
    path.write_text(text)
    with pytest.raises(RunError, match=word):
        update(path, [ONE])
    assert path.read_text() == text


# --- plots and the command line


def test_every_method_has_a_look_of_its_own() -> None:
    found = plots.looks([*(f"m{i}" for i in range(20)), "m0"])
    assert len(found) == 20 and len({tuple(look.values()) for look in found.values()}) == 20


def test_runs_that_are_not_evaluated_yet_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fresh = {**record("local", 0.2, 1.0), "evaluations": {}}
    records.write(Path("r.json"), [record("local", 0.1, 1.2), fresh])
    run(parser(), ["report", "r.json"])
    assert "not been evaluated yet: local 0.2 0" in capsys.readouterr().out
    records.write(Path("r.json"), [fresh])
    with pytest.raises(SystemExit):
        run(parser(), ["report", "r.json"])
    assert "train.eval_every" in capsys.readouterr().err


@pytest.mark.slow  # draws every picture
def test_reports_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    records.write(Path("r.json"), [record("backprop", 0.1, 1.0), record("local", 0.1, 1.2), record("few", 0.1, 2.0)])
    arguments = ["report", "r.json", "--deep=backprop", "--shallow=few", "--markdown=doc.md", "--name=here"]
    run(parser(), arguments)
    out = capsys.readouterr().out
    assert "depth gain kept" in out and "80 %" in out and "perplexity to backprop" in out
    assert "<!-- table:here/quality-choose -->" in Path("doc.md").read_text()
    run(parser(), ["report", "r.json", "--out=new/folder", "--markdown=new/folder/tables.md"])
    assert "<!-- table:quality-choose -->" in Path("new/folder/tables.md").read_text()
    stems = {f"{stem}-{name}" for stem in ("losses", "cost", "curves") for name in ("choose", "report")}
    drawn = {path.name for path in Path("report").iterdir()}
    assert drawn == {f"{stem}.png" for stem in stems} and "svg" not in out
    before = {path: path.read_bytes() for path in Path("report").iterdir()}
    run(parser(), ["report", "r.json", "--svg"])
    assert "plots (and .svg): report/losses-choose.png" in capsys.readouterr().out
    assert {path.name for path in Path("report").iterdir()} == drawn | {f"{stem}.svg" for stem in stems}
    svg = Path("report/losses-choose.svg").read_text()
    assert all(f"<!-- {text}" in svg for text in ("backprop", "local", "few", "loss on choose minus that of backprop"))
    assert "<!-- serial FLOPs" in Path("report/cost-choose.svg").read_text()
    assert {path: path.read_bytes() for path in before} == before, "the same records give the same bytes"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["r.json", "--deep=backprop"], "--shallow"),
        (["r.json", "--deep=full", "--shallow=few"], "full"),
        (["r.json", "--baseline=full"], "there are backprop"),
        (["r.json", "--choose=emma"], "emma"),
        (["r.json", "--baselines"], "one run"),
        (["r.json", "--name=x"], "--name=x belongs to --markdown"),
        (["r.json", "--markdown=no/folder.md"], "--markdown=no/folder.md"),
        (["r.json", "--markdown="], "--markdown=."),
        *((["run", f"--{name}=x"], f"run with --{name}") for name in (*COMPARISON, "out")),
        (["nowhere", "--name=x"], "nowhere"),
        (["nowhere", "r.json"], "nowhere"),
        (["nowhere"], "nowhere"),
    ],
)
def test_reports_that_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    word: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    records.write(Path("r.json"), [record("backprop", 0.1, 1.0)])
    if arguments[0] == "run":
        make_run(Path("run"))
    with pytest.raises(SystemExit) as end:
        run(parser(), ["report", *arguments])
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2 and word in message and "\n" not in message
    assert not Path("report").exists()


def test_the_report_of_one_run_writes_its_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_run(tmp_path / "run")
    run(parser(), ["report", str(made)])
    assert "exit after block 3" in capsys.readouterr().out
    assert records.read(made / "record.json")[0]["updates"] == 40 and (made / "loss.png").exists()
    assert not (made / "loss.svg").exists()
    run(parser(), ["report", "--svg", str(made)])
    assert "<svg" in (made / "loss.svg").read_text()
