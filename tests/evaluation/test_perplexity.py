"""Perplexity of every exit: the windows, the numbers, the texts, the processes."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from distributed import Pool
from families import TRAINED
from saved_runs import FEW, TEXT, WINDOW, make_run, rewrite, write_text
from small_chat import FORMS, save_tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer.__main__ import parser
from lptransformer.data.token_set import Batch
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import DataError, ModelError, RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.generate import open_source
from lptransformer.evaluation.perplexity import evaluate_run, print_evaluations, to_json
from lptransformer.run_folder import checkpoint, layout, saved_stage
from lptransformer.training.launcher import run as run_command

ROOT = Path(__file__).parents[2]
EXIT_KEYS = ["stage", "last_block", "head", "nll_per_token", "perplexity", "bits_per_byte", "byte_perplexity"]
EXIT_KEYS += ["word_perplexity", "tokens", "words", "bytes"]


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none stays."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two stages with a validation set, not to be changed."""
    return make_run(tmp_path_factory.mktemp("saved"), valid={"moor": TEXT})


def evaluated(run: Path, *args: Any, **options: Any) -> dict[str, Any]:
    results = evaluate_run(run, *args, **options)
    assert results is not None
    return results


def numbers_of(exit: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in exit.items() if name != "head"}


# ---- the numbers


@pytest.mark.parametrize("model", [{}, {"family": "llama"}], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [7, WINDOW, 3 * WINDOW + 5, 2 * WINDOW + 1, 10 * WINDOW])
def test_every_exit_is_what_transformers_computes_window_by_window(
    model: dict[str, str], tokens: int, tmp_path: Path
) -> None:
    """Independent of the package but for the weights: disjoint windows, labels=input_ids, one bare loop."""
    text = TEXT[:tokens]  # every character is a token
    run = make_run(tmp_path, model=model, valid={"moor": text})
    export_run(run, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    auxiliary = saved_stage.read_weights(checkpoint.stage_folder(run, 10, 0))
    ids = load_tokenizer(run / "tokenizer").encode(text).tolist()
    assert len(ids) == tokens
    sums, label_tokens = [0.0, 0.0], 0
    for start in range(0, tokens, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]])
        if window.shape[1] == 1:  # nothing follows, so there is nothing to predict
            continue
        with torch.no_grad():
            output = exported(window, labels=window, output_hidden_states=True)
        after_block_1 = output.hidden_states[2]
        if model:
            norm = F.rms_norm(after_block_1, (32,), auxiliary["head.norm.weight"], exported.config.rms_norm_eps)
        else:
            norm = F.layer_norm(after_block_1, (32,), auxiliary["head.norm.weight"], auxiliary["head.norm.bias"], 1e-5)
        logits = norm @ auxiliary["head.readout.weight"].T
        sums[0] += F.cross_entropy(logits[0, :-1], window[0, 1:], reduction="sum").item()
        sums[1] += output.loss.item() * (window.shape[1] - 1)
        label_tokens += window.shape[1] - 1

    results = evaluated(run, batch_size=3)
    assert [numbers["nll_per_token"] for numbers in results["exits"]] == pytest.approx(
        [one / label_tokens for one in sums], rel=1e-6
    )
    assert [numbers["tokens"] for numbers in results["exits"]] == [label_tokens] * 2


