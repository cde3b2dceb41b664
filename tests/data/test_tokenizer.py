"""The ids of training data, of the saved tokenizer and of SentencePiece are the same, for strange texts too."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer

from lptransformer.data import tokenizer
from lptransformer.errors import ConfigError, DataError

STRANGE = [
    "",
    " ",
    "\n",
    "plain words, and more.",
    " leading space",
    "   three leading",
    "trailing  ",
    "two  spaces   three    four",
    "tabs\tand\t\ttabs",
    "line\nline\n\nparagraph\r\nwindows\n\n\n\nmany",
    "\n \n \t\n",
    "café naïve e\u0301 ﬁ ２ Ａ",
    "😀 👩‍👩‍👧 🇫🇷 🏴",
    "日本語のテキスト 中文 한국어 العربية עברית",
    "\ufeffbyte order mark \u200b \u00a0 \u3000 \u2028",
    "\x00\x01\x1f\x7f",
    "<s>",
    "</s>",
    "a </s> b <s>c</s> <unk> <pad> <0x41>",
    "word</s>\n\n<s>word",
    "the sign \u2581 itself \u2581\u2581x",
    "--------- ........ ********** ======",
    "aaaaaaaaaaaaaaaaaaaaaaa oooooo",
    "\u2047 \u2585 \ufffd",
    "x" * 500,
]


def make_text(words: int = 6000, seed: int = 0) -> str:
    """Something like prose: repeated words, punctuation, broken lines, paragraphs, a rule."""
    rng = random.Random(seed)
    stems = ["the", "of", "and", "whale", "captain", "sea", "don't", "said", "ship-wreck", "never", "went", "café"]
    stems += ["".join(rng.choices("abcdefghiklmnorstuw", k=rng.randint(2, 9))) for _ in range(150)]
    parts = []
    for number in range(words):
        parts.append(rng.choice(stems[: rng.choice([12, 60, 162])]))
        parts.append(rng.choice([" "] * 12 + [", ", ".\n", '."\n\n', "\n", "--", "! ", "\n------\n", "  "]))
        if number % 1000 == 0:
            parts.append("...........\n\n\n")
    return "".join(parts)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[tokenizer.Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    return tokenizer.train_sentencepiece([make_text()], 500, folder), folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as GPT-2's: byte-level BPE, only tokenizer.json and the model's config.json, and it asks to truncate."""
    folder = tmp_path_factory.mktemp("byte_level")
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    rust.decoder = decoders.ByteLevel()  # pyright: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    rust.train_from_iterator([make_text()], trainer)
    rust.enable_truncation(8)
    rust.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def ids_of(opened: object, text: str) -> list[int]:
    return opened.encode(text, add_special_tokens=False)  # type: ignore[attr-defined]


def test_trained_ids_are_those_of_sentencepiece_and_of_the_saved_folder(
    trained: tuple[tokenizer.Tokenizer, Path],
) -> None:
    ours, folder = trained
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    saved = AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == 500 == len(original) == len(saved)
    for text in STRANGE:
        ids = ours.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert ids.tolist() == original.encode(text) == ids_of(saved, text), repr(text)
        assert ours.decode(ids) == text.replace("\u2581", " "), repr(text)


def test_trained_ids_are_those_of_sentencepiece_for_random_texts(trained: tuple[tokenizer.Tokenizer, Path]) -> None:
    ours, folder = trained
    original = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    rng = random.Random(1)
    parts = [*" \n\t-.aeost,\"'é😀", "  ", "--", "---", "\n\n", "the", " the", "<s>", "</s>", "\u2581", "..", ' "']
    texts = ["".join(p * rng.choice([1, 1, 1, 2, 7]) for p in rng.choices(parts, k=25)) for _ in range(3000)]
    assert [ids.tolist() for ids in ours.encode_many(texts)] == original.encode(texts)


