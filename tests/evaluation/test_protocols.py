"""Perplexity of a Hugging Face folder by every convention, against loops that know nothing of the package."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from overlays import overlay
from saved_runs import FEW, TEXT, WINDOW, make_run, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.evaluation.protocols import detokenised

DOCUMENTS = [
    " = Moor = \n\n The moor was wide , and the wind 's voice ( low ) was its own @-@ made . \n",
    TEXT[:700],
    "Short .",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a vocabulary of pieces and a begin-of-text token, whose exits are kept beside it."""
    folder = tmp_path_factory.mktemp("model")
    run = make_run(folder, model={"family": "llama"}, chunks=4, tokenizer="sentencepiece")
    export_run(run, folder / "out", keep_exits=True)
    return folder / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    lines = (json.dumps({"text": one}) + "\n" for one in DOCUMENTS)
    return write_text(tmp_path / "moor.jsonl", "".join(lines))


def evaluated(folder: Path, text: Path, **options: Any) -> dict[str, Any]:
    results = evaluate_run(folder, [str(text)], **options)
    assert results is not None
    return results


def nll(opened: Any, ids: list[int], scored: int) -> float:
    """The summed loss of the last `scored` ids."""
    with torch.no_grad():
        logits = opened(torch.tensor([ids])).logits[0, :-1]
    losses = F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none")
    return float(losses[len(losses) - scored :].sum())