def test_the_four_numbers_and_what_they_were_taken_on(tmp_path: Path) -> None:
    text = "Ünïcödé wörds, föür höürs;  a\u3000b\n" * 5
    run = make_run(tmp_path, tokenizer="sentencepiece", valid={"umlauts": text})
    results = evaluated(run)
    assert {key: value for key, value in results.items() if key != "exits"} == {
        **{"run": str(run), "step": 10, "convention": "blocks", "window": WINDOW, "stride": WINDOW},
        **{"prefix": None, "dtype": "fp32", "set": "umlauts"},
    }
    tokens = len(load_tokenizer(run / "tokenizer").encode(text))
    assert tokens != len(text) != len(text.encode())
    places = [(one["stage"], one["last_block"], one["head"]) for one in results["exits"]]
    assert places == [(0, 1, "private"), (1, 3, "the model's own")]
    for one in results["exits"]:
        assert list(one) == EXIT_KEYS
        nll = one["nll_per_token"]
        assert one["perplexity"] == pytest.approx(math.exp(nll))
        assert one["bits_per_byte"] == pytest.approx(nll * tokens / len(text.encode()) / math.log(2))
        assert one["byte_perplexity"] == pytest.approx(2 ** one["bits_per_byte"])
        assert one["word_perplexity"] == pytest.approx(math.exp(nll * tokens / len(text.split())))


@pytest.mark.parametrize(
    ("chunks", "pipeline", "last_blocks"),
    [(1, 1, [3]), (4, 1, [0, 1, 2, 3]), (1, 2, [3]), (2, 4, [1, 3])],
    ids=["one head", "greedy", "a span over two stages", "two spans over four stages"],
)
def test_there_is_an_exit_for_every_stage_with_a_head(
    chunks: int, pipeline: int, last_blocks: list[int], tmp_path: Path
) -> None:
    run = make_run(tmp_path, chunks=chunks, pipeline=pipeline, valid={"moor": TEXT})
    assert [one["last_block"] for one in evaluated(run)["exits"]] == last_blocks


def test_the_batch_size_changes_nothing_but_rounding(saved: Path) -> None:
    results = [evaluated(saved, batch_size=size)["exits"] for size in (1, 3, 8, 1000)]
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert same["nll_per_token"] == pytest.approx(one["nll_per_token"], rel=1e-6)
            assert same["tokens"] == one["tokens"]


def test_the_weights_are_taken_in_fp32(tmp_path: Path) -> None:
    """bf16 weights give fp32 logits: the numbers of the same weights stored as fp32, to the last bit."""
    run = make_run(tmp_path, valid={"moor": TEXT}, dtype=torch.bfloat16)
    model = trained_model.load(run, 10)
    assert model.logits(torch.tensor([[5, 6, 7]])).dtype == torch.float32
    before = evaluated(run)
    for folder in saved_stage.folders(run, 10):
        assert {weight.dtype for weight in saved_stage.read_weights(folder).values()} == {torch.bfloat16}
        rewrite(folder, lambda weights: {name: weight.float() for name, weight in weights.items()})
    assert evaluated(run) == before


def test_the_logits_of_a_whole_batch_are_those_of_the_losses(saved: Path) -> None:
    model = trained_model.load(saved, 10)
    ids = torch.arange(3, 3 + WINDOW)[None]
    loss = F.cross_entropy(model.logits(ids)[0, :-1], ids[0, 1:], reduction="sum").item()
    labels = F.pad(ids[:, 1:], (0, 1), value=-100)
    nlls = trained_model.token_nlls(model.groups, [Batch(ids, labels)], model.device)
    assert nlls.shape == (2, WINDOW - 1) and nlls[-1].sum().item() == pytest.approx(loss, rel=1e-6)


# ---- which text


def test_the_newest_complete_checkpoint_or_the_one_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path, valid={"moor": TEXT}, updates=(10, 20, 30))
    (checkpoint.folder_of(run, 30) / checkpoint.COMPLETE).unlink()
    newest, older = evaluated(run), evaluated(run, step=10)
    assert (newest["step"], older["step"]) == (20, 10) and newest["exits"] != older["exits"]
    with pytest.raises(RunError, match=r"after 30 updates \(--step\): there are those after 10, 20 updates"):
        evaluate_run(run, step=30)


