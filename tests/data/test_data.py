"""Token sets hold exactly the text, are never half there, and every process sees the same micro-batches."""

import json
import os
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from lptransformer import files
from lptransformer.data import prepare as preparing
from lptransformer.data import readers, rows, tokenizer, train_stream, windows
from lptransformer.data.prepare import prepare, prepare_all
from lptransformer.data.readers import parse_sources
from lptransformer.data.token_set import TokenSet
from lptransformer.data.train_stream import TrainStream
from lptransformer.errors import ConfigError, DataError

BYTES = tokenizer.load("bytes")
END = 1  # of a document, in bytes
TEXT = "One morning, café and tea.\n\nThe  whale\tsaid:\r\n “no” 😀\n"


def bytes_of(*texts: str) -> list[int]:
    """The ids of documents, from the definition."""
    joined: list[int] = []
    for number, text in enumerate(texts):
        joined += ([END] if number else []) + [byte + 3 for byte in text.encode()]
    return joined


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def one(spec: Any) -> readers.Source:
    (source,) = parse_sources(spec, "train")
    return source


def make(folder: Path, text: str | bytes = TEXT, length: int = 8, name: str = "a.txt") -> TokenSet:
    """A token set of bytes made of one file."""
    return prepare(one(write(folder / name, text)), BYTES, length, folder / "cache")


def ids_of(token_set: TokenSet) -> list[int]:
    return np.concatenate([token_set.row(i) for i in range(len(token_set))]).tolist()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def prose(words: int = 3000, seed: int = 0) -> str:
    rng = random.Random(seed)
    stems = ["".join(rng.choices("abcdeinorst", k=rng.randint(1, 7))) for _ in range(80)]
    return "".join(rng.choice(stems) + rng.choice([" ", " ", " ", ", ", ".\n", "\n\n"]) for _ in range(words))


# ---- what a set holds


def test_windows_hold_the_text_in_order(tmp_path: Path) -> None:
    made = make(tmp_path, TEXT * 3)
    assert ids_of(made) == bytes_of(TEXT * 3)
    tokens = len((TEXT * 3).encode())
    assert [len(made.row(i)) for i in range(len(made))] == [8] * (tokens // 8) + [tokens % 8]
    assert made.full_rows == len(made) - 1 == tokens // 8
    manifest = {key: made.manifest[key] for key in ("tokens", "bytes", "words", "documents", "rows", "sequence_length")}
    assert manifest == {
        "tokens": tokens,
        "bytes": tokens,
        "words": len((TEXT * 3).split()),
        "documents": 1,
        "rows": len(made),
        "sequence_length": 8,
    }


def test_documents_of_all_formats_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second file ")
    write(tmp_path / "a.md", "first é")
    write(tmp_path / "c.jsonl", '{"text": "line one\\n", "id": 3}\n\n{"text": ""}\n{"text": "line two"}')
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["row one", "", "row two"]}), tmp_path / "d.parquet")
    made = prepare(one([f"{tmp_path}/[ab].*", f"{tmp_path}/*.*"]), BYTES, 16, tmp_path / "cache")
    documents = ["first é", "second file ", "line one\n", "line two", "row one", "row two"]
    assert ids_of(made) == bytes_of(*documents)
    assert made.manifest["documents"] == 6
    assert made.manifest["tokens"] == sum(len(document.encode()) for document in documents) + 5
    assert made.manifest["bytes"] == sum(len(document.encode()) for document in documents)
    assert made.manifest["words"] == sum(len(document.split()) for document in documents)
    assert [source["path"] for source in made.manifest["sources"]] == ["a.md", "b.txt", "c.jsonl", "d.parquet"]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_reading_in_blocks_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    text = prose(1500) + "é😀 “quoted” \t\n  x" * 50
    path = write(tmp_path / "a.txt", text)
    ours = BYTES if kind == "bytes" else tokenizer.train_sentencepiece([text], 400, tmp_path / "tokenizer")
    whole = prepare(one(path), ours, 32, tmp_path / "whole")
    for module in (rows, windows):
        monkeypatch.setattr(module, "_BLOCK", 7)
    monkeypatch.setattr(preparing, "_ROWS_PER_CHUNK", 3)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 300)
    blocks = prepare(one(path), ours, 32, tmp_path / "blocks")
    assert len(blocks.chunks) > 10 * len(whole.chunks)
    assert ids_of(blocks) == ids_of(whole) == ours.backend.encode(text, add_special_tokens=False)
    ours_alone = {"files": None, "sum": None}  # the chunks in a file are others
    assert blocks.manifest | ours_alone == whole.manifest | ours_alone
    assert whole.manifest["words"] == len(text.split()) and whole.manifest["bytes"] == len(text.encode())


