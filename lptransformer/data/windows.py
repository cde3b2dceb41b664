"""Documents and examples to ids, and to the windows of a token set.

Text is one stream of ids, cut into full windows. Examples (data/chat) are never cut where they fit: a row holds whole
ones, as many as fit, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from lptransformer.data import chat
from lptransformer.data.readers import Source, documents, examples
from lptransformer.data.rows import Advance
from lptransformer.data.token_set import Window
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import ConfigError, DataError

_BLOCK = 1 << 22  # characters encoded at a time
_TOGETHER = 256  # examples encoded at a time

Item = TypeVar("Item")


@dataclass(frozen=True)
class WindowOptions:
    """How documents become windows: keys of the section `data`."""

    loss_on: str = "answers"
    long_rows: str = "truncate"
    bos: str = "auto"
    isolate_documents: bool | None = None

    @classmethod
    def of(cls, section: Any) -> WindowOptions:
        """Those of a section `data`."""
        return cls(section.loss_on, section.long_rows, section.bos, section.isolate_documents)

    def isolates(self, text: bool) -> bool:
        """Whether no document of a source, of text or of examples, sees another one."""
        return not text if self.isolate_documents is None else self.isolate_documents

    def begins(self, tokenizer: Tokenizer) -> bool:
        """Whether the begin-of-text token stands before every document. Raises ConfigError where there is none."""
        if self.bos == "always" and tokenizer.backend.bos_token_id is None:
            raise ConfigError("data.bos is always, and the tokenizer has no token for the begin of a text")
        return self.bos == "always" or (self.bos == "auto" and tokenizer.adds_begin)


@dataclass
class Counts:
    tokens: int = 0
    bytes: int = 0
    words: int = 0
    documents: int = 0
    long_rows: int = 0  # examples longer than a window
    left_out: int = 0  # examples, or pieces of them, in which nothing would be learnt


def text_tokens(
    source: Source, tokenizer: Tokenizer, options: WindowOptions, counts: Counts, advance: Advance
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ids of all documents of a text, int32 [some], with end_of_text_id between them, and uint8 [some], 1 where one
    begins; fills in `counts`."""
    end = np.array([tokenizer.end_of_text_id or 0], np.int32)
    begin = np.array([tokenizer.backend.bos_token_id] if options.begins(tokenizer) else [], np.int32)

    def counted(blocks: Iterable[str]) -> Iterator[str]:
        for block in blocks:
            counts.bytes += len(block.encode())
            counts.words += len(block.split())
            yield block

    def encoded() -> tuple[np.ndarray, np.ndarray]:
        arrays = iter(tokenizer.encode_many([piece for piece in waiting if isinstance(piece, str)]))
        parts, starts, total = [], [], 0
        for piece in waiting:
            starts += [total] if piece is begin else []
            parts.append(next(arrays) if isinstance(piece, str) else piece)
            total += len(parts[-1])
        first = np.zeros(total, np.uint8)
        first[[start for start in starts if start < total]] = 1
        return np.concatenate(parts), first

    waiting: list[str | np.ndarray] = []  # pieces of text, and what stands between and before documents
    characters = 0
    for blocks in documents(source, advance):
        for number, piece in enumerate(tokenizer.pieces(counted(blocks))):
            if number == 0:
                if counts.documents:
                    waiting.append(_ending(end, tokenizer, source))
                waiting.append(begin)
                counts.documents += 1
            waiting.append(piece)
            characters += len(piece)
            if characters >= _BLOCK:
                yield encoded()
                waiting, characters = [], 0
    if waiting:
        yield encoded()


def _ending(end: np.ndarray, tokenizer: Tokenizer, source: Source) -> np.ndarray:
    """`end`. Raises DataError where the tokenizer has no end-of-text token."""
    if tokenizer.end_of_text_id is None:
        raise DataError(
            f"{source.name}: its documents need an end-of-text token between them, and the tokenizer has none: name "
            "one as eos_token in its tokenizer_config.json, or give another data.tokenizer"
        )
    return end


