"""Nothing that is read executes code: a case for every kind of file that is read, and could hold some.

What is planted makes a folder, the marker, where it is executed. It is refused by a message, or ignored. Checkpoints of
DeepSpeed's are in tests/engine/test_safe_reading.py.
"""

from __future__ import annotations

import builtins
import io
import json
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import jinja2
import numpy as np
import planted
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from saved_runs import make_run
from small_chat import conversation, save_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from lptransformer.config.load import load
from lptransformer.data import chat, tokenizer
from lptransformer.data.prepare import prepare_all
from lptransformer.data.token_set import TokenSet
from lptransformer.errors import UserError
from lptransformer.evaluation import generate, perplexity, trained_model
from lptransformer.models import exits, hf_config, hf_parts, split
from lptransformer.planning.devices import load_devices
from lptransformer.run_folder import checkpoint, history, layout, metrics_log, saved_stage, trace
from lptransformer.study import records, sweep_file

Read = Callable[[Path], Any]
Plant = Callable[[Path, Path], Any]  # into a folder, with the marker


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("good"), model={"num_layers": 2})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def anybody_says_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    """To what the library asks on the terminal."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")


def check(read: Read, folder: Path, marker: Path, says: str | None) -> None:
    """`says`: why it is refused; empty: it is not; None: it may be."""
    try:
        read(folder)
    except UserError as error:
        assert says is None or (says and re.search(says, str(error))), error
        assert "\n" not in str(error)
    else:
        assert not says, "it was read"
    assert not marker.exists()


def test_what_is_planted_acts_where_it_is_executed(tmp_path: Path) -> None:
    def saved(marker: Path) -> None:
        planted.saved(tmp_path / "file", marker)
        torch.load(tmp_path / "file", weights_only=False)

    ways: list[Callable[[Path], Any]] = [
        lambda marker: pickle.loads(planted.pickled(marker)),
        saved,
        lambda marker: exec(planted.module(marker)),
        lambda marker: yaml.unsafe_load(planted.yaml(marker)),
        lambda marker: jinja2.Template(planted.template(marker)).render(),
    ]
    for number, way in enumerate(ways):
        way(tmp_path / str(number))
        assert (tmp_path / str(number)).is_dir()


# ---- what people write


FILES: dict[str, Read] = {
    "configuration": lambda file: load(file),
    "sweep": lambda file: sweep_file.read(file),
    "devices": lambda file: load_devices(file),
    "record": lambda file: records.read(file),
}


@pytest.mark.parametrize("what", FILES)
def test_a_file_is_no_program(tmp_path: Path, what: str) -> None:
    marker = tmp_path / "marker"
    for content in (planted.yaml(marker).encode(), b"model: " + planted.yaml(marker).encode(), planted.pickled(marker)):
        (tmp_path / "file.yaml").write_bytes(content)
        check(FILES[what], tmp_path / "file.yaml", marker, "not valid YAML|not UTF-8|cannot be read")


# ---- run folders

IN_RUN: dict[str, tuple[str, Read, str]] = {
    "configuration": ("config.yaml", layout.read_config, "not UTF-8"),
    "model": ("model.json", lambda run: trained_model.blueprint_of(run), "model.json cannot be read"),
    "data": ("data.json", layout.read_data, "data.json cannot be read"),
    "environment": ("environment.json", history.hub_commits, ""),
    "end": ("ended.json", history.read_end, ""),
    "metrics": ("metrics.jsonl", metrics_log.read_updates, "no update in its metrics|is no row"),
    "trace": ("trace.jsonl", lambda run: trace.read_traces(run, 1, 1), "trace.jsonl"),
    "weights": (
        "checkpoints/step-00000010/stage-0/weights.safetensors",
        lambda run: trained_model.load(run, 10),
        "weights.safetensors is damaged",
    ),
    "state": (
        "checkpoints/step-00000010/stage-1/state.json",
        lambda run: trained_model.load(run, 10),
        "state.json is damaged",
    ),
    "marker": (
        "checkpoints/step-00000010/complete",
        lambda run: trained_model.load(run, 10),
        "complete cannot be read",
    ),
    "others": (
        "checkpoints/step-00000010/stage-0/others.safetensors",
        lambda run: saved_stage.read_others(checkpoint.stage_folder(run, 10, 0)),
        "others.safetensors cannot be read",
    ),
    "tokenizer": ("tokenizer/tokenizer_config.json", lambda run: tokenizer.load(run / "tokenizer"), "can't decode"),
    "generation": (
        "pretrained/generation_config.json",
        lambda run: generate.open_source(run),
        "generation_config.json is damaged",
    ),
}


@pytest.mark.parametrize("saved", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("what", IN_RUN)
def test_a_run_folder_executes_nothing(run: Path, tmp_path: Path, what: str, saved: bool) -> None:
    name, read, says = IN_RUN[what]
    shutil.copytree(run, tmp_path / "run")
    file, marker = tmp_path / "run" / name, tmp_path / "marker"
    file.parent.mkdir(exist_ok=True)
    planted.saved(file, marker) if saved else file.write_bytes(planted.pickled(marker))
    check(read, tmp_path / "run", marker, says)


def test_a_run_s_model_names_no_code(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    content = json.loads((run / "model.json").read_text())
    named = {"AutoConfig": "code.Ours", "AutoModelForCausalLM": "code.Ours"}
    (tmp_path / "run" / "model.json").write_text(json.dumps({**content, "auto_map": named}))
    (tmp_path / "run" / "code.py").write_text(planted.module(tmp_path / "marker"))
    check(lambda run: trained_model.load(run, 10), tmp_path / "run", tmp_path / "marker", "")
    (tmp_path / "run" / "model.json").write_text(json.dumps({**content, "attn_implementation": "some/kernel"}))
    check(trained_model.blueprint_of, tmp_path / "run", tmp_path / "marker", "some/kernel is a kernel of the hub")


# ---- model folders


def load_model(folder: Path) -> None:
    config = hf_config.read_config(folder)
    split.load_piece(folder, config, hf_parts.anatomy(config), range(0, 2), True, True)


def edit(file: Path, **keys: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def pickled_weights(folder: Path, marker: Path) -> None:
    planted.saved(folder / "pytorch_model.bin", marker)
    (folder / "model.safetensors").unlink()


def pickled_shard(folder: Path, marker: Path) -> None:
    pickled_weights(folder, marker)
    (folder / "pytorch_model.bin").rename(folder / "shard.bin")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "shard.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def bare_pickle(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(planted.pickled(marker))


def code_of_its_own(folder: Path, marker: Path) -> None:
    (folder / "code.py").write_text(planted.module(marker))
    named = {"AutoConfig": "code.Ours", "AutoModelForCausalLM": "code.Ours"}
    edit(folder / "config.json", model_type="ours", auto_map=named)


def code_beside(folder: Path, marker: Path) -> None:
    """Of a family that the library has."""
    (folder / "code.py").write_text(planted.module(marker))
    edit(folder / "config.json", auto_map={"AutoConfig": "code.Ours", "AutoModelForCausalLM": "code.Ours"})
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(planted.module(marker))


def adapter_beside(folder: Path, marker: Path) -> None:
    planted.saved(folder / "adapter_model.bin", marker)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))


IN_MODEL: dict[str, tuple[Plant, Read, str | None]] = {
    "pickled weights": (pickled_weights, load_model, "pickled and hold more than tensors"),
    "a shard of pickled weights": (pickled_shard, load_model, "pickled and hold more than tensors"),
    "a pickle alone": (bare_pickle, load_model, "pickled and hold more than tensors"),
    "pickled safetensors": (
        lambda folder, marker: planted.saved(folder / "model.safetensors", marker),
        load_model,
        "model.safetensors is damaged",
    ),
    "config.json": (
        lambda folder, marker: planted.saved(folder / "config.json", marker),
        load_model,
        "not a valid JSON",
    ),
    "generation_config.json": (
        lambda folder, marker: planted.saved(folder / "generation_config.json", marker),
        load_model,
        None,
    ),
    "code of its own": (code_of_its_own, load_model, "needs code of its own"),
    "code beside the library's": (code_beside, load_model, ""),
    "kernels of the hub": (
        lambda folder, marker: edit(folder / "config.json", attn_implementation="some/kernel"),
        load_model,
        "attn_implementation = some/kernel is a kernel of the hub, which is code",
    ),
    "an adapter beside": (adapter_beside, load_model, None),
    "exits": (
        lambda folder, marker: planted.saved(folder / exits.FILE, marker),
        exits.kept,
        "exits.safetensors is damaged",
    ),
}


@pytest.mark.parametrize("what", IN_MODEL)
def test_a_model_folder_executes_nothing(model: Path, tmp_path: Path, what: str) -> None:
    plant, read, says = IN_MODEL[what]
    shutil.copytree(model, tmp_path / "model")
    plant(tmp_path / "model", tmp_path / "marker")
    check(read, tmp_path / "model", tmp_path / "marker", says)


# ---- tokenizers and their templates


def tokenizer_code(folder: Path, marker: Path) -> None:
    (folder / "code.py").write_text(planted.module(marker))
    edit(folder / "tokenizer_config.json", tokenizer_class="Ours", auto_map={"AutoTokenizer": ["code.Ours", None]})


def sentencepiece_model(folder: Path, marker: Path) -> None:
    (folder / "tokenizer.json").unlink()
    planted.saved(folder / "tokenizer.model", marker)


IN_TOKENIZER: dict[str, tuple[Plant, str]] = {
    "code of its own": (tokenizer_code, "needs code of its own"),
    "tokenizer.json": (lambda folder, marker: planted.saved(folder / "tokenizer.json", marker), "can't decode"),
    "tokenizer.model": (sentencepiece_model, "not a SentencePiece model"),
}


@pytest.mark.parametrize("what", IN_TOKENIZER)
def test_a_tokenizer_executes_nothing(tmp_path: Path, what: str) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer", "chatml")
    plant, says = IN_TOKENIZER[what]
    plant(folder, tmp_path / "marker")
    check(tokenizer.load, folder, tmp_path / "marker", says)


def test_a_chat_template_executes_nothing(tmp_path: Path) -> None:
    folder, marker = save_tokenizer(tmp_path / "tokenizer", "chatml"), tmp_path / "marker"
    (folder / "chat_template.jinja").write_text(planted.template(marker))
    opened = tokenizer.load(folder)
    check(lambda _: chat.rendered(conversation(), opened, "row 1", everything=True), folder, marker, "is unsafe")
    with pytest.raises(UserError, match="is unsafe"):
        generate.chat_ids(SimpleNamespace(tokenizer=opened), conversation()[:1])
    assert not marker.exists()


# ---- texts and token sets


def read_text(file: Path) -> None:
    prepare_all(str(file), None, "bytes", 0, 4, file.parent / "cache", progress=False)


@pytest.mark.parametrize(
    "name", ["a.pt", "a.pkl", "a.npy", "a.txt", "a.jsonl", "a.csv", "a.parquet", "a.arrow", "a.gz"]
)
def test_a_text_executes_nothing(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    planted.saved(tmp_path / name, marker)
    check(read_text, tmp_path / name, marker, "not UTF-8|not JSON|not a readable|Not a gzipped")


def with_pickled_type(marker: Path) -> pa.Table:
    """A column of an extension type whose parameters are a pickle, as older versions of pyarrow read them."""
    told = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": planted.pickled(marker)}
    lists = pa.array([[60, 61, 62, 63]] * 9, pa.list_(pa.uint16()))
    fields = [pa.field("text", pa.string(), metadata=told), pa.field("input_ids", lists.type, metadata=told)]
    return pa.table([pa.array(["a text of words"] * 9), lists], schema=pa.schema(fields))


def test_types_of_arrow_execute_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    table = with_pickled_type(marker)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        check(read_text, tmp_path / name, marker, "")
    (tmp_path / "b.txt").write_text("one two three four")
    prepared = prepare_all(str(tmp_path / "b.txt"), None, "bytes", 0, 4, tmp_path / "sets", progress=False)
    folder = prepared.train[0].tokens.folder
    (file,) = folder.glob("*.arrow")
    file.write_bytes((tmp_path / "a.arrow").read_bytes())
    manifest = {**json.loads((folder / "manifest.json").read_text()), "rows": 9, "tokens": 36, "files": {}}
    del manifest["sum"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    check(TokenSet.open, folder, marker, "a damaged token set")


def test_what_datasets_saved_executes_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    datasets.Dataset.from_dict({"text": ["one two"] * 9}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "saved.py").write_text(planted.module(marker))
    check(read_text, tmp_path / "saved", marker, "")
    (tmp_path / "saved" / "state.json").write_bytes(planted.pickled(marker))
    check(read_text, tmp_path / "saved", marker, "damaged data set")


BY_NAME = {
    "a loading script": "scripts are no longer supported",
    "a pickle in an archive": "Weights only load failed",
    "a pickled table": "No .*data files",
}


@pytest.mark.parametrize("what", BY_NAME)
def test_a_data_set_by_name_executes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder, marker = tmp_path / "own" / "data", tmp_path / "marker"
    folder.mkdir(parents=True)
    if what == "a loading script":
        (folder / "data.py").write_text(planted.module(marker))
    elif what == "a pickled table":
        (folder / "data.pkl").write_bytes(planted.pickled(marker))
    else:
        torch.save(planted.Planted(marker), content := io.BytesIO())
        with tarfile.open(folder / "train.tar", "w") as archive:
            for number, name in enumerate(["txt", "pth", "pyd", "pickle", "npy"]):
                entry = tarfile.TarInfo(f"{number // 9}.{name}")
                held = b"a text" if name == "txt" else content.getvalue() if name == "pth" else planted.pickled(marker)
                entry.size = len(held)
                archive.addfile(entry, io.BytesIO(held))
    check(
        lambda _: prepare_all("hub:own/data", None, "bytes", 0, 4, tmp_path / "prepared", progress=False),
        folder,
        marker,
        BY_NAME[what],
    )


def test_what_processes_leave_for_each_other_executes_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "a-ids.npy", np.array([planted.Planted(tmp_path / "marker")], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle|Python objects"):
        perplexity._kept(tmp_path / "a")
    assert not (tmp_path / "marker").exists()
