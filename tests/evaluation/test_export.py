"""A run's export: the folder that transformers opens is the run's model, bit for bit, with its tokenizer."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from distributed import Pool
from families import TRAINED
from overlays import overlay
from safetensors.torch import load_file
from saved_runs import FEW, TEXT, make_run, rewrite, write_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lptransformer.__main__ import parser
from lptransformer.config.load import load
from lptransformer.data.tokenizer import load as load_tokenizer
from lptransformer.engine.process_groups import leave
from lptransformer.errors import ModelError, RunError, UserError
from lptransformer.evaluation import trained_model
from lptransformer.evaluation.export import export_run
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.models import exits
from lptransformer.models.stage import make_stage
from lptransformer.run_folder import checkpoint, layout
from lptransformer.run_folder.metrics_log import read_metrics
from lptransformer.training.launcher import run as run_command

BOOKS = Path(__file__).parents[2] / "data" / "books"
STRANGE = "Two   spaces,\n\n\ttabs\r\n and e\u0301, ﬁ, ２, 😀, \u00a0\u3000x \u200b <s> </s> <unk> <0x41> [PAD] ...\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_run_of_every_family_exports_with_its_logits(name: str, tmp_path: Path) -> None:
    config = copy.deepcopy(TRAINED[name])
    config.vocab_size = 260
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    model = {"pretrained": str(tmp_path / "model"), **dict.fromkeys(FEW)}
    run = make_run(tmp_path, model=model, tokenizer="bytes")
    export_run(run, tmp_path / "out")
    exported, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), input_ids(260, (2, 16))
    with torch.no_grad():
        assert torch.equal(exported.eval()(ids).logits, trained_model.load(run, 10).logits(ids))


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
    assert export_run(run, tmp_path / "newest").update == 20
    assert export_run(run, tmp_path / "older", step=10).update == 10
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


# ---- nothing is lost

CHAT = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}"
GENERATION = {"eos_token_id": [0, 5], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
ROTARY = {"rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0}
ROTARY |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8}


def pretrained_folder(folder: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
    """A tied Llama as people have one: bf16, with generation settings, dropout and a chat template of its own."""
    export_run(make_run(folder / "first", model=LLAMA), folder / "made")
    content = json.loads((folder / "made" / "config.json").read_text()) | {"tie_word_embeddings": True, **config}
    (folder / "made" / "config.json").write_text(json.dumps(content))
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "made", dtype=dtype)
    model.lm_head.weight = model.model.embed_tokens.weight
    out = folder / "pretrained"
    model.save_pretrained(out)
    load_tokenizer(folder / "made").save(out)
    saved = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(saved | {"attention_dropout": 0.1}))
    (out / "generation_config.json").write_text(json.dumps(GENERATION))
    (out / "chat_template.jinja").write_text(CHAT)
    return out


def fine_tuned(folder: Path, pretrained: Path, *, shaken: bool = True, **options: Any) -> Path:
    """A run from a model folder; without `shaken` its checkpoint has the folder's weights as they are."""
    model = {"pretrained": str(pretrained), **dict.fromkeys(FEW)}
    run = make_run(folder / "second", model=model, tokenizer=str(pretrained), **options)
    if not shaken:
        blueprint = trained_model.blueprint_of(run)
        for plan in blueprint.stages:
            stage = make_stage(plan, blueprint, seed=0, pretrained=pretrained)
            rewrite(checkpoint.stage_folder(run, 10, plan.index), lambda weights, made=stage: made.state_dict())
    return run


