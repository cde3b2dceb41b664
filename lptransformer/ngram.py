"""n-gram baselines: what a text gives away without any model of its context. In nats per token."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

_BIGRAM_CHUNK = 1 << 20  # tokens looked at at once, so that memory follows the distinct bigrams and not the text


def unigram_nll(train_ids: npt.ArrayLike, valid_ids: npt.ArrayLike, vocab: int) -> float:
    """Nats per token of `valid_ids` [valid tokens] under the token frequencies of `train_ids` [train tokens], with
    one added to every count. nan where there are no valid tokens. Ids are integers in 0..vocab-1."""
    probabilities = _unigram(_checked(train_ids, vocab), vocab)
    valid_counts = np.bincount(_checked(valid_ids, vocab), minlength=vocab)
    if not valid_counts.any():
        return math.nan
    return float(-valid_counts @ np.log(probabilities)) / int(valid_counts.sum())


def bigram_nll(train_ids: npt.ArrayLike, valid_ids: npt.ArrayLike, vocab: int) -> float:
    """Like `unigram_nll` under the bigrams of `train_ids`, interpolated with that unigram model (Witten and Bell
    1991, method C): `P(b | a) = (count(a b) + followers(a) P(b)) / (count(a) + followers(a))`, where followers(a) is
    the number of distinct tokens seen after a. Nothing is fitted to the valid text; its first token is scored by the
    unigram model, so that both functions score the same tokens."""
    train, valid = _checked(train_ids, vocab), _checked(valid_ids, vocab)
    if len(valid) == 0:
        return math.nan
    probabilities = _unigram(train, vocab)
    pairs, counts = _count_bigrams(train, vocab)
    starts = np.bincount(pairs // vocab, weights=counts, minlength=vocab)
    followers = np.bincount(pairs // vocab, minlength=vocab)

    valid_pairs, valid_counts = _count_bigrams(valid, vocab)
    before, after = valid_pairs // vocab, valid_pairs % vocab
    # A pair beyond the last one that was seen would fall out of the array: one that nothing is equal to ends it.
    pairs, counts = np.append(pairs, -1), np.append(counts, 0)
    found = np.searchsorted(pairs[:-1], valid_pairs)
    seen = np.where(pairs[found] == valid_pairs, counts[found], 0)
    weight = np.where(followers[before] > 0, followers[before], 1)  # after an unseen token the unigram decides alone
    p = (seen + weight * probabilities[after]) / (starts[before] + weight)
    return float((-np.log(probabilities[valid[0]]) - valid_counts @ np.log(p)) / len(valid))


def _checked(ids: npt.ArrayLike, vocab: int) -> npt.NDArray[np.integer]:
    array = np.asarray(ids)
    array = array if array.size else np.empty(0, np.int64)
    assert array.ndim == 1 and np.issubdtype(array.dtype, np.integer), f"token ids: {array.dtype} {array.shape}"
    assert not array.size or (array.min() >= 0 and array.max() < vocab), f"token ids outside 0..{vocab - 1}"
    return array


def _unigram(ids: npt.NDArray[np.integer], vocab: int) -> npt.NDArray[np.float64]:
    return (np.bincount(ids, minlength=vocab) + 1.0) / (len(ids) + vocab)


def _count_bigrams(ids: npt.NDArray[np.integer], vocab: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The distinct pairs `first * vocab + second`, sorted, and how often each occurs."""
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    start = 0
    while start < len(ids) - 1:
        # A chunk as long as what is known already keeps both the memory and the number of merges small.
        stop = min(start + max(_BIGRAM_CHUNK, len(pairs)), len(ids) - 1)
        chunk = ids[start : stop + 1].astype(np.int64)
        new_pairs, new_counts = np.unique(chunk[:-1] * vocab + chunk[1:], return_counts=True)
        pairs, index = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        counts = np.bincount(index, weights=np.concatenate([counts, new_counts])).astype(np.int64)
        start = stop
    return pairs, counts