def isolated_windows(parts: Iterable[tuple[np.ndarray, np.ndarray]], sequence_length: int) -> Iterator[Window]:
    """Full windows of isolated documents, the last one shorter, from what `text_tokens` gives: the first token of a
    document has nothing that it could be predicted from."""

    def window(ids: np.ndarray, first: np.ndarray) -> Window:
        starts = np.union1d([0], np.flatnonzero(first)).astype(np.int32)
        labelled = np.ones(len(ids), np.uint8)
        labelled[starts] = 0
        return Window(ids, labelled, starts)

    rest = np.empty((2, 0), np.int32)
    for part in parts:
        rest = np.concatenate([rest, np.stack(part)], axis=1)
        whole = rest.shape[1] // sequence_length * sequence_length
        for start in range(0, whole, sequence_length):
            yield window(*rest[:, start : start + sequence_length])
        rest = rest[:, whole:]
    if rest.size:
        yield window(*rest)


def batched(items: Iterable[Item], many: int) -> Iterator[list[Item]]:
    """itertools.batched, which Python 3.11 lacks."""
    rest = iter(items)
    while some := list(islice(rest, many)):
        yield some


def encoded_examples(
    source: Source, tokenizer: Tokenizer, options: WindowOptions, counts: Counts, advance: Advance
) -> Iterator[chat.Encoded]:
    """The examples of a source with what stands before and behind them; fills in `counts`.

    A completion ends with the end-of-text token, which carries a label. A conversation ends as the template ends it;
    where documents are not isolated that token follows, without a label. What begins a conversation is the template's
    affair too, unless data.bos says otherwise.
    """
    everything = options.loss_on == "all"
    begins, begin = options.begins(tokenizer), tokenizer.backend.bos_token_id
    for some in batched(examples(source, tokenizer.has_template, advance), _TOGETHER):
        texts, plain = [], []
        for place, prompt, completion in some:
            plain.append(isinstance(prompt, str))
            if isinstance(prompt, str):
                spans = [(0 if everything else len(prompt), len(prompt) + len(completion))]
                texts.append(chat.Rendered(prompt + completion, spans))
            else:
                texts.append(chat.rendered(prompt, tokenizer, place, everything))
        for is_plain, (text, _), (ids, labelled) in zip(plain, texts, chat.encoded(texts, tokenizer), strict=True):
            has_begin = begin is not None and len(ids) > 0 and ids[0] == begin
            if options.bos == "never" and has_begin:
                ids, labelled = ids[1:], labelled[1:]
            if (begins if is_plain else options.bos == "always") and not has_begin:
                ids, labelled = np.insert(ids, 0, begin), np.insert(labelled, 0, 0)
            if is_plain or not options.isolates(text=False):
                end = _ending(np.array([tokenizer.end_of_text_id or 0]), tokenizer, source)
                ids, labelled = np.append(ids, end), np.append(labelled, is_plain)
            counts.documents += 1
            counts.bytes += len(text.encode())
            counts.words += len(text.split())
            yield chat.Encoded(ids.astype(np.int32), labelled.astype(np.uint8))


def packed(
    encoded: Iterable[chat.Encoded], tokenizer: Tokenizer, options: WindowOptions, sequence_length: int, counts: Counts
) -> Iterator[Window]:
    """Rows of whole examples, each in the current row if it fits, else in the next one. One that is longer than a row
    is truncated or split, as the options say; what has no label left is left out. Fills in `counts`."""
    row: list[chat.Encoded] = []

    def joined() -> Window:
        starts = np.cumsum([0, *(len(one.ids) for one in row[:-1])]).astype(np.int32)
        ids, labelled = (np.concatenate(parts) for parts in zip(*row, strict=True))
        return Window(ids, labelled, starts)

    def without(ids: np.ndarray) -> None:
        text = tokenizer.decode(ids)
        counts.bytes -= len(text.encode())
        counts.words -= len(text.split())

    for ids, labelled in encoded:
        begins = range(0, len(ids), sequence_length)
        if len(begins) > 1:
            counts.long_rows += 1
            if options.long_rows == "truncate":
                begins = begins[:1]
                without(ids[sequence_length:])
        for start in begins:
            piece = chat.Encoded(ids[start : start + sequence_length], labelled[start : start + sequence_length].copy())
            piece.labelled[0] = 0
            if not piece.labelled.any():
                counts.left_out += 1
                without(piece.ids)
                continue
            if sum(len(one.ids) for one in row) + len(piece.ids) > sequence_length:
                yield joined()
                row.clear()
            row.append(piece)
    if row:
        yield joined()
