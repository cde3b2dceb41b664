"""benchmarks/finetune.py: its tables from given losses, and its records beside a plain loop."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import finetune  # noqa: E402
import finetune_prototypes as prototypes  # noqa: E402
import finetune_report  # noqa: E402

from lptransformer.data.token_set import MANIFEST, TokenSet  # noqa: E402
from lptransformer.data.train_stream import TrainStream  # noqa: E402
from lptransformer.methods import flops  # noqa: E402
from lptransformer.models.blueprint import make_blueprint  # noqa: E402


def record(recipe: str, losses: list[float], old: float = 2.0, **more: Any) -> dict[str, Any]:
    found = {"recipe": recipe, "corpus": "moby-dick", "updates": 40, "rate": 1e-4, "seed": 0, "tokens": 20480}
    found |= {"nll": {"choose": losses, "report": losses, "old": [old, old]}, "chunks": [11, 19]}
    found |= {"flops": {"total": 3.0, "serial": 1.4, "backprop_total": 2.0, "backprop_serial": 2.0}}
    found |= {"optimizer_bytes": 3 * 2**20, "trained_weights": 10**6}
    on = {"ranks": 2, "activations": {"1": [2**20, 2**21], "4": [2**21, 2**22]}, "up_bytes": 2**20}
    return found | {"ranks": [on | {"gradient_bytes": 0, "target_bytes": 0}]} | more


def backprop(losses: list[float], **more: Any) -> dict[str, Any]:
    on = {"ranks": 2, "activations": {"1": [2**22, 2**21], "4": [2**23, 0]}, "up_bytes": 2**20}
    on |= {"gradient_bytes": 2**20, "target_bytes": 0}
    whole = {"total": 2.0, "serial": 2.0, "backprop_total": 2.0, "backprop_serial": 2.0}
    return record("backprop", losses, flops=whole, ranks=[on], chunks=[30], **more)


def test_differences_are_paired_by_window_and_aims_are_judged_at_the_rate_that_does_best_on_the_other_text() -> None:
    worse = backprop([4.0, 5.0], rate=5e-5)
    base, near = backprop([3.0, 4.0], optimizer_bytes=2**20), record("near", [3.004, 4.006], old=1.9)
    far = record("far", [3.1, 4.1], flops={**near["flops"], "serial": 1.0})
    aims, recipes, costs, rates, _ = finetune_report.tables([worse, base, near, far])
    assert recipes.rows[1][:5] == ("near", "20,480", "0.0001", f"{math.exp(3.505):.2f}", "+0.50 ± 0.10")
    assert [row[0] for row in recipes.rows] == ["backprop", "near", "far"] and recipes.rows[1][-2:] == ("0.70", "no")
    assert [(row[3], *row[4:]) for row in aims.rows] == [
        ("near", "+0.50 ± 0.10 % at 0.70", "hit"),
        ("near", "-9.52 ± 0.00 %", "hit"),
        ("near", "2 MiB, 4 of backprop", "hit"),
        ("near", "+2 MiB", "said"),
    ]
    assert costs.rows[1][:7] == ("near", 2, "11+19", "1.50", "0.70", "2 / 4", "4 / 8")
    assert [(row[2], row[-1]) for row in rates.rows] == [("5e-05", "no"), ("0.0001", "yes")]
    assert finetune_report._front([(0.7, 3.0), (0.5, 4.0), (0.6, 5.0), (1.0, 2.9)]) == [(0.5, 4), (0.7, 3), (1.0, 2.9)]


def test_seeds_are_compared_with_backprop_of_the_same_seed() -> None:
    def of_seeds(make: Any, losses: list[float]) -> list[dict[str, Any]]:
        return [make([loss, loss], corpus="chat", seed=seed) for seed, loss in enumerate(losses)]

    local = of_seeds(lambda losses, **more: record("local", losses, **more), [1.01, 2.02])
    _, _, _, _, seeds = finetune_report.tables([*of_seeds(backprop, [1.0, 2.0]), *local])
    at_another_rate = record("local", [9.0, 9.0], corpus="chat", rate=2e-4)
    assert finetune_report.tables([*of_seeds(backprop, [1.0, 2.0]), *local, at_another_rate])[-1].rows[:2] == seeds.rows
    ratio = math.exp(0.015)
    assert len(seeds.rows) == 2
    assert seeds.rows[1][4:7] == (2, f"{math.exp(1.515):.2f}", f"{100 * (ratio - 1):+.2f} ± {100 * ratio * 0.005:.2f}")


def test_later_parts_take_what_did_best_on_the_text_to_choose_by(tmp_path: Path) -> None:
    study = finetune.Study(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, folder=tmp_path)
    study.recipes = finetune.recipes(30)
    first, second = study.parts()
    assert len(first) == 22 and [run.rate for run in second[:3]] == [5e-5, 1e-4, 2e-4]
    study.records.mkdir()
    for number, run in enumerate(second):
        losses = {"choose": [3.0 - 0.1 * number if number < 5 else 9.0], "report": [3.0 + number]}
        of = {"model": study.model.name, "window": 512, "keys": study.recipes[run.recipe].keys}
        (study.records / f"{run.name}.json").write_text(json.dumps({"nll": losses, **of}))
    _, _, third, fourth = study.parts()
    assert [run.name for run in fourth] == [
        "backprop-moby-dick-400-0.0002-0",
        "chunked-2-fitted-10-trained-middle-moby-dick-400-0.0001-0",
    ]
    assert len(third) == 2 + 18 and {run.seed for run in third} == {0, 1, 2}
    study.model = tmp_path / "another"
    with pytest.raises(SystemExit, match=r"backprop-moby-dick-120-5e-05-0.json is of another model: move it away"):
        list(study.parts())


def plain_losses(study: finetune.Study, updates: int) -> list[float]:
    """By window of what is reported, the loss after training by backprop: torch and transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(study.model, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # untied
    (manifest,) = (study.out / "prepared").rglob(MANIFEST)
    stream = TrainStream([TokenSet.open(manifest.parent)], None, seed=0, micro_batch_size=1)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for update in range(updates):
        ids = stream.batch(update).input_ids
        F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 1e-4 * update / updates  # no update is beyond the warm-up
        optimizer.step()
        optimizer.zero_grad()
    (novel,) = study.books.glob("moby-dick*")
    ids = torch.tensor(list(novel.read_bytes()))[-3 * 32 :].view(3, 32) + 3
    with torch.no_grad():
        return [F.cross_entropy(model(one[None]).logits[0, :-1], one[1:]).item() for one in ids]


@pytest.mark.slow
def test_records_are_those_of_plain_loops_and_are_not_made_twice(tmp_path: Path) -> None:
    def train() -> None:
        for recipe in ("backprop", "chunked-2-fitted-10-trained"):
            with pytest.raises(SystemExit, match="0"):
                finetune.main(["--tiny", "--out", str(tmp_path), "--only", f"{recipe}-moby-dick-3-*"])

    train()
    study = finetune.tiny(tmp_path)
    made = {path.stem: path for path in study.records.glob("*.json")}
    base = json.loads(made["backprop-moby-dick-3-0.0001-0"].read_text())
    assert base["nll"]["report"] == pytest.approx(plain_losses(study, 3), abs=1e-5)
    assert base["optimizer_bytes"] == 2 * 4 * base["trained_weights"]

    run = finetune.Run("chunked-2-fitted-10-trained", "moby-dick", 3, 1e-4)
    local = json.loads(made[run.name].read_text())
    trained = prototypes.train(finetune.configuration(study, run), None)
    again = finetune.losses(study, run, trained.stages) | finetune.held_by(trained.stages, trained.optimizers)
    assert again == {key: local[key] for key in again}, "the loop of the prototypes is the engine's"
    assert list(local["lower_exits"]) == ["1"] and local["chunks"] == [2, 4]

    before = {name: path.stat().st_mtime_ns for name, path in made.items()}
    made[run.name].unlink()
    train()
    after = {name: path.stat().st_mtime_ns for name, path in made.items()}
    assert {name for name in made if after[name] != before[name]} == {run.name}
    page = (tmp_path / "finetune.md").read_text()
    assert page.count("<!-- table:") == 5 and "| backprop |" in page
    assert (study.records / "front.png").stat().st_size < 200_000


def test_flops_of_prototypes_are_counted_as_the_package_counts(tmp_path: Path) -> None:
    """With the work that is theirs taken away."""
    study = finetune.tiny(tmp_path)
    run = finetune.Run("chunked-2-fitted-10-trained", "moby-dick", 3, 1e-4)
    blueprint = make_blueprint(finetune.configuration(study, run), None, None)
    costs, lower = blueprint.costs, blueprint.stages[0].num_blocks
    whole = flops.of_phase(blueprint.objective, blueprint.objective.usual, costs)
    distilled = prototypes.of_update(blueprint, prototypes.DISTILLED)
    assert distilled.total == pytest.approx(whole.total + lower * costs.block_flops + costs.head_flops)
    adapted, added = prototypes.of_update(blueprint, prototypes.LORA), prototypes.adapter_weights(blueprint)
    assert adapted.total == pytest.approx(whole.total + lower * (6 * added - costs.block_flops))
    assert added == 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))


@pytest.mark.slow
def test_a_study_that_is_ended_ends_its_runs(tmp_path: Path) -> None:
    finetune.tiny(tmp_path)
    code = "import sys, finetune, pathlib; finetune.run_all(finetune.tiny(pathlib.Path(sys.argv[1])), 'c*', 2, "
    code += "['--tiny', f'--out={sys.argv[1]}'])"
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT / "benchmarks", stderr=subprocess.PIPE, text=True) as driver:
        assert driver.stderr is not None
        while driver.stderr.readline().count("begins") == 0:
            assert driver.poll() is None
        children = psutil.Process(driver.pid).children()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 130
    assert children
    assert not any(child.is_running() for child in children)
    assert not list((tmp_path / "finetune").glob("*.json"))
