"""Tokenizers: one small interface over SentencePiece (trained here), raw bytes, and Hugging Face folders.

Text is always encoded by the tokenizer that is saved, exported and opened by `AutoTokenizer`, so the ids of the
training data and those of the exported model cannot differ. SentencePiece is needed to train one, or to open its
`tokenizer.model`; the converted tokenizer gives the ids of SentencePiece itself.

A literal "<s>" or "</s>" in a text is ordinary text for the tokenizers made here (SentencePiece and bytes): no text
can smuggle a special token in. A tokenizer opened from a folder treats them as its own configuration says.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lptransformer import hub
from lptransformer.errors import ConfigError, DataError

SENTENCEPIECE = "sentencepiece"
BYTES = "bytes"
SAMPLE_CHARACTERS = 20_000_000  # a SentencePiece vocabulary is trained on at most this much, spread over the whole text
PIECE_CHARACTERS = 16_384  # long texts are encoded in pieces of about this size: several times faster than at once
_NEAR = 200  # characters on both sides of a cut that are encoded to see whether the cut changes the ids
_CUTS_TRIED = 16  # then the text is left whole for another PIECE_CHARACTERS
_BYTES_OFFSET = 3  # pad, end of text, unknown
_SENTENCE = re.compile(r".{1,2000}(?!\S)|.{1,2000}", re.DOTALL)  # SentencePiece skips sentences that are too long
_CUT = re.compile(r"(?<=\S)(?=\s)")
_FILES = ["tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "special_tokens_map.json"]
_FILES += ["added_tokens.json", "chat_template*", "tekken.json"]
_NOT_VOCABULARY = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
# Everything in which another SentencePiece setting would show, if the converted tokenizer did not follow it.
_PROBE = "Plain text.  Two   spaces,\n\n\ttabs\r\n e\u0301 ﬁ ２ 😀 \u00a0\u3000x \u200b ---- .... The end </s> "


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer; `train_sentencepiece` and `load` make it.

    vocab_size: ids are below it; the number of rows of the model's embedding.
    end_of_text_id: stands between documents; None when the tokenizer has no such token.
    fingerprint: sha256 over all that decides ids. Equal fingerprints give equal ids.
    backend: the Hugging Face tokenizer.
    files: what `save` writes, by file name.
    """

    vocab_size: int
    end_of_text_id: int | None
    fingerprint: str
    backend: Any = field(repr=False, compare=False)
    files: dict[str, bytes] = field(repr=False, compare=False)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [tokens], without special tokens. A long text is encoded piece by piece."""
        return np.concatenate([np.empty(0, np.int32), *self.encode_many(list(self.pieces([text])))])

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, int32 [tokens] each, without special tokens; in parallel where that is possible."""
        if self.is_bytes:
            return [np.frombuffer(t.encode(), np.uint8).astype(np.int32) + _BYTES_OFFSET for t in texts]
        if self.backend.is_fast:
            encodings = self.backend.backend_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.asarray(encoding.ids, dtype=np.int32) for encoding in encodings]
        return [np.asarray(self.backend.encode(text, add_special_tokens=False), dtype=np.int32) for text in texts]

    def encode_with_places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text, as `encode`, and the byte of the text (UTF-8) at which each one's text begins, int64
        [tokens]; they never go back. What a tokenizer drops or trims belongs to the token behind it.

        Of a tokenizer that `knows_places`.
        """
        if self.is_bytes:
            return self.encode(text), np.arange(len(text.encode()))
        ids, places, done = [np.empty(0, np.int32)], [np.empty(0, np.int64)], 0
        for piece in self.pieces([text]):
            encoding = self.backend.backend_tokenizer.encode(piece, add_special_tokens=False)
            characters = np.frombuffer(piece.encode("utf-32-le"), np.uint32)
            lengths = 1 + (characters >= 0x80) + (characters >= 0x800) + (characters >= 0x10000)
            bytes_before = np.concatenate([[0], np.cumsum(lengths)])
            spans = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)  # in characters
            ends = np.maximum.accumulate(np.concatenate([[0], spans[:, 1]]))
            # Blanks may not be counted in: then the token before says where one begins.
            begins = np.maximum.accumulate(np.minimum(spans[:, 0], ends[:-1]))
            ids.append(np.asarray(encoding.ids, np.int32))
            places.append(done + bytes_before[begins])
            done += int(bytes_before[-1])
        return np.concatenate(ids), np.concatenate(places)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids, special tokens included."""
        return self.backend.decode([int(i) for i in ids], clean_up_tokenization_spaces=False)

    def pieces(self, blocks: Iterable[str]) -> Iterator[str]:
        """Cut one document, given as consecutive blocks of text, into pieces whose ids joined are those of the whole.

        A cut is made before white space, and only where encoding both sides apart was seen to give the same ids as
        encoding them together. A tokenizer that allows no such cut (one that puts a prefix before every text) gets
        the document whole.
        """
        if self.is_bytes:
            yield from (block for block in blocks if block)
            return
        rest, wanted = "", PIECE_CHARACTERS
        for block in blocks:
            rest += block
            start = 0
            while len(rest) - start > wanted + _NEAR:
                cut = self._cut(rest, start + wanted)
                if cut is None:
                    wanted += PIECE_CHARACTERS
                    continue
                yield rest[start:cut]
                start, wanted = cut, PIECE_CHARACTERS
            rest = rest[start:]
        if rest:
            yield rest

    def _cut(self, text: str, start: int) -> int | None:
        """The first place from `start` on where `text` can be cut without changing its ids, if one is near."""
        end = min(len(text) - _NEAR, start + PIECE_CHARACTERS)
        for tried, match in enumerate(_CUT.finditer(text, start, end)):
            cut = match.start()
            left, right = text[cut - _NEAR : cut], text[cut : cut + _NEAR]
            whole, before, after = self.encode_many([left + right, left, right])
            if np.array_equal(whole, np.concatenate([before, after])):
                return cut
            if tried + 1 == _CUTS_TRIED:
                break
        return None

    @property
    def is_bytes(self) -> bool:
        """Whether ids are UTF-8 bytes + 3, which needs no tokenizer to compute."""
        return self.fingerprint == _bytes_fingerprint()

    @property
    def adds_begin(self) -> bool:
        """Whether it puts its begin-of-text token before a text by itself."""
        begin = self.backend.bos_token_id
        return begin is not None and self.backend("a").input_ids[:1] == [begin]

    @property
    def has_template(self) -> bool:
        """Whether it can write a conversation."""
        return self.backend.chat_template is not None

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """The texts of its special and added tokens."""
        added = self.backend.added_tokens_decoder.values()
        return tuple({*self.backend.all_special_tokens, *(token.content for token in added)} - {""})

    @property
    def knows_places(self) -> bool:
        """Whether it says where in a text its tokens are."""
        return self.is_bytes or self.backend.is_fast

    def save(self, folder: str | Path) -> None:
        """Write a folder that `AutoTokenizer.from_pretrained` and `load` open, with the same ids and fingerprint."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)


def check_name(name: str) -> None:
    """Raise DataError unless `name` is "sentencepiece", "bytes", a folder, a .model file or OWNER/NAME, which may be on
    the hub. Imports nothing heavy."""
    path = Path(name)
    folder = path.is_dir() or hub.is_name(name)
    if name in (SENTENCEPIECE, BYTES) or folder or (path.is_file() and path.suffix == ".model"):
        return
    what = "is not a SentencePiece .model file" if path.is_file() else "does not exist"
    raise DataError(
        f"data.tokenizer: {name} {what}; give '{SENTENCEPIECE}' (trained on the training text), '{BYTES}', "
        "a folder of a Hugging Face tokenizer, OWNER/NAME of one on the hub, or a tokenizer.model file"
    )


def load(name: str | Path) -> Tokenizer:
    """Open "bytes", a Hugging Face tokenizer folder, that of a model on the hub, or a SentencePiece `tokenizer.model`.

    Raises DataError when it does not exist, cannot be opened, or would give other ids than SentencePiece, and
    ModelError when the hub does not give it.
    """
    check_name(str(name))
    if str(name) == SENTENCEPIECE:
        raise ConfigError(
            "data.tokenizer: 'sentencepiece' is trained on the training text; it cannot be opened by name"
        )
    if str(name) == BYTES:
        return _bytes_tokenizer()
    path = hub.folder(name, f"data.tokenizer is {name}")
    if path.is_file():
        return _open_sentencepiece(path.read_bytes(), str(path))
    if (path / "tokenizer.model").is_file() and not (path / "tokenizer.json").exists():
        return _open_sentencepiece((path / "tokenizer.model").read_bytes(), str(path / "tokenizer.model"))
    return _open_folder(path, str(path))


def train_sentencepiece(texts: Iterable[str], vocab_size: int, out_folder: str | Path) -> Tokenizer:
    """Train a BPE tokenizer with byte fallback on `texts` (streamed), write its folder, and return it opened.

    Every text can be encoded and decoded again exactly, except that U+2581 (the sign that stands for a space) decodes
    to a space. The same texts give the same bytes. Raises ConfigError when the text cannot give `vocab_size` entries.
    """
    import sentencepiece

    sample = _sample(texts)
    if not sample:
        raise DataError("data.tokenizer: there is no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=16_384,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise _explain(str(error), vocab_size) from error
    tokenizer = _open_sentencepiece(model.getvalue(), "the tokenizer trained here")
    tokenizer.save(out_folder)
    return tokenizer


def _sample(texts: Iterable[str]) -> list[str]:
    """Every n-th sentence of the texts, n the least power of two that leaves at most SAMPLE_CHARACTERS."""
    kept: list[str] = []
    size, stride, number = 0, 1, 0
    for text in texts:
        for sentence in _SENTENCE.findall(text):
            if number % stride == 0:
                kept.append(sentence)
                size += len(sentence)
            number += 1
            if size > SAMPLE_CHARACTERS:
                kept, stride = kept[::2], 2 * stride
                size = sum(len(sentence) for sentence in kept)
    return kept


def _explain(message: str, vocab_size: int) -> ConfigError:
    """SentencePiece's error as one that names the key and what would be right."""
    right_size = None
    if found := re.search(r"too high.*<= *(\d+)", message, re.DOTALL):
        right, right_size = f"the text is too short for that; at most {found[1]} are possible", found[1]
    elif found := re.search(r"smaller than required_chars\. *\d+ vs (\d+)", message):
        right, right_size = f"the characters of the text and the 256 bytes alone need {found[1]}", found[1]
    else:
        right = f"SentencePiece says: {message.strip().splitlines()[-1]}"
    message = f"data.vocab_size: a tokenizer of {vocab_size} entries cannot be trained on this text: {right}"
    return ConfigError(message, change={} if right_size is None else {"": f"--data.vocab_size={right_size}"})