def test_given_texts_instead_of_the_runs_own(saved: Path, tmp_path: Path, scratch: Path) -> None:
    """Raw text, jsonl, csv, a glob over two files and a prepared set, all of the same text."""
    expected = evaluated(saved)["exits"]
    plain = write_text(tmp_path / "some where" / "moor no. 1.txt", TEXT)
    lines = write_text(tmp_path / "moor.jsonl", json.dumps({"text": TEXT}) + "\n")
    cells = write_text(tmp_path / "cells.csv", f'id,text\n7,"{TEXT}"\n')
    prepared = json.loads((saved / "data.json").read_text())["valid"]["moor"]
    for data, name in ((plain, "moor-no.-1"), (lines, "moor"), (cells, "cells"), (prepared, "moor")):
        results = evaluated(saved, [str(data)])
        assert results["exits"] == expected and results["set"] == name and "sets" not in results

    half = len(TEXT) // 2
    write_text(tmp_path / "halves" / "1.txt", TEXT[:half])
    write_text(tmp_path / "halves" / "2.txt", TEXT[half:])
    both = evaluated(saved, [str(tmp_path / "halves" / "*.txt")])
    assert (
        both["exits"][0]["tokens"]
        == evaluated(saved, [str(write_text(tmp_path / "x", TEXT + "."))])["exits"][0]["tokens"]
    )  # a token stands between two documents
    assert both["set"] == "data"
    assert not list(scratch.iterdir())


def test_of_examples_the_answers_alone_are_scored(tmp_path: Path, scratch: Path) -> None:
    """The run's own set, which is held out, the same one after its token set has gone, and the file as a text."""
    pairs = [(f"ask {number}?", "so it is"[number:]) for number in range(3)]
    lines = "".join(json.dumps({"prompt": one, "completion": two}) + "\n" for one, two in pairs)
    file = write_text(tmp_path / "pairs.jsonl", lines)
    run = make_run(tmp_path, data={"train": str(file), "valid": 0.4})
    export_run(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    def expected(of: list[tuple[str, str]]) -> float:
        nlls = []
        for prompt, answer in of:
            ids = torch.tensor([[*(byte + 3 for byte in (prompt + answer).encode()), 1]])
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            with torch.no_grad():
                nlls += [model(ids, labels=labels).loss.item()] * (len(answer) + 1)
        return sum(nlls) / len(nlls)

    own = evaluated(run, batch_size=2)
    assert own["set"] == "valid" and own["exits"][-1]["tokens"] == 9 + 7  # the first and the third
    assert own["exits"][-1]["nll_per_token"] == pytest.approx(expected([pairs[0], pairs[2]]), rel=1e-6)
    shutil.rmtree(tmp_path / "cache")
    assert evaluated(run, batch_size=2) == own
    whole = evaluated(run, [str(file)])["exits"][-1]
    assert whole["nll_per_token"] == pytest.approx(expected(pairs), rel=1e-6) and whole["tokens"] == 9 + 8 + 7
    with pytest.raises(UserError, match="pairs holds examples with answers: that is for --protocol blocks"):
        evaluate_run(run, [str(file)], protocol="hf-sliding")
    with pytest.raises(UserError, match="pairs holds examples with answers: models are compared on the bytes of a te"):
        evaluate_run(run, [str(file)], compare=run)
    assert not list(scratch.iterdir())


def test_texts_are_read_and_windowed_as_the_run_was_trained(tmp_path: Path) -> None:
    """Documents kept apart, a column of another name, a begin-of-text token; a prepared set of them too."""
    texts = "".join(json.dumps({"body": TEXT[:many]}) + "\n" for many in (40, 25, 60, 31))
    file, chatml = write_text(tmp_path / "texts.jsonl", texts), str(save_tokenizer(tmp_path / "chatml", "chatml"))
    data = {"train": str(file), "valid": {"own": str(file)}, "fields": {"text": "body"}, "tokenizer": chatml}
    run = make_run(tmp_path, data={**data, "isolate_documents": True, "bos": "always"})
    own, given = evaluated(run), evaluated(run, [str(file)])
    (prepared,) = layout.read_data(run)["valid"].values()
    for one in (given, evaluated(run, [prepared])):
        assert one["exits"] == own["exits"] and one["prefix"] == own["prefix"] == "<|endoftext|>"
    assert open_source(run).begin == (0,)
    with pytest.raises(UserError, match="texts: its documents are kept apart, as in training: models are compared"):
        evaluate_run(run, [str(file)], compare=run)


def test_a_family_that_leaks_does_not_score_conversations(tmp_path: Path) -> None:
    file = write_text(tmp_path / "pairs.jsonl", json.dumps({"prompt": "a", "completion": "b"}))
    config = type(TRAINED["OPT"])(**TRAINED["OPT"].to_dict() | {"vocab_size": 259})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    run = make_run(tmp_path, model={"pretrained": str(tmp_path / "model"), **dict.fromkeys(FEW)})
    with pytest.raises(ModelError, match="OPTForCausalLM does not keep the documents of a window apart"):
        evaluate_run(run, [str(file)])


def test_a_model_folder_on_conversations_of_any_form(tmp_path: Path) -> None:
    """Nobody says which fields there are; the answers are scored as the library scores them."""
    chatml = str(save_tokenizer(tmp_path / "chatml", "chatml"))
    run = make_run(tmp_path, model={"max_position_embeddings": 80}, tokenizer=chatml)
    export_run(run, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    messages = FORMS["messages"]["messages"]
    asked, whole = (
        tokenizer.apply_chat_template(some, tokenize=True, return_dict=False, add_generation_prompt=ask)
        for some, ask in ((messages[:1], True), (messages, False))
    )
    end = whole.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), len(asked)) + 1
    labels = torch.full((1, len(whole)), -100)
    labels[0, len(asked) : end] = torch.tensor(whole[len(asked) : end])
    with torch.no_grad():
        wanted = model(torch.tensor([whole]), labels=labels).loss.item()
    for name, row in FORMS.items():
        file = write_text(tmp_path / f"{name}.jsonl", json.dumps(row))
        for place in (tmp_path / "out", run):
            found = evaluated(place, [str(file)], window=80)["exits"][-1]
            assert found["nll_per_token"] == pytest.approx(wanted, rel=1e-6), (name, place)
            assert found["tokens"] == end - len(asked)