def test_the_folder_is_one_that_datasets_opens(tmp_path: Path) -> None:
    made = make(tmp_path)
    opened = datasets.load_from_disk(str(made.folder))
    assert opened.features["input_ids"].feature.dtype == "uint16"
    assert sum(opened["input_ids"], []) == bytes_of(TEXT)
    wide = prepare(one(str(tmp_path / "a.txt")), replace(BYTES, vocab_size=70_000), 8, tmp_path / "wide")
    assert wide.row(0).dtype == np.int32 and ids_of(wide) == bytes_of(TEXT)


def test_rows_are_memory_mapped(tmp_path: Path) -> None:
    row = make(tmp_path).row(1)
    assert not row.flags.owndata and not row.flags.writeable


# ---- making sets


def test_preparing_twice_gives_identical_bytes(tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        write(tmp_path / place / "a.txt", prose())
        write(tmp_path / place / "b.jsonl", json.dumps({"text": prose(300, seed=1)}))
        spec = {"books": f"{tmp_path}/{place}/a.txt", "lines": f"{tmp_path}/{place}/*.jsonl"}
        prepare_all(spec, f"{tmp_path}/{place}/a.txt", "sentencepiece", 400, 32, tmp_path / place / "cache")
    one_cache, other = contents(tmp_path / "one/cache"), contents(tmp_path / "two/deeper/cache")
    assert len(one_cache) == 3 + 3 * 4 and one_cache == other  # tokenizer: 3 files; a token set: 4
    assert not any(str(tmp_path).encode() in content for content in one_cache.values())


def test_the_second_time_everything_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = {"a": write(tmp_path / "a.txt", prose()), "b": write(tmp_path / "b.txt", prose(seed=1))}
    first = prepare_all(train, train["a"], "sentencepiece", 400, 32, tmp_path / "cache")
    before = contents(tmp_path / "cache")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(preparing, "_write_windows", never)
    monkeypatch.setattr(tokenizer, "train_sentencepiece", never)
    again = prepare_all(train, train["a"], "sentencepiece", 400, 32, tmp_path / "cache")
    assert [s.tokens.folder for s in again.train] == [s.tokens.folder for s in first.train]
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint and contents(tmp_path / "cache") == before
    for vocab_size, length in ((401, 32), (400, 33)):
        with pytest.raises(AssertionError, match="made again"):
            prepare_all(train, None, "sentencepiece", vocab_size, length, tmp_path / "cache")
    write(tmp_path / "a.txt", prose(seed=2))
    with pytest.raises(AssertionError, match="made again"):
        prepare_all(train, None, "sentencepiece", 400, 32, tmp_path / "cache")
    assert contents(tmp_path / "cache") == before


def test_an_interrupted_prepare_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt", prose())
    for module in (rows, windows):
        monkeypatch.setattr(module, "_BLOCK", 100)
    encode, calls = tokenizer.Tokenizer.encode_many, []

    def stopped(self: tokenizer.Tokenizer, texts: Any) -> Any:
        calls.append(1)
        if len(calls) > 20:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(tokenizer.Tokenizer, "encode_many", stopped)
    with pytest.raises(KeyboardInterrupt):
        prepare(one(path), BYTES, 8, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_killed_prepare_leaves_nothing_that_looks_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = one(write(tmp_path / "a.txt", prose()))
    write_text = Path.write_text

    def killed(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "manifest.json":
            os._exit(7)
        return write_text(path, *arguments, **options)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(Path, "write_text", killed)
            prepare(source, BYTES, 8, tmp_path / "cache")
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    left = list((tmp_path / "cache").iterdir())
    assert len(left) == 1 and left[0].name.startswith(".unfinished-") and (left[0] / "state.json").exists()
    with pytest.raises(DataError, match=r"not a complete token set: it has no manifest\.json"):
        TokenSet.open(left[0])
    with pytest.raises(DataError, match="folder without a complete token set"):
        parse_sources(str(left[0]), "train")
    assert ids_of(prepare(source, BYTES, 8, tmp_path / "cache")) == bytes_of(prose())
    assert not left[0].exists()


def test_what_a_killed_prepare_left_is_removed_and_what_is_being_written_is_not(tmp_path: Path) -> None:
    path, cache = write(tmp_path / "a.txt", TEXT), tmp_path / "cache"
    left = cache / ".unfinished-tokenizer-0123456789abcdef-0123456789ab"
    write(left / "tokenizer.json", "{")
    with files.unfinished(cache / "other") as alive:
        prepare_all(path, None, "bytes", 300, 8, cache)
        assert alive.is_dir() and not left.exists()
    assert sorted(one.name.split("-")[0] for one in cache.iterdir()) == ["tokenizer", "train"]


def test_two_at_once_do_not_hurt_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a second prepare runs between the beginning and the end of the first."""
    source = one(write(tmp_path / "a.txt", prose()))
    write_windows, inner = preparing._write_windows, []

    def interleaved(*arguments: Any) -> int:
        if not inner:
            inner.append(None)
            inner[0] = prepare(source, BYTES, 8, tmp_path / "cache")
            inner.append(inner[0].folder.stat().st_ino)
        return write_windows(*arguments)

    monkeypatch.setattr(preparing, "_write_windows", interleaved)
    outer = prepare(source, BYTES, 8, tmp_path / "cache")
    assert outer.folder == inner[0].folder and ids_of(outer) == ids_of(inner[0]) == bytes_of(prose())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [outer.folder.name]
    assert outer.folder.stat().st_ino == inner[1]  # a folder that others may be reading is not replaced


def test_a_set_appears_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_windows, built = preparing._write_windows, []

    def noted(folder: Path, *arguments: Any) -> int:
        built.append(folder.stat().st_ino)
        return write_windows(folder, *arguments)

    monkeypatch.setattr(preparing, "_write_windows", noted)
    assert make(tmp_path).folder.stat().st_ino == built[0]  # renamed, not copied


def test_a_set_that_lost_its_manifest_is_prepared_again(tmp_path: Path) -> None:
    made = make(tmp_path)
    (made.folder / "manifest.json").unlink()
    (made.folder / preparing._DATA_FILE).write_bytes(b"rubbish")
    assert ids_of(make(tmp_path)) == bytes_of(TEXT)


def test_a_failed_prepare_leaves_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT.encode() * 3 + b"\xff")
    rows_with_bad = [{"prompt": prose(300), "completion": "x"}, {"prompt": "a", "completion": ""}]
    pairs = write(tmp_path / "pairs.jsonl", "\n".join(map(json.dumps, rows_with_bad)))
    for number, (spec, kind) in enumerate([(path, "bytes"), (path, "sentencepiece"), (pairs, "sentencepiece")]):
        with pytest.raises(DataError):
            prepare_all(spec, None, kind, 300, 8, tmp_path / str(number))
        assert list((tmp_path / str(number)).iterdir()) == []


def test_a_tokenizer_stays_where_a_set_has_it(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.txt", prose()), write(tmp_path / "b.txt", TEXT.encode() + b"\xff")
    with pytest.raises(DataError, match="not UTF-8"):
        prepare_all(good, bad, "sentencepiece", 400, 8, tmp_path / "cache")
    assert sorted(one.name.split("-")[0] for one in (tmp_path / "cache").iterdir()) == ["tokenizer", "train"]


def test_without_a_terminal_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.txt", prose())
    prepare_all(path, path, "sentencepiece", 400, 8, tmp_path / "cache", progress=True)
    assert capfd.readouterr() == ("", "")


# ---- all of a configuration


def test_prepare_all_with_sentencepiece_end_to_end(tmp_path: Path) -> None:
    texts = [prose(800, seed=i) for i in range(3)] + ["</s> and <s> are text\n", "  x "]
    write(tmp_path / "books/a.txt", prose(900, seed=9))
    write(tmp_path / "lines.jsonl", "\n".join(json.dumps({"text": text}) for text in texts))
    done = prepare_all(
        {"books": {"files": f"{tmp_path}/books/*", "weight": 2}, "lines": {"files": [f"{tmp_path}/l*"], "weight": 1.5}},
        [f"{tmp_path}/lines.jsonl"],
        "sentencepiece",
        420,
        16,
        tmp_path / "cache",
    )
    assert [(source.name, source.weight) for source in done.train] == [("books", 2), ("lines", 1.5)]
    assert list(done.valid) == ["valid"] and done.tokenizer.vocab_size == 420
    assert done.tokenizer_folder.parent == tmp_path / "cache"
    hf = AutoTokenizer.from_pretrained(done.tokenizer_folder)
    joined: list[int] = []
    for text in texts:
        joined += ([hf.eos_token_id] if joined else []) + hf.encode(text, add_special_tokens=False)
    assert ids_of(done.train[1].tokens) == ids_of(done.valid["valid"]) == joined
    assert (done.train[1].tokens.row(0) == done.valid["valid"].row(0)).all()


def test_a_prepared_folder_stands_in_for_its_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", prose())
    first = prepare_all({"books": path}, path, "sentencepiece", 400, 16, tmp_path / "cache")
    os.remove(path)
    train, valid = str(first.train[0].tokens.folder), {"held_out": str(first.valid["valid"].folder)}
    for name in ("sentencepiece", str(first.tokenizer_folder)):
        again = prepare_all(train, valid, name, 999, 16, tmp_path / "other")
        assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
        assert again.train[0].tokens.folder == first.train[0].tokens.folder
        assert again.valid["held_out"].manifest == first.valid["valid"].manifest
    with pytest.raises(DataError, match=r"prepared with windows of 16 tokens, but data\.sequence_length is 32"):
        prepare_all(train, None, "sentencepiece", 400, 32, tmp_path / "other")
    with pytest.raises(
        DataError, match=r"another tokenizer \(vocabulary 400, .*data\.tokenizer gives \(vocabulary 259"
    ):
        prepare_all(train, None, "bytes", 400, 16, tmp_path / "other")
    moved = tmp_path / "elsewhere" / "set"
    moved.parent.mkdir()
    first.train[0].tokens.folder.rename(moved)
    with pytest.raises(DataError, match=r"elsewhere/set: the tokenizer that made it is not .*set data\.tokenizer"):
        prepare_all(str(moved), None, "sentencepiece", 400, 16, tmp_path / "other")


def test_the_forms_that_sources_can_take(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "sub/b.txt", "b")

    def names(spec: Any) -> list[tuple[str, list[str], float | None]]:
        return [(s.name, [path.name for path in s.files], s.weight) for s in parse_sources(spec, "valid")]

    assert names(a) == [("valid", ["a.txt"], None)]
    assert names([b, a, f"{tmp_path}/*.txt"]) == [("valid", ["b.txt", "a.txt"], None)]
    assert names(f"{tmp_path}/**/*.txt") == [("valid", ["a.txt", "b.txt"], None)]
    assert names({"x": a, "y-2": [b]}) == [("x", ["a.txt"], None), ("y-2", ["b.txt"], None)]
    assert names({"x": {"files": a, "weight": 3}, "y": {"files": [a, b], "weight": 0.5}}) == [
        ("x", ["a.txt"], 3),
        ("y", ["a.txt", "b.txt"], 0.5),
    ]
    assert names(None) == names({}) == []
    write(tmp_path / "odd[1].txt", "x")
    assert names(f"{tmp_path}/odd[1].txt") == [("valid", ["odd[1].txt"], None)]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"a/b": "{file}"}, r"data\.train\.a/b: a name is made of"),
        ({"a": 3}, r"data\.train\.a: 3 is neither a glob nor a list of globs"),
        ([], r"data\.train: \[\] is neither a glob nor"),
        ({"a": {"glob": "{file}"}}, r"data\.train\.a: has the keys \['glob'\]; right are: files"),
        ({"a": {"files": "{file}", "weight": 0}}, r"data\.train\.a\.weight: 0 is not a number above 0"),
        ({"a": {"files": "{file}", "weight": float("nan")}}, r"data\.train\.a\.weight: nan is not"),
        ({"a": {"files": "{file}", "weight": 1}, "b": "{file}"}, r"data\.train: .*give one to all or to none"),
        ({}, r"data\.train: names no text"),
    ],
)
def test_sources_of_another_form_are_refused(tmp_path: Path, spec: Any, says: str) -> None:
    file = write(tmp_path / "a.txt", "text")
    spec = json.loads(json.dumps(spec).replace("{file}", file))
    with pytest.raises(ConfigError, match=says):
        prepare_all(spec, None, "bytes", 0, 2, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# ---- text that is not as it should be


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b" \n\t \n", r"a\.txt: holds no text"),
        ("a.txt", b"good\xc3\xa9 \xff bad", r"a\.txt: not UTF-8 text: the byte at offset 7 "),
        ("a.txt", b"cut short \xf0\x9f", r"a\.txt: not UTF-8 text: the byte at offset 10 "),
        ("a.txt", b"\xff\xfeU\x00T\x00F\x00", r"a\.txt: not UTF-8 text: the byte at offset 0 "),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"txet": "y"}\n', r"a\.jsonl, line 3: 'text' is missing: it must be a string"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, line 1: 'text' is 5: it must be a string"),
        ("a.jsonl", b'["text"]\n', r'a\.jsonl, line 1: \["text"\] is not an object'),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl, line 1: half of a surrogate pair"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xe9"}\n', r"a\.jsonl: not UTF-8 text: the byte at offset 24 "),
        ("a.jsonl", b'{"text": ""}\n\n', r"a\.jsonl: holds no text"),
        ("a.parquet", b"PAR1 nonsense", r"a\.parquet: not a readable Parquet file"),
    ],
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("block", [1 << 20, 3])
def test_a_broken_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, says: str, kind: str, block: int
) -> None:
    for module in (rows, windows):
        monkeypatch.setattr(module, "_BLOCK", block)
    write(tmp_path / "texts" / name, content)
    with pytest.raises(DataError, match=says) as caught:
        prepare_all(f"{tmp_path}/texts/*", None, kind, 300, 4, tmp_path / "cache")
    assert str(tmp_path / "texts" / name) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"body": ["x"], "id": [1]}, "has the fields 'body', 'id', not what data.format: auto needs"),
        ({"text": [1, 2]}, "row 1: 'text' is 1: it must be a string"),
        ({"text": ["x", None]}, "row 2: 'text' is null: it must be a string"),
        ({"text": pa.array([], pa.string())}, "holds no text"),
    ],
)
def test_a_broken_parquet_file_is_named(tmp_path: Path, table: dict[str, Any], says: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=rf"a\.parquet.*{re.escape(says)}"):
        prepare(one(str(tmp_path / "a.parquet")), BYTES, 4, tmp_path / "cache")


def test_ids_above_the_models_are_refused_where_a_text_uses_them(tmp_path: Path) -> None:
    """A tokenizer may have more of them than the model."""
    plain, accented = (
        write(tmp_path / "plain.txt", "plain words " * 9),
        write(tmp_path / "accented.txt", "words caf\u00e9 " * 9),
    )
    embedded = ord("z") + 4  # the bytes of ASCII, and 3 before them

    def made(train: Any, valid: Any = None) -> preparing.Prepared:
        return prepare_all(train, valid, "bytes", 300, 4, tmp_path / "cache", embedded=embedded)

    assert made([plain]).tokenizer.vocab_size > embedded
    top = max("\u00e9".encode()) + 3
    for sources in (([plain, accented],), (plain, {"held": accented}), (made_set(tmp_path, accented),)):
        with pytest.raises(DataError, match=rf"uses the id {top} \(.*\).* vocabulary of {embedded} \(ids") as caught:
            made(*sources)
        place = tmp_path / "set" if len(sources) == 1 and isinstance(sources[0], str) else accented
        assert str(caught.value).startswith(f"{place}"), caught.value


def made_set(folder: Path, text: str) -> str:
    """The same text prepared: of a set the folder is named."""
    return str(prepare(one(text), BYTES, 4, folder / "set").folder)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    for train, valid, kind, says in [
        (f"{tmp_path}/*.text", None, "bytes", r"data\.train: no file matches .*\*\.text"),
        ([path, f"{tmp_path}/b.txt"], None, "bytes", r"data\.train: no file matches .*b\.txt"),
        (path, {"held": "nothing/*"}, "bytes", r"data\.valid\.held: no file matches nothing/\*"),
        (str(tmp_path), None, "bytes", r"data\.train: .* is a folder without a complete token set; .*\*\.txt"),
        (path, None, "./tokenisers/none", r"data\.tokenizer: \./tokenisers/none does not exist"),
    ]:
        with pytest.raises(DataError, match=says):
            prepare_all(train, valid, kind, 300, 4, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", TEXT)
    with pytest.raises(DataError, match=r"data\.cache: .*a\.txt/sub/.* cannot be written: .*Not a directory"):
        prepare_all(path, None, "bytes", 0, 4, f"{path}/sub")


def test_a_text_shorter_than_a_window_is_no_training_text(tmp_path: Path) -> None:
    short, enough = write(tmp_path / "a.txt", "1234567"), write(tmp_path / "b.txt", "12345678")
    prepare_all(enough, short, "bytes", 0, 8, tmp_path / "cache")  # fine for validation
    with pytest.raises(DataError, match=r"train-.*: 7 tokens of training text .* data\.sequence_length = 8 tokens"):
        prepare_all({"x": enough, "train": short}, None, "bytes", 0, 8, tmp_path / "cache")
    with pytest.raises(DataError, match="7 tokens of training text"):
        TrainStream([prepare(one(short), BYTES, 8, tmp_path / "cache")], None, seed=0, micro_batch_size=1)


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("manifest.json", lambda b: b[: len(b) // 2], "damaged token set"),
        ("manifest.json", lambda b: b"[1]", "damaged token set"),
        ("manifest.json", lambda b: b.replace(b'"words"', b'"wrods"'), r"manifest\.json does not say words"),
        ("manifest.json", lambda b: re.sub(rb'"tokens": \d+', b'"tokens": 9999', b), r"manifest says 9999 in \d+"),
        ("manifest.json", lambda b: re.sub(rb'"rows": \d+', b'"rows": 3', b), r"manifest says \d+ in 3"),
        (preparing._DATA_FILE, lambda b: b[: len(b) // 2], "damaged token set"),
        (preparing._DATA_FILE, lambda b: b"", "damaged token set"),
        (preparing._DATA_FILE, lambda b: b + b"0", r"has \d+ bytes, and manifest\.json says \d+"),
        (preparing._DATA_FILE, lambda b: flipped(b), rf"{preparing._DATA_FILE} is not what was written \(its xxh3-128"),
        ("dataset_info.json", lambda b: b.replace(b": ", b" :", 1), r"dataset_info\.json is not what was written"),
        ("manifest.json", lambda b: b.replace(b'"files": {', b'"files": {"x": [1, "2"],'), "damaged token set"),
        (
            "manifest.json",
            lambda b: re.sub(rb'"bytes": \d+,\n +"w', b'"bytes": 9,\n"w', b),
            r"manifest\.json is not what was",
        ),
        ("state.json", lambda b: None, "damaged token set"),
    ],
)
def test_a_damaged_set_is_refused(tmp_path: Path, file: str, damage: Any, says: str) -> None:
    made = make(tmp_path, prose(), length=16)  # opened and noted as sound
    damaged = damage((made.folder / file).read_bytes())
    (made.folder / file).unlink()
    if damaged is not None:
        (made.folder / file).write_bytes(damaged)
    with pytest.raises(DataError, match=says) as caught:
        TokenSet.open(made.folder)
    assert str(made.folder) in str(caught.value) and "\n" not in str(caught.value)


def flipped(content: bytes) -> bytes:
    """With another bit in the middle: of a token set that is one of a token."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def test_a_file_that_changed_under_its_old_time_is_noticed(tmp_path: Path) -> None:
    made = make(tmp_path, prose(), length=16)
    file = made.folder / preparing._DATA_FILE
    before = file.stat()
    file.write_bytes(flipped(file.read_bytes()))  # the same inode and size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="is not what was written"):
        TokenSet.open(made.folder)


def test_a_file_that_the_disk_does_not_give_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    (made.folder / "state.json").touch()  # the note counts no more
    monkeypatch.setattr(files, "sum_of", broken)
    with pytest.raises(DataError, match=rf"damaged token set \(.*Input/output error: '.*{preparing._DATA_FILE}'\)"):
        TokenSet.open(made.folder)


def test_sums_are_read_once_and_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summed: list[str] = []
    sum_of = files.sum_of
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "notes"))
    monkeypatch.setattr(files, "sum_of", lambda path: (summed.append(path.name), sum_of(path))[1])

    def read(folder: Path) -> list[str]:
        summed.clear()
        assert TokenSet.open(folder).largest_id == ord("w") + 3
        return list(summed)

    folder = make(tmp_path, "one two", length=4).folder
    of_set = [preparing._DATA_FILE, "dataset_info.json", "state.json"]
    assert read(folder) == [] and read(folder.parent / "." / folder.name) == []
    (folder / "state.json").touch()
    assert read(folder) == of_set and read(folder) == []
    shutil.copytree(folder, tmp_path / "copy")
    assert read(tmp_path / "copy") == of_set and read(folder) == []
    shutil.rmtree(tmp_path / "copy")
    (folder / "state.json").touch()
    assert read(folder) == of_set
    (note,) = (tmp_path / "notes").rglob("*.json")
    assert list(json.loads(note.read_text())) == [str(folder)]  # what is gone is forgotten
    note.write_text("[")
    assert read(folder) == of_set and read(folder) == []
    monkeypatch.setenv("XDG_CACHE_HOME", write(tmp_path / "file", ""))  # nothing can be noted
    assert read(folder) == of_set and read(folder) == of_set


@pytest.mark.parametrize("vocab_size", [1000, 1 << 17])  # uint16, int32
def test_a_set_of_an_older_version_has_no_sums_and_sound_ids(tmp_path: Path, vocab_size: int) -> None:
    wide = replace(BYTES, vocab_size=vocab_size)
    made = prepare(one(write(tmp_path / "a.txt", "one two")), wide, 4, tmp_path / "cache")
    manifest = {name: value for name, value in made.manifest.items() if name not in ("files", "sum")}
    write(made.folder / "manifest.json", json.dumps(manifest))
    assert ids_of(TokenSet.open(made.folder)) == ids_of(made)
    write(made.folder / "manifest.json", json.dumps({**manifest, "vocab_size": ord("w") + 3}))
    with pytest.raises(DataError, match=f"holds the id {ord('w') + 3}, and its vocabulary has {ord('w') + 3} ids"):
        TokenSet.open(made.folder)
    if vocab_size > 1 << 16:
        file = made.folder / preparing._DATA_FILE
        content = file.read_bytes()
        write(file, content.replace(np.int32(ord("w") + 3).tobytes(), np.int32(-1).tobytes()))
        with pytest.raises(DataError, match=f"holds the id {2**32 - 1}"):
            TokenSet.open(made.folder)


# ---- batches


def test_evaluation_batches_hold_every_label_once(tmp_path: Path) -> None:
    text = "abcdefghij klmnopqrs tuv"  # 24 bytes: rows of 7, 7, 7, 3
    made = make(tmp_path, text, length=7)
    batches = list(made.batches(3))
    assert len(batches) == made.num_batches(3) == 2
    ids = bytes_of(text)
    for batch in batches:
        assert batch.input_ids.shape == batch.labels.shape == (3, 7)
        assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batches[0].input_ids.tolist() == [ids[0:7], ids[7:14], ids[14:21]]
    assert batches[0].labels.tolist() == [[*ids[1:7], -100], [*ids[8:14], -100], [*ids[15:21], -100]]
    assert batches[1].input_ids.tolist() == [ids[21:24] + [0] * 4, [0] * 7, [0] * 7]
    assert batches[1].labels.tolist() == [[*ids[22:24], *[-100] * 5], [-100] * 7, [-100] * 7]
    assert [batch.label_tokens for batch in batches] == [18, 2]
    assert made.num_batches(4) == len(list(made.batches(4))) == 1


def test_a_last_row_of_one_token_has_no_label(tmp_path: Path) -> None:
    (batch,) = make(tmp_path, "abcdefghi", length=8).batches(2)
    assert batch.label_tokens == 7 and batch.labels[1].tolist() == [-100] * 8


def numbered(folder: Path, name: str, rows: int, first: int = 0) -> TokenSet:
    """A set whose full row i is the character first + i, four times; and a shorter row of 'z'."""
    text = "".join(chr(0x21 + first + i) * 4 for i in range(rows)) + "z"
    return prepare(one({name: write(folder / f"{name}.txt", text)}), BYTES, 4, folder / "cache")


def rows_of(stream: TrainStream, start: int, stop: int) -> list[int]:
    """The numbers of the rows in micro-batches start..stop-1."""
    batches = [stream.batch(index) for index in range(start, stop)]
    return [row for batch in batches for row in (batch.input_ids[:, 0] - 3 - 0x21).tolist()]


def test_an_epoch_holds_every_full_row_once_in_a_seeded_order(tmp_path: Path) -> None:
    made = numbered(tmp_path, "a", 12)
    stream = TrainStream([made], None, seed=5, micro_batch_size=3)
    assert stream.rows_per_epoch == 12
    epochs = [rows_of(stream, 4 * epoch, 4 * epoch + 4) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)  # never the shorter row
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(12))
    assert rows_of(TrainStream([made], None, seed=6, micro_batch_size=3), 0, 4) != epochs[0]
    batch = stream.batch(0)
    assert batch.labels[:, :-1].equal(batch.input_ids[:, 1:]) and (batch.labels[:, -1] == -100).all()
    assert batch.label_tokens == 9


