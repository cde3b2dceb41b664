"""The commands as a person meets them: what works, and one clear message for what does not.

Messages of the configuration itself are in config/test_config.py, of text files in data/test_data.py; here is each kind
of bad input once through the command line, with its exit code, and what must not be left behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_run
import yaml
from small_chat import save_tokenizer
from small_run import CONFIG, TEXT
from transformers import AutoModelForCausalLM, LlamaConfig

from lptransformer import initialize
from lptransformer.__main__ import parser
from lptransformer.data import tokenizer
from lptransformer.engine.process_groups import leave
from lptransformer.errors import DataError
from lptransformer.training import this_host
from lptransformer.training.launcher import run

SMALL_LLAMA = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
SMALL_LLAMA |= {"vocab_size": 340, "max_position_embeddings": 64}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return small_run.stand_in(tmp_path, monkeypatch)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must end with exit code 2; returns its one-line message."""
    with pytest.raises(SystemExit) as end:
        run(parser(), list(arguments))
    message = capsys.readouterr().err.strip()
    assert end.value.code == 2, message
    assert message.startswith("lptransformer: ") and "\n" not in message and "Traceback" not in message
    return message


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **variables}
    )


def snapshot(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("--train.step=5", ["train.step", "on the command line", "train.steps"]),
        ("--train.steps=many", ["train.steps", "many", "whole number"]),
        ("--train.learning_rate=-1e-3", ["train.learning_rate", "-0.001", "above 0"]),
        ("--objective.chunks=3", ["objective.chunks", "3", "2"]),
        ("--parallel.pipeline=3", ["parallel.pipeline", "3", "2"]),
        ("--parallel.data=3", ["parallel.data", "3", "micro_batches_per_update"]),
        ("--model.max_position_embeddings=8", ["sequence_length", "16", "8"]),
        ("--data.train=missing/*.txt", ["data.train", "missing/*.txt"]),
        ("--data.tokenizer=nowhere", ["data.tokenizer", "nowhere"]),
        ("--model.pretrained=nowhere", ["model.pretrained", "nowhere"]),
        ("--deepspeed.zero_optimisation.stage=1", ["deepspeed.zero_optimisation", "zero_optimization"]),
        ("--deepspeed.gradient_clipping=1", ["deepspeed.gradient_clipping", "train.grad_clip"]),
        ("--parallel.channel=nccl", ["parallel.channel", "nccl", "gloo"]),
        ("--deepspeed=nowhere.json", ["deepspeed", "nowhere.json"]),
    ],
)
def test_bad_configuration(folder: Path, capsys: pytest.CaptureFixture[str], override: str, parts: list[str]) -> None:
    before = snapshot(folder)
    message = refused(capsys, "train", "c.yaml", override)
    assert all(part in message for part in parts), message
    assert snapshot(folder) == before


def test_bad_configuration_is_refused_in_under_a_second(folder: Path) -> None:
    started = time.perf_counter()
    done = command("-m", "lptransformer", "train", "c.yaml", "--train.learning_rate=-1")
    seconds = time.perf_counter() - started
    assert done.returncode == 2 and "train.learning_rate" in done.stderr and "Traceback" not in done.stderr
    idle_start = time.perf_counter()
    command("-c", "import pydantic, yaml")  # what the machine needs for a bare start, now
    bare = time.perf_counter() - idle_start
    assert seconds < 1 + bare, f"{seconds:.2f} s, a bare start takes {bare:.2f} s"


@pytest.mark.parametrize(
    ("content", "parts"),
    [(b"", ["empty"]), (b"plain text, then \xff\xfe", ["UTF-8"]), (b"short", ["sequence_length"])],
)
def test_bad_text(folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, parts: list[str]) -> None:
    (folder / "bad.txt").write_bytes(content)
    message = refused(capsys, "train", "c.yaml", "--data.train=bad.txt")
    assert all(part in message for part in parts), message
    assert not (folder / "run").exists()