def test_the_places_of_tokens_are_where_their_text_begins(
    trained: tuple[tokenizer.Tokenizer, Path], byte_level: Path
) -> None:
    """The bytes up to each place are those of the ids before it, but within a character of several tokens."""
    text = "".join(STRANGE[1:13]) + make_text(9000)  # longer than a piece
    assert tokenizer.load("bytes").encode_with_places("aé!")[1].tolist() == [0, 1, 2, 3]
    for ours in (trained[0], tokenizer.load(byte_level)):
        ids, places = ours.encode_with_places(text)
        assert np.array_equal(ids, ours.encode(text)) and places.shape == ids.shape and places[0] == 0
        encoded, checked = text.encode(), 0
        for number in range(1, len(ids), 7):
            if (before := ours.decode(ids[:number])) == text[: len(before)] and "\ufffd" not in before[-1:]:
                assert places[number] == len(before.encode()), (number, before[-20:])
                checked += 1
            if number > 700:
                break
        assert checked > 60 and places[-1] < len(encoded) and (np.diff(places) >= 0).all()
        tail = ours.decode(ids[-5:])
        assert tail == encoded[places[-5] :].decode()


def test_a_literal_special_token_in_a_text_is_text(trained: tuple[tokenizer.Tokenizer, Path]) -> None:
    for ours in (trained[0], tokenizer.load("bytes")):
        assert ours.end_of_text_id is not None
        ids = ours.encode("one </s> two <s></s>")
        assert ids.min() >= 3  # 0, 1, 2 are the special tokens
        assert ours.decode(ids) == "one </s> two <s></s>"
        assert ours.decode([*ids, ours.end_of_text_id]).endswith("</s></s>")


def test_encode_adds_no_special_tokens_and_neither_does_the_saved_folder(
    trained: tuple[tokenizer.Tokenizer, Path],
) -> None:
    ours, folder = trained
    assert AutoTokenizer.from_pretrained(folder)("the sea")["input_ids"] == ours.encode("the sea").tolist()


def test_line_breaks_become_part_of_entries(trained: tuple[tokenizer.Tokenizer, Path]) -> None:
    assert len(trained[0].encode(".\n")) == 1


def test_a_long_text_is_cut_without_changing_its_ids(
    trained: tuple[tokenizer.Tokenizer, Path], byte_level: Path
) -> None:
    text = make_text(20_000, seed=3) + "".join(STRANGE) * 20 + make_text(3000, seed=4)
    blocks = [text[i : i + 5000] for i in range(0, len(text), 5000)]
    for ours in (trained[0], tokenizer.load(byte_level)):
        pieces = list(ours.pieces(blocks))
        assert len(pieces) >= len(text) // (3 * tokenizer.PIECE_CHARACTERS) and "".join(pieces) == text
        whole = ours.backend.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert np.concatenate(ours.encode_many(pieces)).tolist() == whole == ours.encode(text).tolist()


def test_a_text_whose_white_space_is_never_alone_is_cut_too(
    trained: tuple[tokenizer.Tokenizer, Path], byte_level: Path
) -> None:
    """Line ends of two characters between lines without a blank, as in many Chinese and Japanese books."""
    text = "".join("".join(make_text(30, seed=seed).split()) + "\r\n" for seed in range(1000))
    for ours in (trained[0], tokenizer.load(byte_level)):
        pieces = list(ours.pieces([text]))
        assert len(pieces) >= len(text) // (3 * tokenizer.PIECE_CHARACTERS) > 1 and "".join(pieces) == text
        whole = ours.backend.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert np.concatenate(ours.encode_many(pieces)).tolist() == whole


def test_cuts_that_would_change_ids_are_refused(
    monkeypatch: pytest.MonkeyPatch, trained: tuple[tokenizer.Tokenizer, Path]
) -> None:
    """The test above could pass if no cut mattered: cut anywhere, and the ids do change."""
    monkeypatch.setattr(tokenizer, "_CUT", re.compile("(?=.)", re.DOTALL))
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 250)
    text = make_text(3000, seed=5)
    whole = trained[0].encode_many([text])[0].tolist()
    assert trained[0].encode(text).tolist() == whole
    pieces = [text[i : i + 250] for i in range(0, len(text), 250)]
    assert np.concatenate(trained[0].encode_many(pieces)).tolist() != whole