def test_several_sets(tmp_path: Path) -> None:
    run = make_run(tmp_path, valid={"moor": TEXT, "reversed": TEXT[::-1]})
    alone = {name: evaluated(run, [str(tmp_path / "texts" / f"{name}.txt")]) for name in ("moor", "reversed")}
    results = evaluated(run)
    assert results["set"] == "moor" and results["exits"] == alone["moor"]["exits"]
    assert results["sets"] == {name: {"exits": one["exits"]} for name, one in alone.items()}
    given = evaluated(run, [str(tmp_path / "texts" / f"{name}.txt") for name in ("reversed", "moor", "moor")])
    assert list(given["sets"]) == ["reversed", "moor", "moor-2"] and given["set"] == "reversed"
    assert given["sets"]["moor"] == given["sets"]["moor-2"] == results["sets"]["moor"]


def test_a_run_that_was_moved_and_whose_token_sets_are_gone(tmp_path: Path, scratch: Path) -> None:
    run = make_run(tmp_path, valid={"moor": TEXT})
    expected = evaluated(run)["exits"]
    shutil.rmtree(tmp_path / "cache")
    run = run.rename(tmp_path / "moved")
    assert evaluated(run)["exits"] == expected  # its texts are still there
    assert not (tmp_path / "cache").exists() and not list(scratch.iterdir())

    write_text(tmp_path / "texts" / "moor.txt", TEXT[::-1])
    with pytest.raises(DataError, match=r"moor\.txt\) has changed since: give a text with --data"):
        evaluate_run(run)
    (tmp_path / "texts" / "moor.txt").unlink()
    with pytest.raises(DataError, match=r"no file matches .*moor\.txt\): give a text with --data"):
        evaluate_run(run)
    assert evaluated(run, [str(write_text(tmp_path / "again.txt", TEXT))])["exits"] == expected