ASKED, SAID = {"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}
GOOD, EMPTY = {"messages": [ASKED, SAID]}, {"role": "assistant", "content": " "}


@pytest.mark.parametrize(
    ("row", "options", "parts"),
    [
        ('{"messages": [', [], ["bad.jsonl, line 2", "JSON"]),
        ({"messages": [ASKED, ASKED, SAID]}, [], ["bad.jsonl, line 2", "roles user, user, assistant", "alternate"]),
        ({"messages": [ASKED, EMPTY]}, [], ["bad.jsonl, line 2", "message 2 is an empty answer"]),
        (
            GOOD,
            ["--data.fields={messages: talk}"],
            ["bad.jsonl", "has the fields 'messages', not 'talk'", "data.fields"],
        ),
        (GOOD, ["--model.pretrained=adapter"], ["model.pretrained = 'adapter'", "an adapter", "merge it"]),
        (GOOD, ["--lora.rank=2", "--lora.targets=[c_attn]"], ["lora.targets = ['c_attn']", "there are down_proj"]),
    ],
    ids=["broken row", "order of roles", "empty answer", "no such field", "adapter alone", "no such target"],
)
def test_bad_fine_tuning(
    folder: Path, capsys: pytest.CaptureFixture[str], row: object, options: list[str], parts: list[str]
) -> None:
    """From a chat model's folder whose weights nobody gets to, with a good conversation before each bad one."""
    LlamaConfig(**SMALL_LLAMA).save_pretrained(save_tokenizer(folder / "model", "mistral"))
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "own/model"}')
    rows = [json.dumps(GOOD), row if isinstance(row, str) else json.dumps(row)]
    (folder / "bad.jsonl").write_text("\n".join(rows))
    before = snapshot(folder)
    start = ["--model.pretrained=model", *(f"--model.{key}=null" for key in CONFIG["model"])]
    start += ["--data.tokenizer=null", "--data.train=bad.jsonl", "--data.valid=null", "--data.sequence_length=40"]
    message = refused(capsys, "train", "c.yaml", *start, *options)
    assert all(part in message for part in parts), message
    written = [Path(one).relative_to(folder).parts for one in snapshot(folder).keys() - before.keys()]
    assert all(len(one) == 1 for one in written), "the cache has nothing but its own folder"
    assert not (folder / "run").exists()


def test_a_token_set_of_another_tokenizer(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["prepare", "c.yaml"])
    prepared = next(path for path in (folder / "prepared").iterdir() if path.name.startswith("train-"))
    arguments = ["--data.train=text.txt", f"--data.valid={prepared}", "--data.tokenizer=sentencepiece"]
    message = refused(capsys, "train", "c.yaml", *arguments, "--data.vocab_size=300")
    assert str(prepared.name) in message and "tokenizer" in message


def test_a_token_that_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["prepare", "c.yaml"])
    (file,) = (folder / "prepared").glob("train-*/*.arrow")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for command in ("prepare", "train"):
        message = refused(capsys, command, "c.yaml")
        assert f"prepared/{file.parent.name}: a damaged token set: {file.name} is not what was written" in message
        assert "delete the folder and prepare it again" in message
    assert not (folder / "run").exists()
    shutil.rmtree(file.parent)
    run(parser(), ["prepare", "c.yaml"])


@pytest.fixture
def small_vocabulary(folder: Path) -> Path:
    """A model that embeds ASCII alone, with a tokenizer that has more ids; accented.txt uses one of those."""
    (folder / "accented.txt").write_text(TEXT + "A caf\u00e9.")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=130, **sizes, **heads)).save_pretrained(folder / "model")
    tokenizer.load("bytes").save(folder / "model")
    return folder / "model"


TOO_LARGE = (
    f"accented.txt: its text uses the id {0xC3 + 3} (\u00c3) of the tokenizer, and the model has a vocabulary of 130"
)


