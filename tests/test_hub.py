"""Models by OWNER/NAME, through huggingface_hub itself: from a hub on this machine, or from a cache that is there.

The library reads its variables when it is imported, so what talks to a hub is a program of its own, with its cache in
the test's folder.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import small_run
import torch
import yaml
from small_hub import Hub, commit_of, serving, variables
from transformers import AutoModelForCausalLM, LlamaConfig

from lptransformer import hub
from lptransformer.__main__ import parser
from lptransformer.data import tokenizer
from lptransformer.engine.process_groups import leave
from lptransformer.errors import ModelError
from lptransformer.evaluation.perplexity import evaluate_run
from lptransformer.run_folder import history
from lptransformer.training import memory
from lptransformer.training import train as training
from lptransformer.training.launcher import run

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}
FETCH = """
import sys
from lptransformer import hub
from lptransformer.errors import ModelError
try:
    print(hub.folder(sys.argv[1], "MODEL is this", weights=True))
except ModelError as error:
    sys.exit(str(error))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as somebody uploads it: with a tokenizer, code, and the weights a second time, pickled."""
    folder = tmp_path_factory.mktemp("uploads") / "model"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer.load("bytes").save(folder)
    for name in ("modeling_own.py", "pytorch_model.bin", "README.md", "training_args.pt"):
        (folder / name).write_text("nothing that is wanted")
    return folder


@pytest.fixture(scope="module")
def uploads(model: Path) -> dict[str, Path]:
    """Models by name."""
    found = {"own/model": model, "own/gated": model}
    for name in ("sharded", "outside", "pickled", "adapter"):
        found[f"own/{name}"] = model.parent / name
        (model.parent / name).mkdir()
    for name in ("config.json", "pytorch_model.bin"):
        (model.parent / "pickled" / name).write_bytes((model / name).read_bytes())
    (model.parent / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "own/model"}')
    (model.parent / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model.parent / "sharded", max_shard_size="20KB")
    (model.parent / "sharded" / "consolidated.safetensors").write_bytes(b"the same weights again")
    (model.parent / "outside" / "config.json").write_bytes((model / "config.json").read_bytes())
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../../../elsewhere.safetensors"}}
    (model.parent / "outside" / hub.INDEX).write_text(json.dumps(index))
    return found


@pytest.fixture(scope="module")
def server(uploads: dict[str, Path]) -> Iterator[Hub]:
    with serving(uploads, frozenset({"own/gated"})) as hub:
        yield hub


def fetch(name: str, url: str, home: Path, **more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, name]
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=home, env=variables(url, home, **more)
    )


def fetched(process: subprocess.Popen[str]) -> Path:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    return Path(out.strip())


def test_two_programs_at_once_fetch_a_model_once_and_nothing_else_of_it(
    server: Hub, model: Path, tmp_path: Path
) -> None:
    server.asked.clear()
    folders = [fetched(one) for one in [fetch("own/model", server.url, tmp_path) for _ in range(2)]]
    assert folders[0] == folders[1] and folders[0].name == commit_of(model)
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    assert {path.name for path in folders[0].iterdir()} == wanted
    assert {name: server.got(name) for name in wanted} == dict.fromkeys(wanted, 1)
    server.asked.clear()
    fetched(fetch("own/model", server.url, tmp_path))
    assert not [line for line in server.asked if "/resolve/" in line], "the whole of it is in the cache"
    assert server.got("main") == 1, "the hub is asked which commit is the newest"
    for url, more in ((server.url, {"HF_HUB_OFFLINE": "1"}), ("http://127.0.0.1:9", {})):
        assert fetched(fetch("own/model", url, tmp_path, **more)) == folders[0]


def test_shards_are_those_that_the_index_names(server: Hub, uploads: dict[str, Path], tmp_path: Path) -> None:
    folder = fetched(fetch("own/sharded", server.url, tmp_path))
    index = json.loads((uploads["own/sharded"] / hub.INDEX).read_text())
    assert {path.name for path in folder.glob("*.safetensors")} == set(index["weight_map"].values())
    assert len(set(index["weight_map"].values())) > 1


def test_a_commit_that_was_found_is_kept_to(server: Hub, uploads: dict[str, Path], tmp_path: Path) -> None:
    """Processes of a run take what the first one took, whatever the hub has meanwhile."""
    before = fetched(fetch("own/sharded", server.url, tmp_path))
    (uploads["own/sharded"] / "generation_config.json").write_text('{"transformers_version": "5"}')
    server.asked.clear()
    found = {hub.COMMITS_VARIABLE: json.dumps({"own/sharded": before.name})}
    assert fetched(fetch("own/sharded", server.url, tmp_path, **found)) == before
    assert not [line for line in server.asked if "own" in line], "nothing is asked"
    assert fetched(fetch("own/sharded", server.url, tmp_path)) != before


REFUSED = {
    "own/nothing": ["no model of that name", "hf auth login"],
    "own/gated": ["granted access", "/own/gated", "hf auth login"],
    "own/pickled": ["no model.safetensors", "give the folder"],
    "own/adapter": ["an adapter", "merge"],
    "own/outside": ["../../../elsewhere.safetensors", "outside of the folder"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_hub_does_not_give_is_one_message(name: str, server: Hub, tmp_path: Path) -> None:
    _refused(fetch(name, server.url, tmp_path), REFUSED[name])
    assert not list(tmp_path.rglob("*.bin")) and not server.got("pytorch_model.bin")


@pytest.mark.parametrize("more", [{"HF_HUB_OFFLINE": "1"}, {}], ids=["offline", "no network"])
def test_without_a_network_it_says_what_was_tried(more: dict[str, str], tmp_path: Path) -> None:
    tried = ["HF_HUB_OFFLINE", str(tmp_path)] if more else ["http://127.0.0.1:9", "Connection refused"]
    _refused(fetch("own/model", "http://127.0.0.1:9", tmp_path, **more), [*tried, "no such folder", "give a folder"])


def _refused(process: subprocess.Popen[str], parts: list[str]) -> None:
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert error.startswith("MODEL is this: ") and error.count("\n") == 1, error
    assert all(part in error for part in parts), error


# ---- commands, with a cache that is there


@pytest.fixture
def cached(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """own/model in a cache, as the library keeps it, without a network (tests/conftest.py)."""
    repository, commit = tmp_path / "cache" / "models--own--model", commit_of(model)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / commit).symlink_to(model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(hub.COMMITS_VARIABLE, "{}")
    small_run.stand_in(tmp_path, monkeypatch, fine_tuning())
    return commit


def fine_tuning() -> dict[str, object]:
    data = {key: value for key, value in small_run.CONFIG["data"].items() if key != "tokenizer"}
    return {**small_run.CONFIG, "model": {"pretrained": "own/model"}, "data": data, "objective": {"chunks": 2}}


def test_a_model_is_evaluated_by_name_as_from_its_folder(cached: str, model: Path) -> None:
    results = [evaluate_run(of, ["text.txt"], window=16) for of in ("own/model", model)]
    assert results[0] is not None and results[1] is not None
    assert results[0]["run"] == "own/model" and results[0]["exits"] == results[1]["exits"]


def test_it_generates_and_is_compared_by_name(cached: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["generate", "own/model", "--prompt", "It is", "--max-tokens", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["tokens"] == 2
    same = evaluate_run("own/model", ["text.txt"], window=16, compare="own/model")
    assert same is not None
    assert [one["bits_per_byte"] for one in same["comparison"]["differences"]] == [0.0]


def test_a_path_that_is_there_is_no_name(cached: str, tmp_path: Path) -> None:
    (tmp_path / "own" / "model").mkdir(parents=True)
    assert hub.folder("own/model", "x") == Path("own/model") and hub.commits() == {}


@pytest.mark.parametrize("word", ["model", "./own/model", "own/model/part", "/own/model", "own//model", "../model", ""])
def test_other_words_are_no_names(word: str) -> None:
    assert not hub.is_name(word)


def test_a_run_keeps_the_name_and_the_commit(cached: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["--train.steps=4", "--train.micro_batch_size=auto"]
    run(parser(), ["train", "c.yaml", *keys, "--until=2"])
    leave()
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["model"]["pretrained"] == kept["data"]["tokenizer"] == "own/model"
    assert history.hub_commits(tmp_path / "run") == {"own/model": cached}
    names = [history.public_name(tmp_path / "run", name) for name in ("own/model", "a/folder")]
    assert names == ["own/model", "folder"]
    # The hub has gone on since.
    repository = tmp_path / "cache" / "models--own--model"
    (repository / "refs" / "main").write_text("0" * 40)
    newer = repository / "snapshots" / ("0" * 40)
    newer.mkdir()
    for path in (repository / "snapshots" / cached).iterdir():
        (newer / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv(hub.COMMITS_VARIABLE, "{}")
    seen = list[dict[str, str]]()
    for module in (memory, training):
        real = module.as_resumed
        monkeypatch.setattr(module, "as_resumed", lambda config, real=real: seen.append(hub.commits()) or real(config))
    run(parser(), ["train", "c.yaml", *keys, "--resume"])
    leave()
    assert history.hub_commits(tmp_path / "run") == {"own/model": cached}
    assert seen and all(one == {"own/model": cached} for one in seen), "before anything is counted"


def test_init_for_a_name(cached: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(parser(), ["init", "--pretrained", "own/model"])
    assert yaml.safe_load(capsys.readouterr().out)["model"] == {"pretrained": "own/model"}


def test_a_name_that_is_not_there_leaves_nothing(cached: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path().rglob("*"))
    for words in (["train", "c.yaml", "--model.pretrained=own/other"], ["evaluate", "own/other"]):
        with pytest.raises(SystemExit) as end:
            run(parser(), words)
        said = capsys.readouterr().err
        assert end.value.code == 2 and said.count("\n") == 1 and "own/other" in said and "HF_HUB_OFFLINE" in said
    with pytest.raises(ModelError, match="data.tokenizer is own/other: no such folder here"):
        tokenizer.load("own/other")
    assert sorted(Path().rglob("*")) == before


@pytest.mark.slow  # starts programs
def test_a_launch_of_two_processes_fetches_once(server: Hub, tmp_path: Path) -> None:
    """Both from the command, which fetches first, and from a launcher, whose processes begin at once."""
    (tmp_path / "text.txt").write_text(small_run.TEXT)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({**fine_tuning(), "parallel": {"pipeline": 2}}))
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=2", "--master-port=29871"]
    starts = {
        "command": [sys.executable, "-m", "lptransformer", "train", "c.yaml"],
        "launcher": [*torchrun, "-m", "lptransformer.training.launcher", "c.yaml"],
    }
    for how, command in starts.items():
        server.asked.clear()
        environment = variables(server.url, tmp_path / how, OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
        done = subprocess.run(
            [*command, f"--run.dir={how}"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert server.got("model.safetensors") == server.got("config.json") == 1, server.asked
        assert history.hub_commits(tmp_path / how).keys() == {"own/model"}
    assert server.got("main") == 2, "each process of a launcher asks which commit is the newest"
