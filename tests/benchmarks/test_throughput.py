"""benchmarks/throughput.py: its numbers from given clocks, its emulated stages, and that every command runs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from contenders import emulated  # noqa: E402
from contenders.face import Sleeper, Spec, Work  # noqa: E402
from side_by_side import cases, ideal, ratios, rounds, splits, tables  # noqa: E402

from lptransformer.methods import objectives  # noqa: E402
from lptransformer.methods.cost import ModelCosts  # noqa: E402
from lptransformer.methods.stages import StagePlan, cut  # noqa: E402
from lptransformer.models.head import LossBatch  # noqa: E402
from lptransformer.planning.simulate import StageSeconds, simulate  # noqa: E402

# ---------------------------------------------------------------------------------------------- numbers


def test_the_slowest_process_counts_without_the_updates_at_both_ends() -> None:
    ahead = [0.0, 1.0, 2.0, 3.0, 9.0]
    behind = [0.0, 5.0, 7.0, 9.0, 10.0]
    assert ratios.steady_seconds([ahead, behind], lead=1, updates=2) == 2.0
    assert ratios.whole_seconds([ahead, behind]) == 10.0


def test_a_share_is_that_of_the_counted_time_or_unknown() -> None:
    assert ratios.share([0.0, 4.0, 5.0], [0.0, 10.0, 12.0], lead=1, updates=1) == 0.5
    assert ratios.share([None, None, None], [0.0, 10.0, 12.0], lead=1, updates=1) is None


def test_ratios_are_taken_repetition_by_repetition() -> None:
    """A repetition in which everything is slow must not count: the ratio of the medians would be 1.5."""
    other, own = [2.0, 30.0, 3.0], [1.0, 15.0, 2.0]
    assert ratios.speedups(other, own) == [2.0, 2.0, 1.5]
    assert ratios.summary(ratios.speedups(other, own))["median"] == 2.0


def test_a_summary_of_one_value_has_no_spread() -> None:
    assert set(ratios.summary([3.0]).values()) == {3.0}


def test_medians_are_by_stage_and_number() -> None:
    measured = [{("ours", 0): {"forward": x, "update": 10 * x}} for x in (1.0, 5.0, 2.0)]
    assert ratios.medians(measured) == {("ours", 0): {"forward": 2.0, "update": 20.0}}


def test_ours_leaves_out_as_many_updates_as_one_rank_can_be_ahead() -> None:
    def work(micro_batches: int) -> Work:
        return Work({}, 1, 2, micro_batches)

    local, other = Spec("a", "local"), Spec("b", "torch_pipelining")
    paces = [rounds.pace(local, work(m), 8) for m in (1, 2, 4, 8)]
    assert [(p.lead, p.counted, p.tail) for p in paces] == [(3, 8, 3), (2, 4, 2), (1, 2, 1), (1, 1, 1)]
    assert rounds.pace(other, work(2), 8).updates == 5


# ---------------------------------------------------------------------------------------------- ideal


def test_work_beside_others_counts_from_nothing_in_a_bubble_to_all_without() -> None:
    """One micro-batch of backprop on two equal ranks never computes on both; chunked always does, and 1F1B with two
    micro-batches shares two of three."""

    def shares(name: str, micro_batches: int, **chunks: int) -> list[float]:
        objective = objectives.build(2, name, **chunks)
        stages = cut(objective, 2, ModelCosts(1.0, 0.0, 0.0))
        seconds = [StageSeconds(1.0, 1.0)] * 2
        timeline = simulate(objective, stages, seconds, micro_batches=micro_batches, updates=8)
        return ideal.shared_work(timeline, 2)

    assert shares("backprop", 1) == pytest.approx([0.0, 0.0])
    assert shares("backprop", 2) == pytest.approx([0.5, 0.5])
    assert shares("chunked", 2, chunks=2) == pytest.approx([1.0, 1.0], abs=0.1)


def test_a_stage_beside_others_for_half_of_its_work_takes_the_mean() -> None:
    mixed = ideal.mixed(StageSeconds(1.0, 2.0, 0.0, 4.0), StageSeconds(2.0, 4.0, 0.0, 4.0), 0.5)
    assert mixed == StageSeconds(1.5, 3.0, 0.0, 4.0)


# ---------------------------------------------------------------------------------------------- splits


def test_promising_splits_give_the_rank_with_the_head_fewer_blocks() -> None:
    assert splits.candidates(16, [0, 1], [0.0, 3.0], 1)[0] in [(9, 7), (10, 6)]
    # In a V rank 0 holds the first and the last stage, so the second stage takes what the head costs.
    first = splits.candidates(16, [0, 1, 1, 0], [0.0, 0.0, 0.0, 2.0], 1)[0]
    assert first[0] + first[3] == 7 and first[1] + first[2] == 9


def test_the_equal_split_is_always_looked_at() -> None:
    found = splits.candidates(16, [0, 1], [0.0, 8.0], 2)
    assert found == [(12, 4), (11, 5), (8, 8)] or found == [(12, 4), (13, 3), (8, 8)]
    assert splits.equal(10, 4) == (3, 3, 2, 2)


def test_the_fastest_split_is_that_with_the_least_median() -> None:
    assert splits.fastest({(8, 8): [1.0, 9.0, 9.0], (9, 7): [5.0, 6.0, 50.0]}) == (9, 7)


def test_the_split_of_a_contender_is_measured_at_the_nearest_number_or_reckoned(tmp_path: Path) -> None:
    path = tmp_path / "splits.yaml"
    assert splits.read(path) == {} and splits.read_measured(path) == {}
    splits.write(path, {"peer": {8: (9, 7), 2: (8, 8)}}, {"peer": {8: {"[9, 7]": 1.0}}})
    found = splits.read(path)
    assert [splits.best(found, "peer", m, (1, 1)) for m in (1, 2, 8, 16)] == [(8, 8), (8, 8), (9, 7), (9, 7)]
    assert splits.best(found, "another", 2, (1, 1)) == (1, 1)
    assert splits.read_measured(path) == {"peer": {8: {"[9, 7]": 1.0}}}


@pytest.mark.parametrize("setting", ["real", "emulated", "links", "emulated_links"])
def test_every_contender_of_the_committed_configuration_has_a_split_that_fits(setting: str) -> None:
    one = cases.section(setting, smoke=False)
    ranks = [case[0] for case in one.get("cases", [])] or [one["ranks"]]
    for size in one.get("sizes", {"": {}}).values():
        for number in ranks:
            work = cases.work_of({**one, **size}, number, 4)
            for spec in cases.specs(one["contenders"], work):
                config = spec.config_of(work, f"parallel.pipeline={len(spec.partition or [1])}")
                cut = (
                    config.value("objective.chunks")
                    if spec.kind == "local"
                    else spec.partition or [cases.blocks_of(work)]
                )
                assert not isinstance(cut, int) and sum(cut) == cases.blocks_of(work), spec


def test_the_real_setting_has_the_ratio_of_body_and_head_that_it_is_to_have() -> None:
    one = cases.section("real", smoke=False)
    assert cases.head_ratio(cases.work_of(one, one["ranks"], 1)) == pytest.approx(6, abs=0.1)


def test_the_document_has_a_place_for_every_emulated_case() -> None:
    text = (ROOT / "docs" / "benchmarks" / "performance.md").read_text()
    wanted = [f"emulated/{ranks}-ranks-m-{m}" for ranks, m in cases.section("emulated", smoke=False)["cases"]]
    assert re.findall(r"table:(emulated/\d\S+)", text) == wanted


# ---------------------------------------------------------------------------------------------- emulated stages


def plan(**more: Any) -> StagePlan:
    shape = {"index": 1, "first_block": 2, "last_block": 3, "pipeline_rank": 1, "trained": True}
    return StagePlan(**{**shape, "has_head": True, "is_first": False, "is_last": False, **more})


def test_an_emulated_stage_sleeps_for_each_part_of_its_work(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(emulated.SleepingBody, "_sleep", lambda self, seconds: asked.append(seconds))
    stage = emulated.sleeping_stage(plan(), 4, Sleeper(), 0.5)  # two blocks
    inputs = torch.ones(1, 3, 4, requires_grad=True)
    labels = torch.zeros(1, 3, dtype=torch.int64)

    def slept() -> float:
        seconds = sum(asked)
        asked.clear()
        return seconds

    _, _, gradient, pull = stage(inputs, LossBatch(labels, 1.0), True)
    assert slept() == 1, "forward"
    pull(gradient)
    assert slept() == 1, "the gradient at the input alone"
    output = stage(inputs, LossBatch(labels, 1.0))
    hidden, loss = output.hidden_states, output.loss
    slept()
    loss.backward()
    assert slept() == 2, "both gradients"
    hidden, *_ = stage(inputs.detach(), LossBatch(labels, 1.0))
    slept()
    hidden.sum().backward()
    assert slept() == 2, "where nothing goes on below, the blocks need both all the same"


def test_what_was_slept_is_counted_as_it_was() -> None:
    sleeper = Sleeper()
    emulated.sleeping_stage(plan(), 4, sleeper, 0.01).hidden_states(torch.ones(1, 3, 4))
    assert sleeper.slept_seconds >= 0.02


# ---------------------------------------------------------------------------------------------- the commands


def throughput(*arguments: str, expect: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.timing
def test_real_measures_everybody_at_the_same_sums(tmp_path: Path) -> None:
    out = tmp_path / "real.json"
    throughput("real", "--smoke", "--out", str(out))
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    results = case["contenders"]
    errors = {name: result["error"] for name, result in results.items() if "error" in result}
    assert list(errors) == ["torch DualPipeV, best split"], errors
    assert "DualPipeV requires" in errors["torch DualPipeV, best split"]
    ran = {name: result for name, result in results.items() if "error" not in result}
    assert all(len(result["seconds"]) == 2 and min(result["seconds"]) > 0 for result in ran.values())
    # Peers with as many updates behind them: the same model on the same data.
    losses = {name: result["loss"] for name, result in ran.items() if not name.startswith("ours")}
    assert len(losses) == 8
    assert list(losses.values()) == pytest.approx([losses["one process, one thread"]] * 8, rel=1e-5)
    for other in found["against"]:
        assert set(case["speedups"][other]) == set(ran) and case["ideal"][other]["plain"] > 0
    assert {one["contender"] for one in case["stages"]} == set(case["ideal"])
    document = tmp_path / "performance.md"
    shutil.copy(ROOT / "docs" / "benchmarks" / "performance.md", document)
    throughput("tables", str(out), "--markdown", str(document))
    written = tables.write(found, document)
    of_simulator = tmp_path / "simulator.md"
    shutil.copy(ROOT / "docs" / "benchmarks" / "simulator.md", of_simulator)
    written += tables.write(found, of_simulator)
    assert len(written) == len(tables.tables(found)), "the two documents have a place for every table"


@pytest.mark.slow
@pytest.mark.timing
def test_emulated_measures_schedules_and_says_that_it_is_an_emulation(tmp_path: Path) -> None:
    out = tmp_path / "emulated.json"
    shown = throughput("emulated", "--smoke", "--out", str(out)).stdout
    found = json.loads(out.read_text())
    (case,) = found["cases"]
    results = case["contenders"]
    assert {"ours, chunked", "DeepSpeed pipeline", "torch ZBV zero bubble"} <= {
        name for name, result in results.items() if "error" not in result
    }
    ours, pipeline = results["ours, chunked"], results["DeepSpeed pipeline"]
    # Three stage times in 1F1B for two in ours, whatever else the machine does.
    assert ours["median"] < pipeline["median"]
    assert ours["asleep_share"][0] > pipeline["asleep_share"][0]
    assert "emulated" in found["label"] and "Emulated" in shown and "contender (emulated)" in shown


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("setting", ["links", "emulated_links"])
def test_links_are_measured_or_said_not_to_be_and_nothing_is_left(setting: str, tmp_path: Path) -> None:
    out = tmp_path / "links.json"
    shown = throughput(setting, "--smoke", "--out", str(out)).stdout
    found = json.loads(out.read_text())
    assert found["setting"] == setting and ("Emulated" in shown) == (setting == "emulated_links")
    if "not_measured" in found:
        assert found["cases"] == [] and "network namespaces" in found["not_measured"]
        return
    (case,) = found["cases"]
    free, slow = case["limits"]
    assert free["measured_mbit"]["median"] > 2 * slow["measured_mbit"]["median"] and slow["mbit"] == 100
    assert slow["measured_mbit"]["median"] == pytest.approx(100, rel=0.2)
    assert all("to_no_limit" in result for result in slow["contenders"].values())
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert "lptbench" not in listed


@pytest.mark.slow
@pytest.mark.timing
def test_links_say_so_where_namespaces_cannot_be_made(tmp_path: Path) -> None:
    out, tools = tmp_path / "links.json", tmp_path / "tools"
    tools.mkdir()
    (tools / "ip").write_text("#!/bin/sh\necho Operation not permitted >&2\nexit 1\n")
    (tools / "ip").chmod(0o755)
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), "links", "--smoke", "--out", str(out)]
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Operation not permitted" in json.loads(out.read_text())["not_measured"]
    assert "not measured" in done.stdout


@pytest.mark.slow
@pytest.mark.timing
def test_a_scan_adds_to_the_splits_that_were_measured(tmp_path: Path) -> None:
    out = tmp_path / "splits.yaml"
    splits.write(out, {"another": {1: (3, 5)}}, {"another": {1: {"[3, 5]": 2.0}}})
    only = ["--smoke", "--out", str(out), "--repetitions", "1", "--micro-batches", "1", "--only"]
    throughput("scan", *only, "DeepSpeed pipeline, best")
    found = splits.read(out)
    assert found["another"] == {1: (3, 5)}
    measured = splits.read_measured(out)["DeepSpeed pipeline, best split"][1]
    assert len(measured) >= 5 and "[4, 4]" in measured
    assert str(list(found["DeepSpeed pipeline, best split"][1])) == min(measured, key=lambda split: measured[split])