def test_evaluating_with_ids_that_the_model_does_not_embed(
    small_vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(parser(), ["evaluate", "model", "--data", "text.txt"])
    assert "perplexity" in capsys.readouterr().out, "a tokenizer may have ids that no text uses"
    for protocol in ("blocks", "hf-sliding"):
        message = refused(capsys, "evaluate", "model", "--data", "*.txt", "--protocol", protocol)
        assert message.startswith(f"lptransformer: {TOO_LARGE}")


@pytest.mark.slow
def test_a_pretrained_model_is_evaluated_before_it_is_trained(
    small_vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--model.pretrained=model", *(f"--model.{key}=null" for key in CONFIG["model"])]
    run(parser(), ["train", "c.yaml", *start, "--data.tokenizer=null", "--train.learning_rate=1e-4"])
    leave()
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [(row["update"], "evaluation" in row) for row in rows] == [(0, True), (1, False), (2, False), (2, True)]
    capsys.readouterr()
    run(parser(), ["evaluate", "model", "--data", "text.txt", "--window", "16", "--bos", "never", "--json"])
    (alone,) = json.loads(capsys.readouterr().out)["exits"]
    assert rows[0]["exits"][-1]["nll_per_token"] == pytest.approx(alone["nll_per_token"], rel=1e-6)
    run(parser(), ["report", "run"])
    assert "before training: 1" in capsys.readouterr().out


@pytest.mark.slow
def test_training_with_ids_that_the_model_does_not_embed(
    small_vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = ["--model.pretrained=model", *(f"--model.{key}=null" for key in CONFIG["model"])]
    start += ["--data.tokenizer=null", "--train.learning_rate=1e-4"]
    run(parser(), ["train", "c.yaml", *start])
    leave()
    capsys.readouterr()
    for kind in ("train", "valid"):
        message = refused(capsys, "train", "c.yaml", *start, f"--data.{kind}=accented.txt", "--run.dir=other")
        assert message.startswith(f"lptransformer: {TOO_LARGE}")
    assert TOO_LARGE in refused(capsys, "evaluate", "run", "--data", "accented.txt")
    with pytest.raises(DataError, match=re.escape(TOO_LARGE)):
        initialize("c.yaml", [*start, "--data.train=accented.txt"])
    leave()
    assert not Path("other").exists()


@pytest.mark.parametrize(
    ("missing", "says"), [(("g++", "c++", "clang++"), "a C++ compiler (g++, c++ or clang++)"), (("ninja",), "ninja")]
)
def test_a_compiler_that_is_not_there(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    missing: tuple[str, ...],
    says: str,
) -> None:
    found = {name: None if name in missing else f"/bin/{name}" for name in ("g++", "c++", "clang++", "ninja")}
    monkeypatch.setattr(this_host.shutil, "which", found.get)
    options = ["--deepspeed.zero_optimization.stage=2"]
    options.append("--deepspeed.zero_optimization.offload_optimizer={device: cpu}")
    options.append("--deepspeed.zero_force_ds_cpu_optimizer=true")
    message = refused(capsys, "train", "c.yaml", *options)
    assert "zero_force_ds_cpu_optimizer = True" in message and says in message and "or give false" in message
    run(parser(), ["config", "c.yaml", *options])  # asks nobody


def test_a_world_of_another_size(folder: Path) -> None:
    done = command("-m", "lptransformer.training.launcher", "--config", "c.yaml", WORLD_SIZE="3", RANK="0")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "3" in done.stderr and "parallel.pipeline" in done.stderr and "parallel.data" in done.stderr


def test_train_inside_a_launcher(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(capsys, "train", "c.yaml", "--parallel.pipeline=2")
    assert "launch/train.py" in message


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a small run is finished, in `run`, by the command line itself."""
    here = tmp_path_factory.mktemp("finished")
    (here / "text.txt").write_text(TEXT)
    (here / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    done = subprocess.run(
        [sys.executable, "-m", "lptransformer", "train", "c.yaml"],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return here


@pytest.fixture
def standing(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(finished)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return finished


def test_a_finished_run_has_what_it_should(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {path.name for path in (standing / "run").iterdir()}
    assert {"config.yaml", "environment.json", "tokenizer", "data.json", "metrics.jsonl", "metrics.csv"} <= names
    assert {"loss.png", "checkpoints"} <= names
    run(parser(), ["report", "run", "--baselines"])
    out = capsys.readouterr().out
    assert "exit after block 0" in out and "exit after block 1" in out and "bigram" in out and "idle" in out


def test_a_run_folder_is_not_used_twice(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(standing / "run")
    message = refused(capsys, "train", "c.yaml")
    assert "run.dir is run" in message and "--resume" in message and "--overwrite" in message
    assert snapshot(standing / "run") == before


def test_resume_with_another_configuration(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "c.yaml", "--resume", "--train.seed=5")
    assert "train.seed: 0 in the run, 5 now (it decides the order of the windows" in message


def test_resume_of_nothing(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "train", "c.yaml", "--resume", "--run.dir=other")
    assert "other" in message and "no run to resume" in message
    assert not (standing / "other").exists()


def test_export_into_a_folder_that_is_not_empty(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (standing / "full").mkdir(exist_ok=True)
    (standing / "full" / "thesis.txt").write_text("years of work")
    message = refused(capsys, "export", "run", "full")
    assert "full" in message and "empty" in message
    assert [path.name for path in (standing / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.slow  # starts programs
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_a_damaged_model_folder(standing: Path, tmp_path: Path, how: str) -> None:
    from safetensors.torch import load_file, save_file

    model = tmp_path / "model"
    assert command("-m", "lptransformer", "export", "run", str(model)).returncode == 0
    weights = model / "model.safetensors"
    if how == "missing":
        tensors = load_file(weights)
        del tensors["transformer.h.1.mlp.c_fc.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        weights.write_bytes(weights.read_bytes()[:-100])
    sizes = ["--model.hidden_size=null", "--model.num_layers=null", "--model.num_heads=null", "--data.tokenizer=null"]
    arguments = [f"--model.pretrained={model}", *sizes, f"--run.dir={tmp_path / 'run'}"]
    done = command("-m", "lptransformer", "train", "c.yaml", *arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert f"the model in {model}" in done.stderr
    assert how == "truncated" or "h.1.mlp.c_fc.weight" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_argument_that_a_command_does_not_take(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--stpe" in refused(capsys, "evaluate", "run", "--stpe=3")


def test_no_run_in_the_folder(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("evaluate", "report"):
        assert "nowhere" in refused(capsys, name, "nowhere")


def test_multinode_without_a_hostfile(standing: Path) -> None:
    script = Path(__file__).parent.parent / "launch" / "multinode.sh"
    done = subprocess.run(["bash", str(script), "no-hosts", "c.yaml"], capture_output=True, text=True, cwd=standing)
    assert done.returncode == 2 and "no-hosts" in done.stderr


def test_resume_of_a_complete_run(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(standing / "run")
    assert "is complete: 2 updates" in refused(capsys, "train", "c.yaml", "--resume")
    assert snapshot(standing / "run") == before


def test_resume_and_overwrite_at_once(standing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "both given" in refused(capsys, "train", "c.yaml", "--resume", "--overwrite")


def test_resume_on_another_text(standing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The configuration is the same; what it names is not."""
    for name in ("run", "c.yaml"):
        (shutil.copytree if name == "run" else shutil.copy)(standing / name, tmp_path / name)
    os.chdir(tmp_path)  # the fixture puts the directory back
    (tmp_path / "text.txt").write_text(TEXT + "And now for something completely different.")
    message = refused(capsys, "train", "c.yaml", "--resume", "--train.steps=4")
    assert "data.train" in message and "cannot be resumed" in message
