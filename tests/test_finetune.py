"""Fine-tuning as docs/finetuning.md tells it: its commands, on a small model that has read two novels before.

They start two processes through the deepspeed launcher. What they train must be better for it afterwards.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from overlays import overlay, peft_logits, with_overlay
from own_checkout import ROOT, make_checkout, run
from small_chat import save_tokenizer
from transformers import AutoModelForCausalLM

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.launcher import run as run_command
from lptransformer.training.train import train

pytestmark = pytest.mark.slow
NOVELS = ROOT / "data/books/train"
STEPS = 20  # of the hundred that the configurations have
PAGE = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs/finetuning.md").read_text(), re.M | re.S)
COMMANDS = [line for block in PAGE for line in block.splitlines() if line.strip()]


def quietly(source: Any, overrides: tuple[str, ...], folder: str) -> None:
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        train(load(source, overrides))


def talk(novel: Path) -> list[dict[str, Any]]:
    """What is said in a novel, and what is said to that."""
    paragraphs = [" ".join(one.split()) for one in novel.read_text().split("\n\n")]
    pairs = [pair for pair in itertools.pairwise(paragraphs) if all(one.startswith('"') for one in pair)]
    roles = ("user", "assistant")
    return [{"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]} for pair in pairs]


@pytest.fixture(scope="module")
def checkout(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with `model`, which has read two novels and no conversation, and chat.jsonl, from a third one."""
    place = make_checkout(tmp_path_factory.mktemp("checkout"))
    save_tokenizer(place / "tokenizer", "chatml", text=(NOVELS / "jane-eyre.txt").read_text()[:300_000], vocab_size=512)
    sizes = {"hidden_size": 64, "num_layers": 6, "num_heads": 4, "max_position_embeddings": 512}
    raw: dict[str, Any] = {
        "model": {"family": "llama", **sizes},
        "data": {
            "train": [str(NOVELS / "jane-eyre.txt"), str(NOVELS / "pride-and-prejudice.txt")],
            "tokenizer": "tokenizer",
            "sequence_length": 128,
        },
        "objective": {"name": "backprop"},
        "train": {"steps": 150, "micro_batch_size": 16, "micro_batches_per_update": 1, "learning_rate": 4e-3},
        "run": {"dir": "runs/before"},
    }
    pool.run(1, quietly, raw, ("train.warmup_steps=20",), str(place), timeout=300)
    export_run(place / "runs/before", place / "model")
    rows = talk(NOVELS / "sense-and-sensibility.txt")
    assert len(rows) > 500
    (place / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(overlay("peft", tmp_path_factory.mktemp("peft")))


def as_the_page_says(checkout: Path, name: str, **variables: str) -> str:
    """Its commands on runs/NAME, in order; the training is shortened, and the others run in this process. What the last
    one prints."""
    printed = io.StringIO()
    for command in (one for one in COMMANDS if f"runs/{name}" in one):
        python, *words = shlex.split(command)
        if words[2] == "train":
            run(checkout, python, *words, f"--train.steps={STEPS}", timeout=400, **variables)
            continue
        printed = io.StringIO()
        with contextlib.chdir(checkout), contextlib.redirect_stdout(printed):
            run_command(parser(), words[2:])
    return printed.getvalue()


def perplexities(run_folder: Path) -> tuple[float, float]:
    """Of the last exit on what is held out: before the first update, and after the last one."""
    rows = [row for row in read_metrics(run_folder) if "evaluation" in row]
    before, after = ([row["exits"][-1]["perplexity"] for row in rows if row["update"] == u] for u in (0, STEPS))
    assert len(before) == len(after) == 1
    return before[0], after[0]


def test_every_command_of_the_page_is_run_here() -> None:
    assert all(re.match(r"python -m lptransformer .*runs/(text|chat|lora)\b", command) for command in COMMANDS)
    configs = {path.name for path in (ROOT / "configs").glob("finetune-*.yaml")}
    assert configs == set(re.findall(r"finetune-\w+\.yaml", " ".join(COMMANDS)))
    assert all("--parallel.pipeline=2" in command for command in COMMANDS if " train " in command)


def test_text(checkout: Path, pool: Pool) -> None:
    """Better than before, and better than with heads that are copied from the model."""
    compared = as_the_page_says(checkout, "text")
    before, after = perplexities(checkout / "runs/text")
    assert after < before
    assert "difference" in compared
    copied = ("head.kind=private", "head.init=model", "model.pretrained=model", "parallel.pipeline=2")
    where = (f"train.steps={STEPS}", "run.dir=runs/copied")
    pool.run(2, quietly, "configs/finetune-text.yaml", (*copied, *where), str(checkout), timeout=300)
    same, worse = perplexities(checkout / "runs/copied")
    assert same == pytest.approx(before, rel=1e-5) and after < worse, (before, after, worse)


def test_chat(checkout: Path) -> None:
    as_the_page_says(checkout, "chat")
    before, after = perplexities(checkout / "runs/chat")
    assert after < before
    tuned = AutoModelForCausalLM.from_pretrained(checkout / "runs/chat-model")
    assert tuned.config.max_position_embeddings == 512
    assert "<|im_start|>" in (checkout / "runs/chat-model/chat_template.jinja").read_text()


def test_lora(checkout: Path, pool: Pool, peft: str) -> None:
    """What is exported, merged or for peft, computes what the run does."""
    path = os.pathsep.join(filter(None, (peft, os.environ.get("PYTHONPATH"))))
    as_the_page_says(checkout, "lora", PYTHONPATH=path)
    before, after = perplexities(checkout / "runs/lora")
    assert after < before
    ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    own = trained_model.load(checkout / "runs/lora", checkpoint.latest(checkout / "runs/lora")).logits(ids)
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(checkout / "runs/lora-model")(ids).logits
    assert torch.equal(merged, own)
    (adapted,) = pool.run(1, with_overlay, peft, peft_logits, checkout / "model", checkout / "runs/lora-adapter", ids)
    torch.testing.assert_close(adapted, own, rtol=0, atol=1e-4)