def check(result: dict[str, Any], total: float, tokens: int) -> None:
    assert result["tokens"] == tokens
    assert result["nll_per_token"] == pytest.approx(total / tokens, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


@pytest.mark.parametrize(("window", "stride"), [(16, 8), (16, 15), (12, 5), (16, 1), (16, None)])
def test_sliding_windows_are_those_of_the_library_s_documentation(
    model: Path, text: Path, window: int, stride: int | None
) -> None:
    result = evaluated(model, text, protocol="hf-sliding", window=window, stride=stride)
    step = stride or window // 2
    assert (result["convention"], result["window"], result["stride"]) == ("hf-sliding", window, step)
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    ids = tokenizer("\n\n".join(DOCUMENTS), add_special_tokens=False).input_ids
    total, before = 0.0, 0
    for begin in range(0, len(ids), step):
        end = min(begin + window, len(ids))
        target = end - before
        total += nll(opened, ids[begin:end], target - (begin == 0))
        before = end
        if end == len(ids):
            break
    check(result["exits"][-1], total, len(ids) - 1)


def wikitext_by_hand(opened: Any, tokenizer: Any, window: int) -> tuple[float, int]:
    total, tokens = 0.0, 0
    for document in DOCUMENTS:
        ids = tokenizer(detokenised(document), add_special_tokens=False).input_ids
        whole = [tokenizer.bos_token_id, *ids]
        for done in range(0, len(ids), window):
            last = min(done + window, len(ids))
            total += nll(opened, whole[max(0, last - window) : last + 1], last - done)
        tokens += len(ids)
    return total, tokens


def test_wikitext_is_scored_document_by_document(model: Path, text: Path) -> None:
    result = evaluated(model, text, protocol="lm-eval-wikitext", window=WINDOW)
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), AutoTokenizer.from_pretrained(model)
    total, tokens = wikitext_by_hand(opened, tokenizer, WINDOW)
    assert result["prefix"] == "<s>"
    (last,) = result["exits"][-1:]
    check(last, total, tokens)
    words = sum(len(re.split(r"\s+", document)) for document in DOCUMENTS)
    size = sum(len(document.encode()) for document in DOCUMENTS)
    assert last["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-5)
    assert last["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-6)


TASK = """
task: excerpt
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: !function {folder}.wikitext_detokenizer
process_results: !function {folder}.process_results
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
"""


@pytest.mark.slow
def test_it_is_what_the_command_of_lm_eval_says(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """`lm_eval` on an export, with its own task's functions over our documents; `evaluate` on the run itself."""
    harness = overlay("lm-eval", tmp_path_factory.mktemp("lm-eval"))
    run = make_run(tmp_path, model={"family": "llama"}, tokenizer="sentencepiece")
    export_run(run, tmp_path / "exported")
    tasks = tmp_path / "tasks"
    pages = (json.dumps({"page": one}) + "\n" for one in DOCUMENTS)
    file = write_text(tasks / "pages.jsonl", "".join(pages))
    own = harness / "lm_eval" / "tasks" / "wikitext" / "preprocess_wikitext.py"
    write_text(tasks / "wikitext_functions.py", own.read_text())
    write_text(tasks / "excerpt.yaml", TASK.format(file=file, folder="wikitext_functions"))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(harness)}
    model = f"pretrained={tmp_path / 'exported'},max_length={WINDOW},dtype=float32"
    ask = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", model, "--tasks", "excerpt"]
    ask += ["--include_path", str(tasks), "--device", "cpu", "--batch_size", "2", "--output_path", str(tmp_path / "o")]
    done = subprocess.run(ask, env={**os.environ, **offline}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "o").rglob("results*.json")
    theirs = {name.partition(",")[0]: one for name, one in json.loads(path.read_text())["results"]["excerpt"].items()}

    lines = (json.dumps({"text": one}) + "\n" for one in DOCUMENTS)
    text = write_text(tmp_path / "moor.jsonl", "".join(lines))
    ours = evaluated(run, text, protocol="lm-eval-wikitext")["exits"][-1]
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


# ---- blocks, prefixes, exits of a folder


@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_blocks_of_a_folder_with_and_without_a_prefix(model: Path, text: Path, bos: Any) -> None:
    result = evaluated(model, text, bos=bos, window=WINDOW)
    assert result["prefix"] == ("<s>" if bos == "always" else None)  # this tokenizer puts none before a text
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(model).eval(), load_tokenizer(model)
    stream: list[int] = []
    for number, document in enumerate(DOCUMENTS):
        stream += [tokenizer.end_of_text_id] if number else []  # type: ignore[list-item]
        stream += [tokenizer.backend.bos_token_id] if bos == "always" else []
        stream += tokenizer.encode(document).tolist()
    windows = [stream[start : start + WINDOW] for start in range(0, len(stream), WINDOW)]
    total = sum(nll(opened, one, len(one) - 1) for one in windows if len(one) > 1)
    check(result["exits"][-1], total, sum(len(one) - 1 for one in windows))


def test_a_folder_is_evaluated_as_its_run_is(tmp_path: Path, text: Path) -> None:
    run = make_run(tmp_path, chunks=2, head={"blocks": 1})
    export_run(run, tmp_path / "out", keep_exits=True)
    of_run, of_folder = evaluated(run, text), evaluated(tmp_path / "out", text)
    assert [one["head"] for one in of_folder["exits"]] == ["kept", "the model's own"]
    for one, same in zip(of_run["exits"], of_folder["exits"], strict=True):
        assert (same["stage"], same["last_block"], same["tokens"]) == (one["stage"], one["last_block"], one["tokens"])
        assert same["nll_per_token"] == pytest.approx(one["nll_per_token"], rel=1e-6)  # other chunks of the loss
    assert evaluated(tmp_path / "out", text, exit_block=1)["exits"] == of_folder["exits"][:1]
    assert evaluated(run, text, exit_block=1)["exits"] == of_run["exits"][:1]


def test_an_exit_that_nobody_kept_is_a_logit_lens(model: Path, text: Path, tmp_path: Path) -> None:
    (model.parent / "plain").mkdir(exist_ok=True)
    for path in model.iterdir():
        if path.name != "exits.safetensors":
            (model.parent / "plain" / path.name).write_bytes(path.read_bytes())
    plain = model.parent / "plain"
    (one,) = evaluated(plain, text, exit_block=1, window=WINDOW)["exits"]
    assert one["head"] == "logit lens" and one["last_block"] == 1
    opened, tokenizer = AutoModelForCausalLM.from_pretrained(plain).eval(), load_tokenizer(plain)
    opened.model.layers = opened.model.layers[:2]  # type: ignore[union-attr]
    end = [tokenizer.end_of_text_id]
    ids = [tokenizer.encode(document).tolist() for document in DOCUMENTS]
    stream: list[int] = sum(([*(end if number else []), *part] for number, part in enumerate(ids)), [])  # type: ignore[misc]
    windows = [stream[start : start + WINDOW] for start in range(0, len(stream), WINDOW)]
    total = sum(nll(opened, one, len(one) - 1) for one in windows if len(one) > 1)
    check(one, total, sum(len(one) - 1 for one in windows))


def test_bf16_is_near(model: Path, text: Path) -> None:
    exact, rounded = (evaluated(model, text, dtype=dtype)["exits"][-1] for dtype in ("fp32", "bf16"))
    assert rounded["nll_per_token"] != exact["nll_per_token"]
    assert rounded["nll_per_token"] == pytest.approx(exact["nll_per_token"], rel=0.02)


@pytest.mark.slow
def test_any_number_of_processes_has_the_same_sum(model: Path, text: Path) -> None:
    one, two = (
        evaluated(model, text, protocol="hf-sliding", window=8, stride=3, batch_size=3, processes=many)["exits"][-1]
        for many in (1, 2)
    )
    assert two["tokens"] == one["tokens"] and two["nll_per_token"] == pytest.approx(one["nll_per_token"], rel=1e-9)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"protocol": "sliding"}, "--protocol sliding: known are blocks, hf-sliding, lm-eval-wikitext"),
        ({"stride": 4}, "--stride 4 has no meaning with --protocol blocks"),
        ({"bos": "always", "protocol": "hf-sliding"}, "--bos always has no meaning with --protocol hf-sliding"),
        ({"window": 4096}, f"--window 4096: the model takes {WINDOW} tokens at most"),
        ({"window": 1}, "--window 1: it must be 2 or more"),
        ({"protocol": "hf-sliding", "window": 8, "stride": 9}, "--stride 9: with a window of 8 some tokens"),
        ({"exit_block": 4}, "has 4 blocks: give 0 to 3"),
        ({"step": 10}, "is a model folder, which has no checkpoints"),
    ],
)
def test_what_does_not_go_together_is_said(model: Path, text: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)):
        evaluated(model, text, **options)


def test_a_folder_needs_a_text_and_has_to_be_one(model: Path, tmp_path: Path, text: Path) -> None:
    with pytest.raises(UserError, match="has no validation text: give one with --data"):
        evaluate_run(model)
    with pytest.raises(RunError, match=r"has no config\.yaml; nor a model folder: it has no config\.json"):
        evaluated(tmp_path, text)
    run = make_run(tmp_path, **{"model": FEW})
    with pytest.raises(UserError, match="--exit 2: .* has exits after the blocks 1, 3"):
        trained_model.find(run, None, 2)
