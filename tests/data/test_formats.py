"""Every kind of file gives the same documents; a fault in one names file and row; a share is held out by document."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from lptransformer import hub
from lptransformer.data import tokenizer
from lptransformer.data.prepare import prepare, prepare_all
from lptransformer.data.readers import parse_all, parse_sources
from lptransformer.data.token_set import TokenSet
from lptransformer.errors import ConfigError, DataError

BYTES = tokenizer.load("bytes")
# What a reader may not change: line ends, dates, numbers, what looks like a missing value, quotes, a comma.
DOCUMENTS = [
    "A first line\r\nand, a second\n",
    "NA",
    "2024-01-02",
    "007",
    ' a "quoted" \t\u201cword\u201d ',
    "caf\u00e9 \U0001f600",
]
ROWS = [{"id": number, "text": text} for number, text in enumerate(DOCUMENTS)]


def jsonl(path: Path) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def cells(delimiter: str) -> Callable[[Path], bytes]:
    def content(path: Path) -> bytes:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["id", "text"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        return path.read_bytes()

    return content


def arrow_file(path: Path) -> None:
    feather.write_feather(pa.Table.from_pylist(ROWS), path, compression="uncompressed")


def stream_cut_short() -> bytes:
    """An Arrow stream that ends within its rows."""
    sink, table = pa.BufferOutputStream(), pa.table({"text": ["something that is long enough"] * 999})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()[:9999]


def array(path: Path) -> bytes:
    return json.dumps(ROWS, indent=1).encode()


MAKERS: dict[str, Any] = {
    "a.jsonl": jsonl,
    "lines.json": jsonl,
    "array.json": array,
    "bom.jsonl": lambda path: b"\xef\xbb\xbf" + jsonl(path),
    "a.csv": cells(","),
    "bom.csv": lambda path: b"\xef\xbb\xbf" + cells(",")(path),
    "a.tsv": cells("\t"),
    "a.parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
    "a.arrow": arrow_file,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "a.jsonl.gz": lambda path: gzip.compress(jsonl(path)),
    "a.json.xz": lambda path: lzma.compress(array(path)),
    "a.csv.bz2": lambda path: bz2.compress(cells(",")(path)),
    "a.ndjson.zst": lambda path: bytes(pa.compress(jsonl(path), "zstd", asbytes=True)),
}


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def made(path: Path | str, cache: Path, length: int = 16) -> TokenSet:
    (source,) = parse_sources(str(path), "train")
    return prepare(source, BYTES, length, cache, progress=False)


def text_of(token_set: TokenSet) -> str:
    return BYTES.decode(np.concatenate(token_set.chunks))


def test_every_format_gives_the_same_token_set(tmp_path: Path) -> None:
    found = {}
    for name, make in MAKERS.items():
        if (content := make(tmp_path / name)) is not None:
            write(tmp_path / name, content)
        found[name] = made(tmp_path / name, tmp_path / "cache")
    assert text_of(found["a.jsonl"]) == "</s>".join(DOCUMENTS)
    files = {name: next(one.folder.glob("*.arrow")).read_bytes() for name, one in found.items()}
    assert {name for name, content in files.items() if content != files["a.jsonl"]} == set()
    counts = [{key: one.manifest[key] for key in ("rows", "tokens", "bytes", "documents")} for one in found.values()]
    assert all(one == counts[0] for one in counts)
    assert len({one.folder for one in found.values()}) == len(found)  # no address hides another way of reading


def test_text_is_unpacked_and_loses_its_mark(tmp_path: Path) -> None:
    text = "Some prose\r\nwith two lines. " * 9
    plain = made(write(tmp_path / "a.txt", text), tmp_path / "cache")
    packed = made(write(tmp_path / "b.txt.gz", gzip.compress(text.encode())), tmp_path / "cache")
    marked = made(write(tmp_path / "c.md", b"\xef\xbb\xbf" + text.encode()), tmp_path / "cache")
    assert text_of(plain) == text_of(packed) == text_of(marked) == text
    assert (
        plain.folder.name == "train-e6d91cd83b4e1e18"
    )  # the address of plain text is what it was before there were others


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"text": "x"}, {"text": "y"', r"a\.json, row 2: not JSON: "),
        ("a.json", b'[{"text": "x"} {"text": "y"}]', r"a\.json, row 1: not JSON: neither a comma nor the end"),
        ("a.json", b'[{"text": "x"}', r"a\.json, row 1: not JSON: neither a comma nor the end"),
        ("a.json", b'[{"text": "x"}] 3', r"a\.json: not JSON: .* after row 1"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, row 2: 3 is not an object"),
        ("a.json", b"[]", r"a\.json: holds no row"),
        ("a.json", b'{"text": "\\ud800"}', r"a\.json, row 1: half of a surrogate pair"),
        ("a.json", b'{"text": ' + b"9" * 5000 + b"}", r"a\.json, row 1: not JSON: Exceeds the limit"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", r"a\.jsonl, line 1: not JSON: Exceeds the limit"),
        ("a.csv", b"id,text\n1,x\n2\n", r"a\.csv, row 2: 1 cells, where the first line names 2"),
        ("a.csv", b'id,text\n1,x\n2,"y', r"a\.csv, row 2: unexpected end of data"),
        ("a.csv", b"id,text\n1,x\xff\n", r"a\.csv: not UTF-8 text"),
        ("a.tsv", b"id\tbody\n1\tx\n", r"a\.tsv: has the fields 'id', 'body', not what data.format: auto needs"),
        ("a.arrow", b"ARROW1 nonsense", r"a\.arrow: not a readable Arrow file"),
        ("a.arrow", stream_cut_short(), r"a\.arrow: not a readable Arrow file"),
        ("a.txt.gz", b"no such thing", r"a\.txt\.gz: cannot be read: Not a gzipped file"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd nonsense", r"a\.jsonl\.zst: cannot be read: "),
        ("a.txt.xz", lzma.compress(b"cut short" * 99)[:50], r"a\.txt\.xz: cannot be read: Compressed file ended"),
    ],
)
def test_a_broken_file_is_named_with_its_row(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        made(write(tmp_path / name, content), tmp_path / "cache")
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/*"))


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.txt", b"text")
    real = Path.open

    def refusing(path: Path, *args: Any, **keys: Any) -> Any:
        if path.name == "a.txt":
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **keys)

    monkeypatch.setattr(Path, "open", refusing)
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: Permission denied"):
        made(file, tmp_path / "cache")


def test_splits_that_were_saved_together_are_named(tmp_path: Path) -> None:
    one = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"both holds the splits test, train: give one, .*both/test"):
        made(tmp_path / "both", tmp_path / "cache")
    assert text_of(made(tmp_path / "both" / "train", tmp_path / "cache")) == "</s>".join(DOCUMENTS)


def test_a_data_set_of_the_hub_comes_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `load_dataset` leaves there, offline."""
    commit, name, cache = "0123456789" * 4, "hub:own/set", tmp_path / "cache"
    files = {"train": write(tmp_path / "train.jsonl", jsonl(tmp_path))}
    files["test"] = write(tmp_path / "test.jsonl", '{"text": "one alone"}\n')
    datasets.load_dataset("json", data_files=files, cache_dir=str(tmp_path / "made"))
    (info,) = (tmp_path / "made").rglob("dataset_info.json")
    place = tmp_path / "datasets" / "own___set" / "default" / "0.0.0" / commit
    place.parent.mkdir(parents=True)
    info.parent.rename(place)
    for file in place.glob("*.arrow"):
        file.rename(file.with_name(file.name.replace("json-", "set-")))
    content = (place / info.name).read_text()
    (place / info.name).write_text(content.replace('"dataset_name": "json"', '"dataset_name": "set"'))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv(hub.COMMITS_VARIABLE, "{}")

    done = prepare_all(name, f"{name}:test", "bytes", 300, 16, cache, False)
    assert text_of(done.train[0].tokens) == "</s>".join(DOCUMENTS) and text_of(done.valid["valid"]) == "one alone"
    assert hub.commits() == {"datasets/own/set": commit}
    for wrong, says in [
        ("hub:own/none", "hub:own/none cannot be had from the hub or the cache: "),
        ("hub:own", "hub:own is not hub:OWNER/NAME"),
        (f"{name}:none", "hub:own/set:none has the splits train, test: name one, as hub:own/set:train"),
    ]:
        with pytest.raises(DataError, match=f"data.train: {says}"):
            prepare_all(wrong, None, "bytes", 300, 16, cache, False)
    with pytest.raises(DataError, match="data.valid: hub:own/set has the splits train, test: name one"):
        prepare_all(name, name, "bytes", 300, 16, cache, False)