def test_the_order_is_the_same_for_ever(tmp_path: Path) -> None:
    """A resumed run must find the order that it left, also under newer versions of NumPy and of this project."""
    stream = TrainStream([numbered(tmp_path, "a", 10)], None, seed=1, micro_batch_size=5)
    first, second = [8, 3, 7, 4, 2, 5, 9, 1, 0, 6], [0, 4, 5, 7, 1, 3, 6, 9, 2, 8]
    assert rows_of(stream, 0, 4) == first + second


def test_a_batch_is_a_function_of_its_index(tmp_path: Path) -> None:
    sets = [numbered(tmp_path, "a", 7), numbered(tmp_path, "b", 11, first=20)]
    for weights in (None, [1.0, 3.0]):
        stream = TrainStream(sets, weights, seed=0, micro_batch_size=4)
        series = [rows_of(stream, index, index + 1) for index in range(40)]
        for index in random.Random(0).sample(range(40), 40):
            fresh = TrainStream([TokenSet.open(s.folder) for s in sets], weights, seed=0, micro_batch_size=4)
            assert rows_of(fresh, index, index + 1) == rows_of(stream, index, index + 1) == series[index]
        by_row = TrainStream(sets, weights, seed=0, micro_batch_size=1)
        assert rows_of(by_row, 0, 160) == sum(series, [])  # across the borders of epochs, whatever the micro-batch