def test_training_twice_gives_the_same_bytes(trained: tuple[tokenizer.Tokenizer, Path], tmp_path: Path) -> None:
    text = make_text()
    half = text.index(" ", len(text) // 2)
    again = tokenizer.train_sentencepiece(iter([text]), 500, tmp_path / "again")
    assert again.files == trained[0].files and again.fingerprint == trained[0].fingerprint
    other = tokenizer.train_sentencepiece([text[half:]], 500, tmp_path / "other")
    assert other.fingerprint != again.fingerprint


def test_a_big_corpus_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "SAMPLE_CHARACTERS", 10_000)
    texts = [f"{number:05d} " * 300 for number in range(100)]
    sample = tokenizer._sample(texts)
    assert 5_000 <= sum(len(sentence) for sentence in sample) <= 10_000
    numbers = [int(sentence.split()[0]) for sentence in sample]
    assert numbers[0] == 0 and numbers[-1] > 75 and len(set(np.diff(numbers))) <= 2
    assert tokenizer._sample(["word " * 1000])[0].startswith("word")
    assert "".join(tokenizer._sample(["a b\n\n" * 300])) == "a b\n\n" * 300  # what is not thinned is all there


def test_one_endless_line_can_be_trained_on(tmp_path: Path) -> None:
    ours = tokenizer.train_sentencepiece([make_text(3000).replace("\n", " ")], 400, tmp_path / "t")
    assert len(ours.encode("the captain said")) < len("the captain said")


@pytest.mark.parametrize("kind", ["trained", "bytes", "byte_level"])
def test_saved_folders_open_again_with_the_same_ids_and_fingerprint(
    kind: str, trained: tuple[tokenizer.Tokenizer, Path], byte_level: Path, tmp_path: Path
) -> None:
    ours = {"trained": trained[1], "bytes": "bytes", "byte_level": byte_level}[kind]
    ours = tokenizer.load(ours)
    ours.save(tmp_path / "saved")
    again, by_transformers = tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    by_transformers.save_pretrained(tmp_path / "resaved")
    resaved = tokenizer.load(tmp_path / "resaved")
    assert ours.fingerprint == again.fingerprint == resaved.fingerprint and len(ours.fingerprint) == 64
    assert ours.vocab_size == again.vocab_size == resaved.vocab_size
    assert ours.end_of_text_id == again.end_of_text_id == resaved.end_of_text_id is not None
    for text in STRANGE:
        ids = ours.encode(text).tolist()
        assert ids == again.encode(text).tolist() == ids_of(by_transformers, text) == resaved.encode(text).tolist()


def test_bytes_are_bytes_plus_three() -> None:
    ours = tokenizer.load("bytes")
    assert (ours.vocab_size, ours.end_of_text_id) == (259, 1)
    assert ours.encode("aé").tolist() == [97 + 3, 0xC3 + 3, 0xA9 + 3]
    hf = ByT5Tokenizer(extra_ids=0, split_special_tokens=True)
    for text in STRANGE:
        assert ours.encode(text).tolist() == ids_of(hf, text)
        assert ours.decode(ours.encode(text)) == text


def test_a_byte_tokenizer_with_other_ids_has_another_fingerprint(tmp_path: Path) -> None:
    ByT5Tokenizer().save_pretrained(tmp_path / "byt5")
    ours = tokenizer.load(tmp_path / "byt5")
    assert ours.vocab_size == 384 and ours.fingerprint != tokenizer.load("bytes").fingerprint
    assert ours.encode("a</s>").tolist() == [100, 1]  # as that folder's own configuration says


def test_a_folder_that_asks_to_truncate_is_not_truncated(byte_level: Path) -> None:
    assert len(tokenizer.load(byte_level).encode("the sea and the ship " * 10)) > 8