# ---- a share is held out


def held_out(tmp_path: Path, share: Any, train: Any, length: int = 4) -> dict[str, list[str]]:
    done = prepare_all(train, share, "bytes", 300, length, tmp_path / "cache", False)
    sets = {f"train {one.name}": one.tokens for one in done.train} | done.valid
    return {name: text_of(one).split("</s>") for name, one in sets.items()}


def test_a_share_is_held_out_by_document(tmp_path: Path) -> None:
    texts = [f"number {number}" for number in range(41)]
    file = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = held_out(tmp_path, 0.05, file)
    assert list(found) == ["train train", "valid"]
    assert found["valid"] == [texts[0], texts[20], texts[40]]
    assert sorted(found["train train"] + found["valid"]) == sorted(texts)
    files = [write(tmp_path / f"{number}.txt", f"text {number}") for number in range(3)]
    mixed = held_out(tmp_path, {"other": files[2]}, {"a": {"files": files[:2], "valid": 0.5}, "b": {"files": file}})
    assert mixed["a"] == ["text 0"] and mixed["train a"] == ["text 1"] and mixed["other"] == ["text 2"]
    assert mixed["train b"] == texts


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_of_a_single_document_the_last_part_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("lptransformer.data.rows._BLOCK", block)
    text = " ".join(f"word{number}" for number in range(100))
    (train,), (valid,) = held_out(tmp_path, 0.1, write(tmp_path / "a.txt", text)).values()
    assert train + valid == text and valid.startswith(" word")
    assert 0.9 * len(text) <= len(train) < 0.9 * len(text) + 7