def _open_sentencepiece(model: bytes, origin: str) -> Tokenizer:
    """Convert a SentencePiece BPE model, and see that the ids are SentencePiece's own.

    One difference stays: of a model that puts a space before every text (not ours), Hugging Face's conversion puts
    none before a text that begins with one.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    try:
        original = sentencepiece.SentencePieceProcessor(model_proto=model)
        prefix = original.encode("a", out_type=str)[0].startswith("\u2581")
    except Exception as error:
        raise DataError(f"{origin}: not a SentencePiece model: {_first_line(error)}") from error
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "tokenizer.model").write_bytes(model)
        try:
            converted = LlamaTokenizer.from_pretrained(
                scratch,
                add_prefix_space=prefix,
                legacy=False,
                # A "</s>" in a text is text, as for SentencePiece; and a text never begins with a token of its own,
                # because training windows do not.
                split_special_tokens=True,
                add_bos_token=False,
            )
            converted.save_pretrained(scratch)
        except Exception as error:
            raise DataError(f"{origin}: cannot be opened by transformers: {_first_line(error)}") from error
        tokenizer = _open_folder(Path(scratch), origin)
    probe = _PROBE + " ".join(original.id_to_piece(i) for i in range(0, len(original), max(1, len(original) // 500)))
    if tokenizer.encode(probe).tolist() != original.encode(probe):
        raise DataError(
            f"{origin}: as a Hugging Face tokenizer it would give other ids than SentencePiece; a tokenizer.model must "
            "be BPE with byte fallback, identity normalisation and remove_extra_whitespaces=false (or give the folder "
            "of a Hugging Face tokenizer)"
        )
    return tokenizer


def _bytes_tokenizer() -> Tokenizer:
    """Ids are UTF-8 bytes + 3, after pad (0), end of text (1) and unknown (2)."""
    from transformers import ByT5Tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        ByT5Tokenizer(extra_ids=0, split_special_tokens=True).save_pretrained(scratch)
        return _open_folder(Path(scratch), BYTES)


def _open_folder(folder: Path, origin: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        # Code in the folder is never run: the library would ask on the terminal.
        backend: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if hub.names_code(folder / "tokenizer_config.json"):
            raise DataError(
                f"{origin}: its tokenizer needs code of its own (auto_map in tokenizer_config.json), which is never "
                "run: give another one as data.tokenizer, for example its tokenizer.json in a folder of its own"
            ) from None
        raise DataError(f"{origin}: not the folder of a Hugging Face tokenizer: {_first_line(error)}") from error
    patterns = (*_FILES, *getattr(backend, "vocab_files_names", {}).values())
    names = sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if backend.is_fast and not set(names) - _NOT_VOCABULARY:
        raise DataError(f"{origin}: holds no vocabulary (tokenizer.json, tokenizer.model, vocab.json, ...)")
    files = {name: (folder / name).read_bytes() for name in names}
    files["tokenizer_config.json"] = _name_class(files.get("tokenizer_config.json", b"{}"), backend)
    if backend.is_fast:  # a folder may ask for both, and neither suits a stream of text
        backend.backend_tokenizer.no_truncation()
        backend.backend_tokenizer.no_padding()
    vocab_size = max(backend.get_vocab().values()) + 1
    return Tokenizer(vocab_size, backend.eos_token_id, _fingerprint(backend, files), backend, files)


def _name_class(content: bytes, backend: Any) -> bytes:
    """tokenizer_config.json, which must name the class: without a model's config.json nothing else does."""
    import transformers

    config = json.loads(content)
    named = getattr(transformers, str(config.get("tokenizer_class")), None)
    if named is type(backend):
        return content
    return json.dumps({**config, "tokenizer_class": type(backend).__name__}, indent=2, sort_keys=True).encode()


def _fingerprint(backend: Any, files: dict[str, bytes]) -> str:
    """What decides ids in the tokenizer as it was opened: some classes rebuild parts and ignore the file's."""
    splits = bool(getattr(backend, "split_special_tokens", False))
    if type(backend).__name__ == "ByT5Tokenizer" and len(backend) == 256 + _BYTES_OFFSET and splits:
        return _bytes_fingerprint()
    if backend.is_fast:
        state = json.loads(backend.backend_tokenizer.to_str())
        parts: Any = {key: state.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    else:
        parts = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    content = json.dumps([parts, splits, backend.eos_token_id], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _bytes_fingerprint() -> str:
    return hashlib.sha256(BYTES.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
