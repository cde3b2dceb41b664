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
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.evaluation.protocols import PROTOCOLS
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


@as_module("Add an evaluation protocol", "apart")
def test_the_protocol_scores_documents_by_themselves(module: Any, tmp_path: Path) -> None:
    run, documents = make_run(tmp_path), [TEXT[:70], TEXT[100:133]]
    export_run(run, tmp_path / "exported")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "exported")
    nll, count = 0.0, 0
    for document in documents:
        ids = tokenizer(document, return_tensors="pt", add_special_tokens=False).input_ids
        for start in range(0, ids.shape[1], WINDOW):
            window = ids[:, start : start + WINDOW]
            if window.shape[1] > 1:
                with torch.no_grad():
                    nll += F.cross_entropy(model(window).logits[0, :-1], window[0, 1:], reduction="sum").item()
                count += window.shape[1] - 1
    files = [tmp_path / f"{number}.txt" for number in range(len(documents))]
    for file, document in zip(files, documents, strict=True):
        file.write_text(document)
    found = evaluate_run(run, [str(tmp_path / "?.txt")], protocol="apart")
    PROTOCOLS.pop("apart")
    assert found is not None and found["exits"][-1]["tokens"] == count
    assert found["exits"][-1]["nll_per_token"] == pytest.approx(nll / count, rel=1e-6)


def test_the_tests_that_it_names_are_there() -> None:
    named = re.findall(r"(tests/\w+\.py)::(\w+)", PAGE)
    assert named
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text()