@pytest.mark.parametrize(
    ("train", "share", "says"),
    [
        ({"a": "{text}"}, 1.5, r"data\.valid = 1\.5 is not a share"),
        ({"a": {"files": "{text}", "valid": 0.1}}, {"a": "{text}"}, r"data\.valid\.a: data\.train holds out a set of"),
        ("{set}", 0.1, r"is a prepared set, of which nothing can be held out"),
        ("{one}", 0.1, r"one\.jsonl: holds one row, of which data\.valid = 0\.1 cannot be held out"),
        ("{word}", 0.1, r"valid: data\.valid = 0\.1 leaves no document for this part \(valid\)"),
    ],
)
def test_what_cannot_be_held_out_is_said(tmp_path: Path, train: Any, share: Any, says: str) -> None:
    text = write(tmp_path / "a.txt", "a text of some words")
    places = {"text": text, "set": str(made(text, tmp_path / "sets").folder)}
    places["one"] = write(tmp_path / "one.jsonl", '{"prompt": "a", "completion": "b"}')
    places["word"] = write(tmp_path / "word.txt", "onewordalone")
    for name, place in places.items():
        train, share = (json.loads(json.dumps(one).replace(f"{{{name}}}", place)) for one in (train, share))
    with pytest.raises((ConfigError, DataError), match=says):
        prepare_all(train, share, "bytes", 300, 4, tmp_path / "cache", False)


def test_a_tokenizer_is_trained_on_what_is_not_held_out(tmp_path: Path) -> None:
    text = "the same few words again and again " * 40
    file = write(tmp_path / "a.txt", text + "\u4e2d\u6587" * 3)
    done = prepare_all(file, 0.02, "sentencepiece", 300, 8, tmp_path / "cache", False)
    assert "\u4e2d" not in done.tokenizer.backend.get_vocab()
    whole = prepare_all(file, None, "sentencepiece", 300, 8, tmp_path / "cache", False)
    assert "\u4e2d" in whole.tokenizer.backend.get_vocab()
    assert [one.name for one in parse_all(file, 0.02)[1]] == ["valid"]
