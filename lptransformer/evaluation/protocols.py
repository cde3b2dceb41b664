"""Conventions of measuring perplexity: from texts to windows over their tokens, and which tokens each window scores.

A perplexity means something with its convention alone, so a result carries name, window, stride and prefix. A further
convention is one row in PROTOCOLS.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lptransformer.data.readers import Source, documents
from lptransformer.data.token_set import IGNORE_INDEX, Batch, TokenSet, positions_of
from lptransformer.data.tokenizer import Tokenizer
from lptransformer.errors import UserError
from lptransformer.run_folder.metrics import TextCounts, text_counts

PIECE_BYTES = 4096  # of a document, when models are compared


class Window(NamedTuple):
    """The inputs are ids[start:stop]; scored are ids[first:last] (of a scoring with labels those of them that carry
    one), each predicted from the inputs before it."""

    start: int
    stop: int
    first: int
    last: int


class Pieces(NamedTuple):
    """The documents of a text, longer ones in pieces of PIECE_BYTES: how many bytes of the text each is, float64 [p],
    and in which one each id begins, int64 [n]; -1 for an id that is no token of the text."""

    bytes: np.ndarray
    of_id: np.ndarray


@dataclass(frozen=True)
class Scoring:
    """What is scored of a text: its ids, int32 [n], windows, int64 [w, 4] (Window), and the text's own counts.

    `pieces` is there where the options ask for it. The ids that are in one are as many as `counts.tokens`, and the
    bytes of all pieces are `counts.bytes`. `labelled`, uint8 [n], is there where not every token is scored, `starts`,
    uint8 [n], where documents are isolated: 1 where one begins.
    """

    ids: np.ndarray
    windows: np.ndarray
    counts: TextCounts
    prefix: str | None = None
    pieces: Pieces | None = None
    labelled: np.ndarray | None = None
    starts: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """How many are scored."""
        return int(self.of_windows.sum())

    @property
    def of_windows(self) -> np.ndarray:
        """How many each window scores, int64 [w]."""
        if self.labelled is None:
            return self.windows[:, 3] - self.windows[:, 2]
        before = np.concatenate([[0], np.cumsum(self.labelled, dtype=np.int64)])
        return before[self.windows[:, 3]] - before[self.windows[:, 2]]

    @property
    def scored(self) -> np.ndarray:
        """The places in `ids` that are scored, int64 [tokens], window after window."""
        places = np.concatenate([np.arange(first, last) for _, _, first, last in self.windows.tolist()])
        return places if self.labelled is None else places[self.labelled[places] == 1]

    def num_batches(self, batch_size: int) -> int:
        return -(-len(self.windows) // batch_size)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """All windows in order, [batch_size, longest window]; what is short or missing is filled with 0, unscored."""
        import torch

        length = int((self.windows[:, 1] - self.windows[:, 0]).max())
        for begin in range(0, len(self.windows), batch_size):
            input_ids = torch.zeros((batch_size, length), dtype=torch.int64)
            labels = torch.full_like(input_ids, IGNORE_INDEX)
            positions = None if self.starts is None else torch.arange(length).repeat(batch_size, 1)
            for row, (start, stop, first, last) in enumerate(self.windows[begin : begin + batch_size].tolist()):
                input_ids[row, : stop - start] = torch.from_numpy(self.ids[start:stop].astype(np.int64))
                scored = torch.from_numpy(self.ids[first:last].astype(np.int64))
                if self.labelled is not None:
                    scored[torch.from_numpy(self.labelled[first:last] == 0)] = IGNORE_INDEX
                labels[row, first - 1 - start : last - 1 - start] = scored
                if positions is not None and self.starts is not None:
                    of_row = positions_of([0, *np.flatnonzero(self.starts[start:stop])], stop - start, length)
                    positions[row] = torch.from_numpy(of_row)
            yield Batch(input_ids, labels, positions)


class Options(NamedTuple):
    """Window and stride in tokens; `bos` is whether every document begins with the tokenizer's token for that;
    `pieces`, whether the scoring has to say in which piece of the text every token is."""

    window: int
    stride: int
    bos: bool
    pieces: bool = False


@dataclass(frozen=True)
class Protocol:
    """`score` makes the scoring of a text; `strides` and `bos` are whether these options have a meaning."""

    score: Callable[[Source, Tokenizer, Options], Scoring]
    about: str
    strides: bool = False
    bos: bool = False


def of_token_set(token_set: TokenSet, prefix: str | None = None) -> Scoring:
    """`blocks` of a prepared set: disjoint windows, whose first tokens are not scored; `prefix` is what begins every
    document there."""
    ids = np.concatenate([np.asarray(chunk, np.int32) for chunk in token_set.chunks])
    counts = text_counts(token_set.manifest)
    if "labelled" not in token_set.columns:
        return Scoring(ids, disjoint(len(ids), token_set.sequence_length), counts, prefix)
    rows = [token_set.window(index) for index in range(len(token_set))]
    ends = np.cumsum([len(row.ids) for row in rows])
    windows = [
        Window(end - len(row.ids), end, end - len(row.ids) + 1, end) for row, end in zip(rows, ends, strict=True)
    ]
    starts = None
    if token_set.isolated:
        starts = np.zeros(len(ids), np.uint8)
        for window, row in zip(windows, rows, strict=True):
            starts[window.start + np.asarray(row.starts)] = 1
    return Scoring(ids, _array(windows), counts, prefix, None, np.concatenate([row.labelled for row in rows]), starts)


def disjoint(tokens: int, window: int) -> np.ndarray:
    starts = range(0, tokens, window)
    ends = [min(start + window, tokens) for start in starts]
    return _array([Window(start, end, start + 1, end) for start, end in zip(starts, ends, strict=True)])


def _blocks(source: Source, tokenizer: Tokenizer, options: Options) -> Scoring:
    """One stream: documents with the end-of-text token between them, each after the prefix where one is wanted."""
    bos = tokenizer.backend.bos_token_id
    prefix = [] if not options.bos else [bos]
    parts: list[np.ndarray] = []
    places: list[np.ndarray] = []
    sizes: list[int] = []
    size = words = 0
    for number, text in enumerate(texts(source)):
        between = [] if number == 0 or tokenizer.end_of_text_id is None else [tokenizer.end_of_text_id]
        ids, begins = _encoded(tokenizer, text, options)
        parts += [np.array([*between, *prefix], np.int32), ids]
        places += [np.array([size - 1] * len(between) + [size] * len(prefix), np.int64), size + begins]
        sizes.append(len(text.encode()))
        size, words = size + sizes[-1], words + len(text.split())
    ids = np.concatenate(parts)
    name = tokenizer.backend.bos_token if options.bos else None
    pieces = _pieces(sizes, sizes, np.concatenate(places)) if options.pieces else None
    return Scoring(ids, disjoint(len(ids), options.window), TextCounts(len(ids), size, words), name, pieces)


def _hf_sliding(source: Source, tokenizer: Tokenizer, options: Options) -> Scoring:
    """As in transformers' page on perplexity: one text of all documents, joined by two newlines; windows that overlap;
    a token is scored in the first window that holds it, the very first one never."""
    documents = [*texts(source)]
    text = "\n\n".join(documents)
    (ids, begins), windows, scored = _encoded(tokenizer, text, options), [], 1
    for start in range(0, len(ids), options.stride):
        stop = min(start + options.window, len(ids))
        if stop > scored:
            windows.append(Window(start, stop, scored, stop))
            scored = stop
        if stop == len(ids):
            break
    sizes = [len(one.encode()) for one in documents]
    sizes = [*(size + 2 for size in sizes[:-1]), *sizes[-1:]]  # the newlines belong to the document before them
    pieces = _pieces(sizes, sizes, begins) if options.pieces else None
    return Scoring(ids, _array(windows), TextCounts(len(ids), sum(sizes), len(text.split())), None, pieces)


def _lm_eval_wikitext(source: Source, tokenizer: Tokenizer, options: Options) -> Scoring:
    """As task wikitext of lm-evaluation-harness: every document by itself, detokenised, behind the token for the begin
    of a text (else the end of one), which every first token is predicted from; all tokens are scored, the last window
    of a document is filled up with tokens before it; words and bytes are those before detokenising."""
    backend = tokenizer.backend
    bos = backend.bos_token_id if backend.bos_token_id is not None else backend.eos_token_id
    if bos is None:
        raise UserError(
            "--protocol lm-eval-wikitext: the tokenizer has neither a begin-of-text nor an end-of-text token"
        )
    parts: list[np.ndarray] = []
    windows: list[Window] = []
    places: list[np.ndarray] = []
    sizes: list[int] = []
    seen: list[int] = []
    begin = before = words = 0
    for text in texts(source):
        plain = detokenised(text)
        ids, begins = _encoded(tokenizer, plain, options)
        parts += [np.array([bos], np.int32), ids]
        places += [np.array([-1], np.int64), before + begins]
        sizes.append(len(text.encode()))
        seen.append(max(1, len(plain.encode())))
        before, words = before + seen[-1], words + len(re.split(r"\s+", text))
        for done in range(0, len(ids), options.window):
            last = min(done + options.window, len(ids))
            start = max(0, last - options.window)
            windows.append(Window(begin + start, begin + last, begin + done + 1, begin + last + 1))
        begin += len(ids) + 1
    ids = np.concatenate(parts)
    name = str(backend.convert_ids_to_tokens(bos))
    pieces = _pieces(sizes, seen, np.concatenate(places)) if options.pieces else None
    return Scoring(ids, _array(windows), TextCounts(len(ids) - len(sizes), sum(sizes), words), name, pieces)


PROTOCOLS = {
    "blocks": Protocol(_blocks, "disjoint windows of one stream of documents", bos=True),
    "hf-sliding": Protocol(_hf_sliding, "overlapping windows, as in transformers' documentation", strides=True),
    "lm-eval-wikitext": Protocol(_lm_eval_wikitext, "as the task wikitext of lm-evaluation-harness"),
}


def _encoded(tokenizer: Tokenizer, text: str, options: Options) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text, and the byte at which each begins where that is asked for, else nothing."""
    return tokenizer.encode_with_places(text) if options.pieces else (tokenizer.encode(text), np.empty(0, np.int64))