def test_a_folder_is_opened_with_its_own_special_tokens(byte_level: Path) -> None:
    ours = tokenizer.load(byte_level)
    assert ours.end_of_text_id == ours.encode("<|endoftext|>").tolist()[0] == 0
    assert json.loads(ours.files["tokenizer_config.json"])["tokenizer_class"] == "GPT2Tokenizer"
    assert "config.json" not in ours.files


def sentencepiece_model(path: Path, **options: object) -> Path:
    settings = dict(vocab_size=500, model_type="bpe", byte_fallback=True, normalization_rule_name="identity")
    settings |= dict(add_dummy_prefix=False, remove_extra_whitespaces=False, minloglevel=2) | options
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(make_text().split("\n")), model_writer=file, **settings
        )
    return path


@pytest.mark.parametrize("prefix", [False, True])
def test_a_model_file_is_opened_with_sentencepieces_ids(tmp_path: Path, prefix: bool) -> None:
    """But for a text that begins with a space, under a model that puts one before every text: Hugging Face's
    tokenizers leave it at one space."""
    path = sentencepiece_model(tmp_path / "tokenizer.model", add_dummy_prefix=prefix)
    original = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for ours in (tokenizer.load(path), tokenizer.load(tmp_path)):
        for text in [*STRANGE, make_text(12_000, seed=6)]:
            expected = original.encode(text)[1 if prefix and text.startswith(" ") else 0 :]
            assert ours.encode(text).tolist() == expected, repr(text[:50])


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"byte_fallback": False},
    ],
)
def test_a_model_file_that_transformers_would_read_otherwise_is_refused(
    tmp_path: Path, options: dict[str, object]
) -> None:
    path = sentencepiece_model(tmp_path / "other.model", **options)
    with pytest.raises(DataError, match=r"other\.model: .*other ids than SentencePiece.*identity normalisation"):
        tokenizer.load(path)


def test_sentencepieces_errors_are_translated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.vocab_size: .* 90000 entries .*at most \d+ are possible") as caught:
        tokenizer.train_sentencepiece([make_text(300)], 90_000, tmp_path / "t")
    most = int(str(caught.value).split("at most ")[1].split()[0])
    assert tokenizer.train_sentencepiece([make_text(300)], most, tmp_path / "most").vocab_size == most
    with pytest.raises(ConfigError, match=r"data\.vocab_size: .* 265 entries .*alone need \d+"):
        tokenizer.train_sentencepiece([make_text(300)], 265, tmp_path / "t")
    with pytest.raises(DataError, match="no text"):
        tokenizer.train_sentencepiece([], 500, tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "broken.model").write_bytes(b"this is no model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model_only").mkdir()
    (tmp_path / "model_only" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text('{"version": "1.0", "model"')
    for name, says in [
        ("absent", r"data\.tokenizer: .*absent does not exist; give 'sentencepiece'"),
        ("notes.txt", r"notes\.txt is not a SentencePiece \.model file"),
        ("broken.model", r"broken\.model: not a SentencePiece model"),
        ("empty", r"empty: not the folder of a Hugging Face tokenizer"),
        ("model_only", r"model_only: (holds no vocabulary|not the folder)"),
        ("torn", r"torn: not the folder of a Hugging Face tokenizer"),
    ]:
        with pytest.raises(DataError, match=says) as caught:
            tokenizer.load(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="trained on the training text"):
        tokenizer.load("sentencepiece")


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    """Where the library knows the class it needs none; else it would ask on the terminal."""
    tokenizer.load("bytes").save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    content = {**json.loads(path.read_text()), "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\nclass Own: pass\n")
    path.write_text(json.dumps(content))
    assert tokenizer.load(tmp_path).is_bytes
    path.write_text(json.dumps({**content, "tokenizer_class": "Own"}))
    with pytest.raises(DataError, match=r"needs code of its own \(auto_map in tokenizer_config\.json\)") as caught:
        tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "executed").exists()


def test_importing_is_light() -> None:
    code = (
        "import sys; from lptransformer.data.tokenizer import check_name; check_name('bytes')\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'sentencepiece') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