def test_what_the_model_folder_had_comes_back(tmp_path: Path) -> None:
    pretrained = pretrained_folder(tmp_path)
    run = fine_tuned(tmp_path, pretrained)
    pretrained.rename(tmp_path / "gone")
    exported = export_run(run, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == GENERATION
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_dropout"] == 0.1 and config["dtype"] == "bfloat16" and config["use_cache"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [0, 5]
    opened: Any = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert opened.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "user: a"
    assert opened.eos_token == AutoTokenizer.from_pretrained(tmp_path / "gone").eos_token  # type: ignore[attr-defined]
    (rounding,) = [note for note in exported.notes if "rounding to bf16" in note]
    assert float(rounding.partition(" by up to ")[2].split()[0]) > 0


@pytest.mark.parametrize(("dtype", "name"), [("fp32", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_the_dtype_that_is_asked_for(dtype: str, name: str, tmp_path: Path) -> None:
    exported = export_run(make_run(tmp_path), tmp_path / "out", dtype=dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == name
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{name}"}
    assert bool(exported.notes) == (dtype != "fp32")


def test_what_was_tied_and_still_is_equal_is_tied(tmp_path: Path) -> None:
    run = fine_tuned(tmp_path, pretrained_folder(tmp_path, torch.float32), shaken=False)
    assert export_run(run, tmp_path / "auto").notes == ()
    assert export_run(run, tmp_path / "keep", tie="keep").notes == ()
    export_run(run, tmp_path / "separate", tie="separate")
    for name, tied in (("auto", True), ("keep", True), ("separate", False)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert model.config.tie_word_embeddings is tied
        same = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        assert same is tied and ("lm_head.weight" in load_file(tmp_path / name / "model.safetensors")) != tied


def test_what_was_trained_apart_is_not_tied_again(tmp_path: Path) -> None:
    run = fine_tuned(tmp_path, pretrained_folder(tmp_path, torch.float32))
    (note,) = export_run(run, tmp_path / "auto").notes
    assert "are two now (they differ by up to" in note and "MB more" in note
    with pytest.raises(ModelError, match=r"--tie keep: embedding and readout differ by up to \d\.\d+"):
        export_run(run, tmp_path / "keep", tie="keep")
    assert not (tmp_path / "keep").exists()


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lptransformer.evaluation.export.SHARD", "40KB")
    run = make_run(tmp_path)
    export_run(run, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    ids = input_ids(259, (1, 16))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert torch.equal(logits, trained_model.load(run, 10).logits(ids))


def test_the_card_says_what_was_trained_and_measured(tmp_path: Path) -> None:
    run = make_run(tmp_path, valid={"held-out": TEXT}, tokenizer="sentencepiece")
    row = {"stage": 1, "last_block": 3, "nll_per_token": 2.0, "perplexity": 7.39, "bits_per_byte": 2.885}
    evaluated = {"update": 10, "evaluation": "held-out", "exits": [{**row, "word_perplexity": 9.0, "tokens": 99}]}
    (run / "metrics.jsonl").write_text(json.dumps(evaluated) + "\n")
    export_run(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    measured = "disjoint windows of 16 tokens, no prefix:"
    facts = ("| held-out | 7.39 | 2.885 | 99 |", "| updates | 10 |", "chunked, 2 stages", "sequence_length: 16")
    for part in (*facts, measured):
        assert part in card
    config = (run / layout.CONFIG).read_text()
    (run / layout.CONFIG).write_text(config.replace("bos: auto", "bos: always"))
    export_run(run, tmp_path / "prefixed")
    assert "of 16 tokens, `<s>` before every document:" in (tmp_path / "prefixed" / "README.md").read_text()


@pytest.mark.slow
def test_a_run_ends_with_its_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one command; a folder that is taken is refused before anything is trained."""
    run_command(parser(), ["train", "c.yaml", "--run.export=out"])
    leave()
    assert "out: the model of run after 2 updates" in capsys.readouterr().out
    ids = input_ids(259, (1, 16))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained("out")(ids).logits
    assert torch.equal(logits, trained_model.load(Path("run"), 2).logits(ids))
    with pytest.raises(SystemExit) as end:
        run_command(parser(), ["train", "c.yaml", "--run.export=out", "--run.dir=again"])
    assert end.value.code == 2 and "run.export is out" in capsys.readouterr().err and not Path("again").exists()


# ---- exits

HEADS = {
    "private": {},
    "low_rank": {"kind": "low_rank", "rank": 8},
    "shared": {"kind": "shared"},
    "blocks": {"blocks": 2},
    "averaged blocks": {"kind": "shared", "blocks": 1, "ema_decay": 0.5},
}


@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_an_exit_is_a_shorter_model(head: dict[str, Any], tmp_path: Path) -> None:
    run = make_run(tmp_path, model=LLAMA, head=head, chunks=4)
    export_run(run, tmp_path / "out", exit_block=1)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert exported.config.num_hidden_layers == 2 + head.get("blocks", 0)
    own, ids = trained_model.load(run, 10), input_ids(259, (2, 16))
    with torch.no_grad():
        hidden = own.stages[1].hidden_states(own.stages[0].hidden_states(ids))
        expected, found = own.stages[1].head.logits(hidden), exported(ids).logits  # type: ignore[union-attr]
    assert torch.allclose(found, expected, atol=1e-5) and (torch.equal(found, expected) or "kind" in head)
    assert not torch.allclose(found, own.logits(ids), atol=1e-2)


def test_an_exit_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--exit 2: the run has exits after the blocks 1, 3"):
        export_run(make_run(tmp_path), tmp_path / "out", exit_block=2)
    assert not (tmp_path / "out").exists()


def test_exits_are_kept_beside_the_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, head={"blocks": 1}, chunks=4)
    export_run(run, tmp_path / "out", keep_exits=True)
    kept, own = load_file(tmp_path / "out" / exits.FILE), trained_model.load(run, 10)
    for stage in own.stages[:-1]:
        assert stage.head is not None
        for name, tensor in stage.head.state_dict().items():
            assert torch.equal(kept.pop(f"{stage.plan.last_block}.{name}"), tensor)
    assert not kept
    ids = input_ids(259, (1, 16))
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits, own.logits(ids))


# ---- transformers 4

OPEN = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer(text, add_special_tokens=False).input_ids
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
with torch.no_grad():
    logits = model(torch.tensor([ids[:16]])).logits
torch.save(logits, folder + ".logits")
print(json.dumps([transformers.__version__, ids, tokenizer.decode(ids), tokenizer.all_special_tokens]))
"""


@pytest.fixture(scope="session")
def older_transformers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return overlay("transformers-4", tmp_path_factory.mktemp("transformers-4"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "tokenizer"),
    [({}, "bytes"), (LLAMA, "sentencepiece"), (LLAMA, "bytes"), ("llama3", "bytes")],
    ids=["gpt2", "llama", "llama bytes", "llama3 rotary"],
)
def test_transformers_4_opens_it_with_the_same_ids_and_logits(
    model: Any, tokenizer: str, tmp_path: Path, older_transformers: Path
) -> None:
    if model == "llama3":
        pretrained = pretrained_folder(tmp_path, torch.float32, rope_parameters=ROTARY)
        run = fine_tuned(tmp_path, pretrained)
    else:
        run = make_run(tmp_path, model=model, tokenizer=tokenizer)
    out = tmp_path / "out"
    export_run(run, out)
    ask = [sys.executable, "-c", OPEN, str(out), STRANGE]
    done = subprocess.run(
        ask, env={**os.environ, "PYTHONPATH": str(older_transformers)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    version, ids, decoded, special = json.loads(done.stdout.splitlines()[-1])
    own: Any = AutoTokenizer.from_pretrained(out)
    assert version == "4.57.6" and ids == load_tokenizer(run / "tokenizer").encode(STRANGE).tolist()
    assert decoded == own.decode(ids) and sorted(special) == sorted(own.all_special_tokens)
    with torch.no_grad():
        expected = trained_model.load(run, 10).logits(torch.tensor([ids[:16]]))
    assert torch.allclose(torch.load(f"{out}.logits"), expected, atol=1e-5)


# ---- what is refused


def _damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def _without(folder: Path, name: str) -> None:
    rewrite(folder, lambda weights: {other: one for other, one in weights.items() if other != name})


def _stage(run: Path) -> Path:
    return checkpoint.stage_folder(run, 10, 1)


REFUSED: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a folder that is not empty": (lambda run, out: write_text(out / "x", "x"), "is a folder that is not empty"),
    "a file": (lambda run, out: write_text(out, "x"), "is a file"),
    "no run": (lambda run, out: (run / "config.yaml").unlink(), "is no run folder"),
    "no checkpoint": (lambda run, out: (run / "checkpoints").rename(run / "x"), "holds no complete checkpoint"),
    "an incomplete one": (lambda run, out: (_stage(run).parent / "complete").unlink(), "holds no complete checkpoint"),
    "damaged weights": (
        lambda run, out: _damage(_stage(run) / "weights.safetensors"),
        "weights.safetensors is damaged",
    ),
    "a missing tensor": (
        lambda run, out: _without(_stage(run), "head.norm.weight"),
        r"stage-1: .*head\.norm\.weight is missing in the checkpoint",
    ),
    "a damaged state": (lambda run, out: (_stage(run) / "state.json").write_text("{"), "state.json is damaged"),
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
    (tmp_path / ".unfinished-out-0123456789ab").mkdir()  # of one that was killed

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


def test_adapters_alone_are_of_a_run_that_has_some(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(make_run(tmp_path))
    for words, says in (([], "has none (lora.rank is null)"), (["--exit=1"], "--tie, --dtype and exits go without it")):
        with pytest.raises(SystemExit) as end:
            run_command(parser(), ["export", run, str(tmp_path / "out"), "--adapter", *words])
        assert end.value.code == 2 and says in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_start_that_harms_a_pretrained_model_says_so_once(pool: Pool, tmp_path: Path) -> None:
    export_run(make_run(tmp_path), tmp_path / "exported")
    raw: dict[str, Any] = {
        "model": {"pretrained": str(tmp_path / "exported")},
        "data": {"train": str(tmp_path / "texts" / "train.txt"), "sequence_length": 16, "cache": str(tmp_path / "c")},
        "parallel": {"pipeline": 2},
        "train": {"steps": 1, "micro_batch_size": 1, "micro_batches_per_update": 1, "lr_scheduler": "constant"},
        "run": {"dir": str(tmp_path / "one")},
    }
    first, second = pool.run(2, _train, raw, "head.kind=private", "train.learning_rate=1e-3")
    (line,) = [line for line in first.splitlines() if "heads are copied from it" in line]
    assert "train.learning_rate=1e-4" in line and "57 and 327" in line and "warning" not in second
    first, second = pool.run(2, _train, raw, f"run.dir={tmp_path / 'two'}")
    assert "warning" not in first + second and "By backprop" not in second
    said = " ".join(first.split())
    assert (
        "chunked, losses over [2, 2] blocks, heads fitted, 1 blocks; learning rate 0.0001, constant, warm-up 0" in said
    )
    assert "weight decay 0. By backprop: objective.name=backprop" in said and "cross" not in said
    gentle = ("objective.name=backprop", f"run.dir={tmp_path / 'three'}")
    (first, second) = pool.run(2, _train, raw, *gentle)
    said = " ".join(first.split())
    assert "warning" not in first + second and "backprop, losses over [4] blocks; learning rate 0.0001" in said
    assert "gradients cross from rank to rank behind the blocks [1]" in said


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
    before, after = (found["exits"][-1]["perplexity"] for found in (one, two))  # the first exit has another head
    assert after < 0.9 * before < 100

    rows = {name: read_metrics(tmp_path / name) for name in ("one", "two")}
    # The second run begins where the first one ended, on a book that is a little different; a new model has 6 nats.
    first, second = (
        next(row for row in rows[name] if "stages" in row)["stages"][-1]["loss"] for name in ("one", "two")
    )
    assert second < one["exits"][-1]["nll_per_token"] + 0.4 and first > 5.9
    # The evaluation at the end of training and the one from the checkpoint are the same.
    for name, results in (("one", one), ("two", two)):
        last = [row for row in rows[name] if "evaluation" in row][-1]
        for trained, exit in zip(last["exits"], results["exits"], strict=True):
            assert trained == pytest.approx({key: exit[key] for key in trained}, rel=1e-6)


# ---- ends that stay one matrix


@pytest.mark.parametrize("keys", ["model.tie=keep", "train.freeze=[model.embed_tokens.*, lm_head.*]"])
def test_a_model_that_stayed_tied_comes_back_tied(keys: str, pool: Pool, tmp_path: Path) -> None:
    """The checkpoint holds both ends, equal: every reader of a run finds them under their names."""
    export_run(make_run(tmp_path / "first", model={"family": "llama"}), tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "model")
    text = str(tmp_path / "first" / "texts" / "train.txt")
    raw: dict[str, Any] = {
        "model": {"pretrained": str(tmp_path / "model")},
        "data": {"train": text, "valid": text, "sequence_length": 16, "cache": str(tmp_path / "c")},
        "objective": {"name": "backprop"},
        "train": {"steps": 2, "micro_batch_size": 2, "micro_batches_per_update": 1, "lr_scheduler": "constant"},
        "run": {"dir": str(tmp_path / "run")},
    }
    pool.run(1, _train, raw, keys)
    assert export_run(tmp_path / "run", tmp_path / "out").notes == ()
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    readout, embedding = exported.get_output_embeddings().weight, exported.get_input_embeddings().weight
    assert exported.config.tie_word_embeddings and readout.data_ptr() == embedding.data_ptr()
    assert torch.equal(embedding, model.get_input_embeddings().weight) == ("freeze" in keys)
    ids = input_ids(259, (2, 16))
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, trained_model.load(tmp_path / "run", 2).logits(ids))
    evaluated = evaluate_run(tmp_path / "run")
    *_, row = (row for row in read_metrics(tmp_path / "run") if "evaluation" in row)
    assert evaluated is not None
    assert evaluated["exits"][0]["perplexity"] == pytest.approx(row["exits"][0]["perplexity"], rel=1e-6)
