"""n-gram baselines: what a text gives away without any model of its context. In nats per token."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

NAMES = {1: "unigram", 2: "bigram", 3: "trigram"}
_CHUNK = 1 << 20  # tokens looked at at once, so that memory follows the distinct n-grams and not the text
Ids = npt.NDArray[np.integer]


def nll(
    train_ids: npt.ArrayLike, valid_ids: npt.ArrayLike, vocab: int, order: int, scored: npt.ArrayLike | None = None
) -> float:
    """Nats per token of `valid_ids` [valid tokens] under the n-grams of `train_ids` [train tokens] up to `order`.

    Order 1 is the token frequencies with one added to every count. Every higher order is interpolated with the one
    below (Witten and Bell 1991, method C): `P(b | a) = (count(a b) + followers(a) P'(b)) / (count(a) + followers(a))`,
    where a is a context of order - 1 tokens, followers(a) the number of distinct tokens seen after it, and P' the model
    with a context shorter by its first token, which decides alone after a context that was never seen. Nothing is
    fitted to the valid text. Its first tokens have shorter contexts, so all orders score the same tokens; nan where
    there are none. `scored`, bool [valid tokens]: those of them that count (None: all). Ids are integers in 0..vocab-1.
    """
    assert order >= 1 and vocab**order < 2**63, f"order {order} of {vocab} ids"
    train, valid = _checked(train_ids, vocab), _checked(valid_ids, vocab)
    if len(valid) == 0:
        return math.nan
    p = ((np.bincount(train, minlength=vocab) + 1.0) / (len(train) + vocab))[valid]
    for length in range(2, order + 1):
        known, counts = _count(train, vocab, length)
        contexts, of_context = np.unique(known // vocab, return_inverse=True)
        total = np.bincount(of_context, weights=counts, minlength=len(contexts))
        followers = np.bincount(of_context, minlength=len(contexts))
        codes = _codes(valid, vocab, length)
        seen, before = _look_up(known, counts, codes), codes // vocab
        weight = np.maximum(_look_up(contexts, followers, before), 1)
        shorter = p[length - 1 :]
        p[length - 1 :] = (seen + weight * shorter) / (_look_up(contexts, total, before) + weight)
    chosen = p if scored is None else p[np.asarray(scored, bool)]
    return float(-np.log(chosen).sum()) / len(chosen)


def _checked(ids: npt.ArrayLike, vocab: int) -> Ids:
    array = np.asarray(ids)
    array = array if array.size else np.empty(0, np.int64)
    assert array.ndim == 1 and np.issubdtype(array.dtype, np.integer), f"token ids: {array.dtype} {array.shape}"
    assert not array.size or (array.min() >= 0 and array.max() < vocab), f"token ids outside 0..{vocab - 1}"
    return array


def _codes(ids: Ids, vocab: int, length: int) -> npt.NDArray[np.int64]:
    """One number for every `length` consecutive tokens: the tokens as digits, the first one the highest."""
    codes = np.zeros(max(len(ids) - length + 1, 0), np.int64)
    for offset in range(length):
        codes = codes * vocab + ids[offset : offset + len(codes)]
    return codes


def _count(ids: Ids, vocab: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The codes of the distinct n-grams, sorted, and how often each occurs."""
    known, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    start, last = 0, len(ids) - length + 1
    while start < last:
        # A chunk as long as what is known already keeps both the memory and the number of merges small.
        stop = min(start + max(_CHUNK, len(known)), last)
        new, new_counts = np.unique(_codes(ids[start : stop + length - 1], vocab, length), return_counts=True)
        known, index = np.unique(np.concatenate([known, new]), return_inverse=True)
        counts = np.bincount(index, weights=np.concatenate([counts, new_counts])).astype(np.int64)
        start = stop
    return known, counts


def _look_up(
    known: npt.NDArray[np.int64], values: npt.NDArray[np.generic], wanted: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """The value of every wanted code, 0 where it is not among the known ones (sorted)."""
    if len(known) == 0:
        return np.zeros(len(wanted))
    found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[found] == wanted, values[found], 0).astype(np.float64)
