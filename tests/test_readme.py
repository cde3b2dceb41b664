"""What the README and the pages behind it tell a person to type, typed."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
from own_checkout import ROOT, make_checkout, run

from lptransformer.run_folder import checkpoint, saved_stage

pytestmark = pytest.mark.slow
EXIT_KEYS = {"stage", "last_block", "head", "nll_per_token", "perplexity", "bits_per_byte", "byte_perplexity"}
EXIT_KEYS |= {"word_perplexity", "tokens", "words", "bytes"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkout(tmp_path_factory.mktemp("checkout"))


DOCUMENTS = ("README.md", "docs/launching.md", "docs/runs.md")  # each goes on with what those before it have made


def readme_blocks(language: str, document: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)


def test_the_readme_s_commands(checkout: Path) -> None:
    """Every command in the shell blocks of the README and of the pages behind it runs, in order, as it stands there."""
    blocks = [block for document in DOCUMENTS for block in readme_blocks("bash", document)]
    commands = [line for block in blocks for line in block.splitlines() if line.strip()]
    assert len(commands) == len(set(commands)), "each is in one document"
    elsewhere = {"bash launch/quickstart.sh", "bash launch/test.sh"}  # the test below; the tests themselves
    assert elsewhere < set(commands)
    for command in commands:
        if command in elsewhere:
            continue
        if "multinode" in command:  # test_two_nodes runs the script; here is a node that no other joins
            assert re.fullmatch(r"NODE_RANK=0 bash launch/multinode.sh launch/hostfile.example \S+", command)
            continue
        out = run(checkout, "bash", "-c", f"set -eu; source .venv/bin/activate; {command}", timeout=400)
        if "--json" in command:
            assert [set(one) for one in json.loads(out)["exits"]] == [EXIT_KEYS, EXIT_KEYS]


def test_no_other_page_has_commands_that_nobody_runs() -> None:
    """Blocks of the pages that explain how to use the program; measurements take hours."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")):
        name = str(page.relative_to(ROOT))
        if name not in (*DOCUMENTS, "docs/finetuning.md", "docs/log.md"):  # test_finetune runs those
            for block in readme_blocks("bash", name):
                assert not re.search(r"^(python -m lptransformer|lptransformer|deepspeed|torchrun) ", block, re.M), name


def test_the_readme_s_python_example(checkout: Path) -> None:
    """In one process, and the same lines under torchrun in two."""
    (code,) = readme_blocks("python")
    assert len(code.strip().splitlines()) <= 15
    (checkout / "script.py").write_text(code)
    out = run(checkout, sys.executable, "script.py", "--parallel.pipeline=1", "--train.steps=20")
    assert out.count("exit of stage") == 2
    folder = checkout / "runs" / "python"
    assert checkpoint.latest(folder) == 20
    out = run(checkout, sys.executable, "-m", "lptransformer", "evaluate", "runs/python", "--json")
    assert len(json.loads(out)["exits"]) == 2
    shutil.rmtree(folder)
    out = run(checkout, "torchrun", "--nproc-per-node", "2", "script.py", "--train.steps=20")
    assert checkpoint.latest(folder) == 20 and len(saved_stage.folders(folder, 20)) == 2
    assert {f"exit of stage {stage}" for stage in (0, 1)} <= set(re.findall(r"exit of stage \d", out))


@pytest.mark.timing
def test_the_quick_start_keeps_its_promise(checkout: Path) -> None:
    """The time, the distance to the unigram model and the bigram model, and the perplexity that the README names."""
    started = time.monotonic()
    out = run(checkout, "bash", "launch/quickstart.sh", timeout=900)
    seconds = time.monotonic() - started
    rows = re.findall(r"^(exit after block \d+|unigram|bigram)\D*?(\d+\.\d+)", out, re.M)
    nats = {name: float(value) for name, value in rows}
    last = nats["exit after block 3"]
    assert last < nats["unigram"] - 1.0 and last < nats["bigram"], out
    promised = float(re.search(r"perplexity\s+below (\d+)", (ROOT / "README.md").read_text())[1])  # type: ignore[index]
    perplexity = float(re.search(r"^exit after block 3 +\S+ +(\S+)", out, re.M)[1])  # type: ignore[index]
    assert perplexity < promised
    assert seconds < 240, f"{seconds:.0f} s"
