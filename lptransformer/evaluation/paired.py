"""The difference of two models on the same text: paired piece by piece, with a bootstrap interval.

Two tokenizers cut a text differently, so what is paired is bytes: the negative log-likelihood of a token counts for the
piece of the text in which the token begins (evaluation/protocols.Pieces).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lptransformer.evaluation.protocols import Scoring

SEED, RESAMPLES = 0, 2000


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one model less those of another, over all the text, and the ends of a 95 % interval (None of
    one piece)."""

    bits_per_byte: float
    low: float | None
    high: float | None


def piece_nats(scoring: Scoring, nlls: np.ndarray) -> np.ndarray:
    """From those of the scored tokens, fp32 [tokens], the negative log-likelihood of every piece in nats, fp64 [p].

    A token that the protocol does not score counts with the mean of those that are, as it does in bits per byte: so
    these are the mean of the pieces, weighed by their bytes.
    """
    assert scoring.pieces is not None
    of_id = scoring.pieces.of_id
    each = np.full(len(scoring.ids), nlls.mean(dtype=np.float64))
    each[scoring.scored] = nlls
    inside = of_id >= 0
    return np.bincount(of_id[inside], each[inside], len(scoring.pieces.bytes))


def difference(nats: np.ndarray, base: np.ndarray, sizes: np.ndarray) -> Difference:
    """Of two models, nats [p] and bytes [p] by piece: sums of nats over sums of bytes, so pieces weigh by their bytes.

    The interval is the percentile bootstrap (Efron and Tibshirani, "An Introduction to the Bootstrap", chapter 13) of
    whole pieces, each drawn with both models' numbers, from a fixed seed.
    """
    bits = (nats - base) / math.log(2)
    if len(bits) == 1:
        return Difference(float(bits[0] / sizes[0]), None, None)
    generator = np.random.default_rng(SEED)
    drawn = np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        chosen = generator.integers(len(bits), size=len(bits))
        drawn[number] = bits[chosen].sum() / sizes[chosen].sum()
    low, high = np.percentile(drawn, (2.5, 97.5))
    return Difference(float(bits.sum() / sizes.sum()), float(low), float(high))
