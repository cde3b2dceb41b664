"""How many dimensions a matrix takes up: numbers from its singular values."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def effective_rank(singular_values: Tensor) -> float:
    """The exponential of the entropy of the singular values' shares, from 1 to the rank; [n], NaN where all are zero.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality" (EUSIPCO 2007), section 2: of the
    singular values themselves, where others take their squares.
    """
    shares = singular_values.double() / singular_values.double().sum()
    return torch.special.entr(shares).sum().exp().item()


def stable_rank(singular_values: Tensor) -> float:
    """The sum of the squares over the greatest square, from 1 to the rank; [n], NaN where all are zero.

    Rudelson and Vershynin, "Sampling from large matrices" (math/0503442), who call it the numerical rank. For centred
    rows the squares are variances along the principal directions.
    """
    squares = singular_values.double() ** 2
    return (squares.sum() / squares.max()).item()


class Moments:
    """Sums of rows and of their products, in fp64: all that the singular values of many rows need."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, rows: Tensor) -> None:  # [tokens, H]
        rows = rows.double()
        if self.count == 0:
            # Some states are far from zero and close to each other: without this their differences would cancel out.
            self.shift = rows.mean(dim=0)
            self.sum = torch.zeros_like(self.shift)
            self.products = self.shift.new_zeros(rows.shape[1], rows.shape[1])
        rows = rows - self.shift
        self.count += len(rows)
        self.sum += rows.sum(dim=0)
        self.products += rows.T @ rows

    def singular_values(self) -> Tensor:
        """Of the centred rows: the roots of the eigenvalues of their products. What is rounding alone counts as 0."""
        centred = self.products - torch.outer(self.sum, self.sum) / self.count
        if not centred.isfinite().all():
            return torch.full_like(self.sum, math.nan)
        squares = torch.linalg.eigvalsh(centred)
        noise = torch.finfo(torch.float64).eps * len(self.sum) * self.products.trace()
        return squares.where(squares > noise, 0.0).sqrt()