# ---- in several processes


def test_two_processes_agree_with_one(saved: Path, capfd: pytest.CaptureFixture[str], scratch: Path) -> None:
    one = evaluated(saved, batch_size=3)
    two = evaluated(saved, batch_size=3, processes=2)
    assert two == one  # to the bit: what is added up, and in which order, is the same
    assert capfd.readouterr() == ("", "") and not list(scratch.iterdir())


def _evaluate_here(run: str, data: list[str] | None, batch_size: int) -> dict[str, Any] | None:
    return evaluate_run(Path(run), data, batch_size=batch_size)


def test_under_a_launcher_the_first_process_has_the_result(saved: Path, pool: Pool, tmp_path: Path) -> None:
    expected = evaluated(saved, batch_size=2)["exits"]
    first, second = pool.run(2, _evaluate_here, str(saved), None, 2)
    assert second is None and first["exits"] == expected
    given = [str(write_text(tmp_path / "moor.txt", TEXT))]
    first, second = pool.run(2, _evaluate_here, str(saved), given, 1000)  # one batch for two processes
    assert second is None and first["set"] == "moor"
    assert first["exits"][0]["tokens"] == expected[0]["tokens"]


def test_a_launcher_and_another_number_of_processes_contradict_each_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--processes 3, but a launcher has started 2"):
        evaluate_run(saved, processes=3)


@pytest.mark.slow
def test_damage_is_one_message_in_several_processes_too(tmp_path: Path, scratch: Path) -> None:
    run = make_run(tmp_path, valid={"moor": TEXT})
    _truncate(checkpoint.stage_folder(run, 10, 1) / saved_stage.WEIGHTS)
    with pytest.raises(RunError, match="weights.safetensors is damaged"):
        evaluate_run(run, processes=2)
    assert not list(scratch.iterdir())


def _command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lptransformer", "evaluate", *map(str, arguments)]


@pytest.mark.slow
def test_torchrun(saved: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--master-port", "29876", "--nproc-per-node", "2", "-m"]
    torchrun.append("lptransformer")
    command = [*torchrun, "evaluate", str(saved), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    for one, same in zip(evaluated(saved)["exits"], json.loads(line)["exits"], strict=True):
        assert numbers_of(same) == pytest.approx(numbers_of(one), rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL], ids=["SIGINT", "SIGKILL"])
def test_processes_end_with_the_first_one(signum: int, tmp_path: Path) -> None:
    """Ctrl-C reaches all of them, and says nothing; what happens to the first one alone ends the others too."""
    run = make_run(tmp_path, valid={"moor": TEXT * 400})
    command = _command(run, "--processes", 3, "--batch-size", 1)
    environment = {**os.environ, "TMPDIR": str(tmp_path)}  # a process that is killed cannot tidy up

    def as_in_a_terminal() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs the tests may have Ctrl-C ignored

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=as_in_a_terminal,
    )
    family: list[psutil.Process] = []
    while process.poll() is None and sum(child.cpu_times().user > 4 for child in family) < 2:
        family = [one for one in psutil.Process(process.pid).children() if "spawn_main" in " ".join(one.cmdline())]
        time.sleep(0.1)
    assert process.poll() is None, "it ended before it could be stopped: make the text longer"
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)
    else:
        process.kill()
    _, error = process.communicate(timeout=30)
    assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert "Traceback" not in error
    assert not psutil.wait_procs(family, timeout=10)[1]


# ---- what is printed, and what is refused