def test_permutations_are_computed_once_per_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TrainStream([numbered(tmp_path, "a", 10)], None, seed=0, micro_batch_size=3)
    permutation, calls = train_stream._permutation, []
    monkeypatch.setattr(train_stream, "_permutation", lambda *key: calls.append(key) or permutation(*key))
    rows_of(stream, 0, 20)  # 60 rows: 6 epochs
    assert len(calls) == len(set(calls)) == 12 and len(stream._orders) <= 2
    calls.clear()
    for index in (3, 2, 4, 3, 2):  # to and fro over the border of two epochs
        stream.batch(index)
    assert len(calls) == len(set(calls)) == 4


def test_weights_give_each_source_its_share(tmp_path: Path) -> None:
    sets = [numbered(tmp_path, "a", 8), numbered(tmp_path, "b", 12, first=20), numbered(tmp_path, "c", 4, first=40)]
    stream = TrainStream(sets, [2, 1, 1], seed=0, micro_batch_size=24)
    assert stream.rows_per_epoch == 24 and stream.rows_of_set == [12, 6, 6]
    epochs = [rows_of(stream, epoch, epoch + 1) for epoch in range(2)]
    for epoch in epochs:
        assert [sum(low <= row < low + 20 for row in epoch) for low in (0, 20, 40)] == [12, 6, 6]
    counts = {row: sum(epochs, []).count(row) for row in [*range(8), *range(20, 32), *range(40, 44)]}
    # Two epochs draw 24 windows of a (8 windows, three times each), 12 of b (once each) and 12 of c (three times each).
    assert counts == {
        **dict.fromkeys(range(8), 3),
        **dict.fromkeys(range(20, 32), 1),
        **dict.fromkeys(range(40, 44), 3),
    }
    assert epochs[0] != sorted(epochs[0])  # the sources are mixed, not one after the other
    tiny = TrainStream(sets, [1, 1, 1e-9], seed=0, micro_batch_size=1)
    assert tiny.rows_of_set == [12, 12, 1]
    assert TrainStream(sets, [None] * 3, seed=0, micro_batch_size=1).rows_of_set == [8, 12, 4]


def test_position_and_back(tmp_path: Path) -> None:
    stream = TrainStream([numbered(tmp_path, "a", 10)], None, seed=0, micro_batch_size=4)
    assert stream.position(0) == {"epoch": 0, "offset": 0}
    assert stream.position(2) == {"epoch": 0, "offset": 8}
    assert stream.position(7) == {"epoch": 2, "offset": 8}
    assert [stream.index(stream.position(index)) for index in range(50)] == list(range(50))
    for position in ({"epoch": 0, "offset": 3}, {"epoch": 1, "offset": 12}):
        with pytest.raises(DataError, match="no micro-batch begins at row"):
            stream.index(position)
