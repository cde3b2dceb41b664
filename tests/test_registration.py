"""A method and a kind of head that the package does not know: registered by a call, they work everywhere."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from distributed import Pool
from engine_jobs import Trained, train
from small_run import CONFIG, stand_in

from lptransformer import initialize
from lptransformer.__main__ import parser
from lptransformer.config.load import load, to_dict, to_yaml
from lptransformer.errors import ConfigError
from lptransformer.methods.heads import HEADS
from lptransformer.methods.objectives import METHODS
from lptransformer.training.launcher import run

MODULES = ("outside_head", "outside_method")  # each registers when it is imported
OUTSIDE: dict[str, Any] = {"objective": {"name": "ladder", "rung": 1, "near": 0.25}, "head": {"kind": "square"}}


@pytest.fixture(autouse=True)
def outside() -> Iterator[None]:
    """They are there for a test of this module and for no other."""
    for name in MODULES:
        importlib.reload(importlib.import_module(name))
    yield
    METHODS.pop("ladder", None)
    HEADS.pop("square", None)


def main(*arguments: str) -> None:
    run(parser(), arguments)


@pytest.mark.parametrize("name", MODULES)
def test_each_is_one_short_file(name: str) -> None:
    assert len((Path(__file__).parent / f"{name}.py").read_text().splitlines()) <= 30


def test_its_options_are_keys_like_others() -> None:
    config = load({**CONFIG, **OUTSIDE})
    assert to_dict(config)["objective"] | to_dict(config)["head"] | {"near": 0.25, "width": 8, "rung": 1} == (
        to_dict(config)["objective"] | to_dict(config)["head"]
    )
    assert "rung: 1  # ladder: blocks of a rung" in to_yaml(config)
    with pytest.raises(ConfigError, match=r"objective.rung = 3 .* has no meaning with objective.name = 'chunked'"):
        load(CONFIG, ["objective.rung=3"])
    with pytest.raises(ConfigError, match=r"objective.rung = 0 .*: must be a whole number, 1 or more"):
        load(CONFIG, ["objective.name=ladder", "objective.rung=0"])
    stage = "deepspeed.zero_optimization.stage"
    with pytest.raises(ConfigError, match=rf"{stage} = 3 .* with objective.name = 'ladder'.*gradients go from stage"):
        load({**CONFIG, **OUTSIDE}, ["model.num_layers=3", f"{stage}=3"])
    with pytest.raises(ConfigError, match=r"border.codec = 'int8' .* with objective.name = 'ladder'"):
        load({**CONFIG, **OUTSIDE}, ["model.num_layers=3", "border.codec=int8"])


def test_it_trains_and_is_evaluated_planned_recorded_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, monkeypatch, {**CONFIG, **OUTSIDE})
    engine = initialize("c.yaml")
    (first, _), (second, _) = (engine.train_batch().reports for _ in range(2))
    assert second.loss_sum < first.loss_sum  # type: ignore[union-attr, operator]
    engine.save_checkpoint("by-hand")
    engine.close()
    main("train", "c.yaml", "--train.steps=2")
    main("evaluate", "run", "--json")
    exits = json.loads(capfd.readouterr().out.splitlines()[-1])["exits"]
    assert [one["last_block"] for one in exits] == [0, 1]
    main("export", "run", "exported-model")
    main("plan", "c.yaml", "--gpu=h100", "--json=plan.json")
    assert any("ladder" in one["method"] for one in json.loads(Path("plan.json").read_text())["methods"])
    main("report", "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["method"] == "ladder-square" and record["stages"][0]["gradients_bytes"] == 0
    assert "record: run/record.json" in capfd.readouterr().out


def train_outside(overrides: tuple[str, ...], updates: int) -> Trained:
    for name in MODULES:
        importlib.import_module(name)
    return train(overrides, updates)


def test_two_pipeline_ranks_give_the_bits_of_one(pool: Pool) -> None:
    overrides = ("objective.name=ladder", "objective.rung=2", "head.kind=square", "train.steps=2")
    alone = pool.run(1, train_outside, overrides, 2)
    both = pool.run(2, train_outside, (*overrides, "parallel.pipeline=2"), 2)
    losses = {index: [report.loss_sum for report in of] for index, of in alone[0].reports.items()}
    for one in both:
        assert {
            index: [report.loss_sum for report in of] for index, of in one.reports.items()
        }.items() <= losses.items()