def _pieces(sizes: Sequence[int], seen: Sequence[int], places: np.ndarray) -> Pieces:
    """Cut documents of `sizes` bytes, of which the tokenizers see `seen` bytes, one document behind the other; an id
    begins at the byte `places` of what they see, -1 for one that is no token of the text.

    The cuts are made in what is seen; a piece counts the same share of its document's own bytes.
    """
    edges = np.cumsum([0, *seen])
    begins = [np.arange(edge, edge + size, PIECE_BYTES) for edge, size in zip(edges[:-1], seen, strict=True)]
    cuts = np.concatenate([*begins, edges[-1:]])
    of_id = np.searchsorted(cuts[:-1], places, side="right") - 1
    return Pieces(np.diff(np.interp(cuts, edges, np.cumsum([0, *sizes]))), of_id)


# WikiText's own tokenisation, undone as lm-evaluation-harness 0.4 does it, pattern after pattern (the second one, with
# slashes and brackets that mean themselves, included).
_SPACED = [(f" {sign} ", f"{sign} ") for sign in ":;.!?,"]
_UNDONE = [
    ("s '", "s'"),
    ("/' [0-9]/", "/'[0-9]/"),
    *((f" @{re.escape(sign)}@ ", sign) for sign in "-,."),
    *((re.escape(before), after) for before, after in _SPACED),
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"{\s*([^}]*?)\s*}", r"{\1}"),
    (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    *(("= " * (many - 1) + "=", "=" * many) for many in (4, 3, 2)),
    *((" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")),
]


def detokenised(text: str) -> str:
    """A WikiText document as it was before it was tokenised, as far as lm-evaluation-harness undoes it."""
    for pattern, after in _UNDONE:
        text = re.sub(pattern, after, text)
    return text


def texts(source: Source) -> Iterator[str]:
    """The documents; those without text are none."""
    for blocks in documents(source):
        if text := "".join(blocks):
            yield text


def _array(windows: Sequence[Window]) -> np.ndarray:
    return np.array(windows, np.int64).reshape(-1, 4)
