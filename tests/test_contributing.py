"""The examples of CONTRIBUTING.md: each runs as it stands there and does what the text says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from saved_runs import TEXT, WINDOW, make_run
from small_run import CONFIG, stand_in
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer import initialize
from lptransformer.config.load import load
from lptransformer.engine.engine import LocalUpdateEngine
from lptransformer.evaluation.export import export_run
from lptransformer.methods import objectives
from lptransformer.methods.heads import HEADS
from lptransformer.methods.objectives import METHODS
from lptransformer.methods.spans import Span
from lptransformer.models.blueprint import make_blueprint
from lptransformer.models.stage import make_stage
from lptransformer.run_folder.metrics import StageReport

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "CONTRIBUTING.md").read_text()


def example(heading: str) -> str:
    """The Python code under a heading."""
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    (code,) = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    return code


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Any]:
    """An example as a module that can be imported by its name; what it registers is gone afterwards."""
    heading, name = request.param
    (tmp_path / f"{name}.py").write_text(example(heading))
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module(name)
    del sys.modules[name]
    METHODS.pop(name, None)
    HEADS.pop(name, None)


def as_module(heading: str, name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("module", [(heading, name)], indirect=True, ids=[name])


def train_two_updates(config: dict[str, Any], heads: int) -> None:
    """In one process: every head has a loss, a gradient, and after the first update other weights."""
    engine = initialize({**config, "train": {**config["train"], "grad_clip": 0.0}})
    assert isinstance(engine, LocalUpdateEngine)
    before = {index: stage.weights() for index, stage in engine.local.items()}
    for _ in range(2):
        reports = engine.train_batch().reports
        assert len(reports) == heads
        for report in reports:
            assert isinstance(report, StageReport) and report.loss_sum is not None and report.grad_norm is not None
            assert report.loss_sum / report.label_tokens < 6 and report.grad_norm > 0 and not report.skipped
    for index, stage in engine.local.items():
        assert not [name for name, weight in stage.weights().items() if torch.equal(weight, before[index][name])]
    engine.close()


@as_module("Add a method", "shrinking")
def test_the_method_is_registered_and_trains(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert objectives.build(4, "shrinking").usual.spans == (Span(0, 1), Span(2, 2), Span(3, 3))
    assert objectives.build(1, "shrinking").usual.spans == (Span(0, 0),)
    stand_in(tmp_path, monkeypatch)
    four = {**CONFIG, "model": {**CONFIG["model"], "num_layers": 4}, "objective": {"name": "shrinking", "parts": 2}}
    train_two_updates(four, heads=2)


@as_module("Add a head", "narrow")
@pytest.mark.parametrize("init", ["scratch", "model"])
def test_the_head_is_registered_and_trains(
    module: Any, init: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(tmp_path, monkeypatch)
    config = {**CONFIG, "head": {"kind": "narrow", "divisor": 2, "init": init}}
    blueprint = make_blueprint(load(config), 61, None)
    head = make_stage(blueprint.stages[0], blueprint, seed=0).head
    assert head is not None and head.readout.weight.shape == (61, 8)
    assert sum(parameter.numel() for parameter in head.parameters()) == blueprint.costs.auxiliary_parameters
    train_two_updates(config, heads=2)


def test_the_family_is_cut_and_keeps_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example("Add a family"), "CONTRIBUTING.md", "exec"), {})
    assert (tmp_path / "tiny-qwen2" / "config.json").is_file()


@as_module("Add an evaluation protocol", "sliding")
def test_the_protocol_is_that_of_the_library(module: Any, tmp_path: Path) -> None:
    """The loop that the documentation of transformers has for models of fixed length, on the exported model."""
    run = make_run(tmp_path)
    export_run(run, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    ids = tokenizer(TEXT[:100], return_tensors="pt", add_special_tokens=False).input_ids[0]
    for window, stride in ((WINDOW, 5), (WINDOW, WINDOW - 1), (7, 1), (WINDOW, 13)):
        nll, count, before = 0.0, 0, 0
        for start in range(0, len(ids), stride):
            end = min(start + window, len(ids))
            with torch.no_grad():
                log_p = F.log_softmax(model(ids[None, start:end]).logits[0].double(), dim=-1)
            wanted = [place for place in range(max(before, start + 1), end)]  # the first token of all has no context
            nll -= sum(log_p[place - start - 1, ids[place]].item() for place in wanted)
            count, before = count + len(wanted), end
            if end == len(ids):
                break
        perplexity = torch.tensor(nll / count).exp().item()
        found = module.sliding(run, TEXT[:100], window, stride)
        assert count == len(ids) - 1 and len(found) == 2
        assert found[-1] == pytest.approx(perplexity, rel=1e-5)


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"(tests/\w+\.py)::(\w+)", PAGE)
    assert named
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text()