def test_json_is_one_strict_object(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(parser(), ["evaluate", str(saved), "--json"])
    output = capsys.readouterr()
    results = json.loads(output.out)
    assert output.err == "" and output.out.count("\n") == 1
    assert results == evaluated(saved) and [list(one) for one in results["exits"]] == [EXIT_KEYS] * 2
    too_large = {**results, "exits": [{**results["exits"][0], "word_perplexity": math.inf, "perplexity": math.nan}]}
    (exit,) = json.loads(to_json(too_large), parse_constant=lambda name: pytest.fail(name))["exits"]
    assert (exit["word_perplexity"], exit["perplexity"]) == ("Infinity", "NaN")


def test_the_table_says_all_that_the_numbers_depend_on(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluated(saved)
    run_command(parser(), ["evaluate", str(saved)])
    title, header, _, *rows = capsys.readouterr().out.splitlines()
    for word in ("moor", "after 10 updates", "blocks", "window 16", "stride 16", "prefix none"):
        assert word in title
    assert header.split("  ")[0] == "exit after block" and len(rows) == 2
    for row, one in zip(rows, results["exits"], strict=True):
        block, head, *counts, nll, perplexity, bits, in_bytes, words = re.split(r"  +", row.strip())
        assert (int(block), head) == (one["last_block"], one["head"])
        assert [*map(int, counts)] == [one["tokens"], one["words"]] and one["words"] == len(TEXT.split())
        assert in_bytes == f"{one['byte_perplexity']:,.3f}"
        assert nll == f"{one['nll_per_token']:.3f}" and perplexity == f"{one['perplexity']:,.3f}"
        assert bits == f"{one['bits_per_byte']:.3f}" and words == f"{one['word_perplexity']:,.3f}"
    print_evaluations({**results, "sets": {"a": results, "b": results}})
    assert capsys.readouterr().out.count("bits per byte") == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _other_window(folder: Path) -> list[str]:
    """A set that was prepared for another run."""
    other = make_run(folder / "other", tokenizer="sentencepiece", valid={"moor": TEXT})
    return ["--data", json.loads((other / "data.json").read_text())["valid"]["moor"]]


def _text(folder: Path, content: bytes) -> list[str]:
    (folder / "given.txt").write_bytes(content)
    return ["--data", str(folder / "given.txt")]


REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "no run": (lambda run, folder: shutil.rmtree(run), "is no run folder: it has no config.yaml"),
    "no checkpoint": (lambda run, folder: shutil.rmtree(run / "checkpoints"), "holds no complete checkpoint"),
    "damaged weights": (
        lambda run, folder: _truncate(checkpoint.stage_folder(run, 10, 0) / saved_stage.WEIGHTS),
        "weights.safetensors is damaged",
    ),
    "damaged data.json": (lambda run, folder: (run / "data.json").write_text("[]"), "data.json cannot be read"),
    "unknown step": (lambda run, folder: ["--step", "11"], "after 11 updates (--step)"),
    "no batch": (lambda run, folder: ["--batch-size", "0"], "--batch-size 0: it must be 1 or more"),
    "no processes": (lambda run, folder: ["--processes", "-1"], "--processes -1: it must be 1 or more"),
    "no such text": (lambda run, folder: ["--data", str(folder / "no*.txt")], "--data: no file matches"),
    "a folder that is no set": (lambda run, folder: ["--data", str(folder)], "without a complete token set"),
    "an empty text": (lambda run, folder: _text(folder, b""), "given.txt: the file is empty"),
    "not UTF-8": (lambda run, folder: _text(folder, b"abc\xff\xfe"), "not UTF-8 text: the byte at offset 3"),
    "one token": (lambda run, folder: _text(folder, b"a"), "given: 1 tokens are too few"),
    "another tokenizer": (lambda run, folder: _other_window(folder), "prepared with another tokenizer"),
    "an override": (lambda run, folder: ["--train.steps=3"], "takes no such argument"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_evaluated_is_one_message_and_exit_code_2(
    what: str, tmp_path: Path, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = REFUSED[what]
    run = make_run(tmp_path, valid={"moor": TEXT})
    more = spoil(run, tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_command(parser(), ["evaluate", str(run), *(more if isinstance(more, list) else [])])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""
    assert not list(scratch.iterdir())


def test_a_run_without_validation_sets_asks_for_a_text(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"without validation sets \(data.valid\): give a text with --data"):
        evaluate_run(make_run(tmp_path))
