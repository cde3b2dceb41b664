"""A run's export: the folder that transformers opens is the run's model, bit for bit, with its tokenizer."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from saved_runs import FEW, TEXT, make_run, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.errors import RunError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.launcher import run as run_command

BOOKS = Path(__file__).parents[2] / "data" / "books"
STRANGE = "Two   spaces,\n\n\ttabs\r\n and e\u0301, ﬁ, ２, 😀, \u00a0\u3000x \u200b <s> </s> <unk> <0x41> [PAD] ...\n"
LLAMA = {"family": "llama", "num_key_value_heads": 2}


def input_ids(vocab_size: int, shape: tuple[int, int]) -> Tensor:
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize(
    ("chunks", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 3)], ids=["whole", "two", "greedy", "stages without heads"]
)
def test_the_exported_model_has_the_logits_of_the_run(
    model: dict[str, Any], chunks: int, pipeline: int, tmp_path: Path
) -> None:
    run = make_run(tmp_path, model=model, chunks=chunks, pipeline=pipeline)
    export_run(run, tmp_path / "out")
    own = trained_model.load(run, 10)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.dtype == torch.float32 and not exported.config.tie_word_embeddings
    for shape in ((3, 16), (1, 1), (2, 7)):
        ids = input_ids(own.blueprint.parts.vocab_size, shape)
        with torch.no_grad():
            for use_cache in (True, False):
                assert torch.equal(exported(ids, use_cache=use_cache).logits, own.logits(ids))
    assert own.logits(ids).std() > 0.1


def test_two_threads_give_the_same_bits_too(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    export_run(run, tmp_path / "out")
    ids = input_ids(259, (4, 16))
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        assert torch.equal(logits, trained_model.load(run, 10).logits(ids))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_from_a_tied_model_folder_exports_without_it(dtype: torch.dtype, tmp_path: Path) -> None:
    """Fine-tuned from a folder that is gone, trained in fp32 or bf16: the run has all that is needed."""
    before = make_run(tmp_path / "first", model={"family": "llama"})
    export_run(before, tmp_path / "pretrained")
    content = json.loads((tmp_path / "pretrained" / "config.json").read_text())
    (tmp_path / "pretrained" / "config.json").write_text(json.dumps(content | {"tie_word_embeddings": True}))
    model = {"pretrained": str(tmp_path / "pretrained"), **dict.fromkeys(FEW)}
    run = make_run(tmp_path / "second", model=model, tokenizer=str(tmp_path / "pretrained"), dtype=dtype)
    (tmp_path / "pretrained").rename(tmp_path / "gone")
    run = run.rename(tmp_path / "moved")
    export_run(run, tmp_path / "out")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = input_ids(259, (2, 16))
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, trained_model.load(run, 10).logits(ids))
    assert exported.dtype == torch.float32
    readout, embedding = exported.get_output_embeddings().weight, exported.get_input_embeddings().weight
    assert readout.data_ptr() != embedding.data_ptr() and not torch.equal(readout, embedding)


@pytest.mark.parametrize("model", [{}, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("tokenizer", ["bytes", "sentencepiece"])
def test_the_exported_tokenizer_gives_the_ids_of_the_run(model: dict[str, Any], tokenizer: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, model=model, tokenizer=tokenizer)
    export_run(run, tmp_path / "out")
    exported: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    own = load_tokenizer(run / "tokenizer")
    for text in (STRANGE, TEXT, "a", " leading"):
        assert exported(text, add_special_tokens=False).input_ids == own.encode(text).tolist()
    assert exported.decode(own.encode(TEXT)) == TEXT
    assert load_tokenizer(tmp_path / "out").fingerprint == own.fingerprint


def test_the_checkpoint_asked_for_is_exported(tmp_path: Path) -> None:
    run = make_run(tmp_path, updates=(10, 20))
    assert export_run(run, tmp_path / "newest") == 20
    assert export_run(run, tmp_path / "older", step=10) == 10
    ids = input_ids(259, (1, 16))
    logits = {}
    for name, update in (("newest", 20), ("older", 10)):
        with torch.no_grad():
            logits[update] = AutoModelForCausalLM.from_pretrained(tmp_path / name)(ids).logits
        assert torch.equal(logits[update], trained_model.load(run, update).logits(ids))
    assert not torch.equal(logits[10], logits[20])


def test_the_exported_folder_is_for_everybody_and_holds_no_more_than_a_model(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    export_run(run, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"} <= names
    assert not any(name.startswith(("model.json", "config.yaml", ".")) for name in names)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {(tmp_path / "texts" / "train.txt").stat().st_mode & 0o777}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["dtype"] == "float32" and config["use_cache"]
    ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out").generate(
        torch.tensor([[70, 71]]), max_new_tokens=3, do_sample=False
    )
    assert ids.shape[1] > 2


# ---- what is refused


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _without(path: Path, name: str) -> None:
    weights = checkpoint.load_file(path)
    del weights[name]
    checkpoint.save_file(weights, path)


def _stage(run: Path) -> Path:
    return checkpoint.stage_folder(run, 10, 1)


REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a folder that is not empty": (lambda run, out: write_text(out / "x", "x"), "is a folder that is not empty"),
    "a file": (lambda run, out: write_text(out, "x"), "is a file"),
    "no run": (lambda run, out: (run / "config.yaml").unlink(), "is no run folder"),
    "no checkpoint": (lambda run, out: (run / "checkpoints").rename(run / "x"), "holds no complete checkpoint"),
    "an incomplete one": (lambda run, out: (_stage(run) / "complete").unlink(), "holds no complete checkpoint"),
    "damaged weights": (lambda run, out: _damage(_stage(run) / "weights.safetensors"), "weights.safetensors cannot be"),
    "a missing tensor": (
        lambda run, out: _without(_stage(run) / "weights.safetensors", "head.norm.weight"),
        r"stage-1: .*head\.norm\.weight is missing in the checkpoint",
    ),
    "a damaged state": (lambda run, out: (_stage(run) / "state.json").write_text("{"), "state.json cannot be read"),
    "no tokenizer": (lambda run, out: (run / "tokenizer").rename(run / "x"), "has no folder tokenizer"),
    "no model": (lambda run, out: (run / "model.json").unlink(), "model.json cannot be read"),
    "another model": (
        lambda run, out: (run / "model.json").write_text((run / "model.json").read_text().replace("32", "64")),
        "do not fit the model",
    ),
    "a model of more blocks": (
        lambda run, out: (run / "model.json").write_text(
            (run / "model.json").read_text().replace('"n_layer": 4', '"n_layer": 5')
        ),
        r"hold the blocks \[0, 1, 2, 3\], but the model has 5",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(what: str, tmp_path: Path) -> None:
    spoil, message = REFUSED[what]
    run, out = make_run(tmp_path), tmp_path / "exports" / "out"
    spoil(run, out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match=message) as caught:
        export_run(run, out)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    before = sorted(tmp_path.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.GPT2LMHeadModel.save_pretrained", full)
    with pytest.raises(RunError, match="No space left"):
        export_run(run, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run_command(parser(), ["export", str(run), str(tmp_path / "out"), "--step", "7"])
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    message = f"{run} holds no complete checkpoint after 7 updates (--step): there are those after 10 updates"
    assert output.err == f"lptransformer: {message}; next: `python -m lptransformer export --help`\n"
    run_command(parser(), ["export", str(run), str(tmp_path / "out")])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}: the model of {run} after 10 updates\n"


# ---- train, export, train on


def _train(raw: dict[str, Any], *overrides: str) -> str:
    """What the process has printed."""
    from lptransformer.training.train import train

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train(load(raw, overrides))
    return printed.getvalue()


def test_a_start_that_harms_a_pretrained_model_says_so_once(pool: Pool, tmp_path: Path) -> None:
    export_run(make_run(tmp_path), tmp_path / "exported")
    raw: dict[str, Any] = {
        "model": {"pretrained": str(tmp_path / "exported")},
        "data": {"train": str(tmp_path / "texts" / "train.txt"), "sequence_length": 16, "cache": str(tmp_path / "c")},
        "parallel": {"pipeline": 2},
        "train": {"steps": 1, "micro_batch_size": 1, "micro_batches_per_update": 1, "lr_scheduler": "constant"},
        "run": {"dir": str(tmp_path / "one")},
    }
    first, second = pool.run(2, _train, raw)
    (line,) = [line for line in first.splitlines() if "heads are copied from it" in line]
    assert "train.learning_rate=1e-4" in line and "57 and 327" in line and "warning" not in second
    gentle = ("objective.name=backprop", "train.learning_rate=1e-4", f"run.dir={tmp_path / 'two'}")
    assert not any("warning" in printed for printed in pool.run(2, _train, raw, *gentle))


@pytest.mark.slow
def test_a_second_run_starts_from_the_export_and_gets_better_on_another_book(pool: Pool, tmp_path: Path) -> None:
    book = (BOOKS / "valid" / "wuthering-heights.txt").read_text(encoding="utf-8")
    novel = (BOOKS / "train" / "frankenstein.txt").read_text(encoding="utf-8")[:120_000]
    first_half = write_text(tmp_path / "first.txt", book[20_000:100_000])
    held_out = write_text(tmp_path / "held-out.txt", book[400_000:415_000])
    raw: dict[str, Any] = {
        "model": {"family": "gpt2", "hidden_size": 48, "num_layers": 4, "num_heads": 4},
        "data": {
            "train": str(write_text(tmp_path / "novel.txt", novel)),
            "valid": {"held-out": str(held_out)},
            "vocab_size": 400,
            "sequence_length": 64,
            "cache": str(tmp_path / "cache"),
        },
        "objective": {"chunks": 2},
        "train": {"steps": 150, "micro_batch_size": 8, "micro_batches_per_update": 1, "learning_rate": 3e-3},
        "run": {"dir": str(tmp_path / "one")},
    }
    pool.run(1, _train, raw)
    export_run(tmp_path / "one", tmp_path / "exported")
    raw["model"] = {"pretrained": str(tmp_path / "exported")}
    raw["data"] |= {"train": str(first_half)}
    del raw["data"]["vocab_size"]
    raw["run"] = {"dir": str(tmp_path / "two")}
    raw["train"] |= {"steps": 100, "learning_rate": 1e-3}
    pool.run(1, _train, raw)

    one, two = (evaluate_run(tmp_path / name) for name in ("one", "two"))
    assert one is not None and two is not None
    assert (one["step"], two["step"]) == (150, 100)
    assert one["exits"][0]["tokens"] == two["exits"][0]["tokens"]
    for before, after in zip(one["exits"], two["exits"], strict=True):
        assert after["perplexity"] < 0.97 * before["perplexity"] < 200

    rows = {name: read_metrics(tmp_path / name) for name in ("one", "two")}
    # The second run begins where the first one ended, on a book that is a little different; a new model has 6 nats.
    assert rows["two"][0]["stages"][-1]["loss"] < one["exits"][-1]["nll_per_token"] + 0.4
    assert rows["one"][0]["stages"][-1]["loss"] > 5.9
    # The evaluation at the end of training and the one from the checkpoint are the same.
    for name, results in (("one", one), ("two", two)):
        last = [row for row in rows[name] if "evaluation" in row][-1]
        for trained, exit in zip(last["exits"], results["exits"], strict=True):
            assert trained == pytest.approx(exit, rel=1e-6)
