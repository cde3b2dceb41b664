"""The fitted map by itself: against a least-squares solver of numpy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lptransformer.models.head import RIDGE, FittedMap, ridge


def drawn(rows: int, width: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator) + 3.0
    return x, x @ torch.randn(width, width, generator=generator) + torch.randn(rows, width, generator=generator)


def augmented(x: Tensor, y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """W and b of the system with a row more for each penalised weight, and a column of ones that is not."""
    inputs, outputs = x.double().numpy(), y.double().numpy()
    width = inputs.shape[1]
    centred = inputs - inputs.mean(0)
    root = np.sqrt(RIDGE * (centred**2).sum(0).mean())
    above = np.hstack([inputs, np.ones((len(inputs), 1))])
    below = np.hstack([root * np.eye(width), np.zeros((width, 1))])
    found = np.linalg.lstsq(np.vstack([above, below]), np.vstack([outputs, np.zeros((width, width))]), rcond=None)[0]
    return found[:width].T, found[width]


@pytest.mark.parametrize("rows", [200, 4])  # fewer rows than numbers too
def test_ridge_is_the_solution_of_the_augmented_system(rows: int) -> None:
    x, y = drawn(rows)
    weight, bias = ridge(x, y)
    assert weight.dtype == torch.float64
    for found, expected in zip((weight, bias), augmented(x, y), strict=True):
        assert np.allclose(found.numpy(), expected, atol=1e-9)


def test_of_one_row_only_the_bias_is_known() -> None:
    x, y = drawn(1)
    weight, bias = ridge(x, y)
    assert not weight.any() and torch.equal(bias, y[0].double())


@pytest.mark.parametrize("residual", [False, True])
def test_a_map_fits_what_is_wanted(residual: bool) -> None:
    x, y = drawn(200)
    one = FittedMap(nn.LayerNorm(6), 6, residual)
    one.fit(x, y)
    normed = nn.functional.layer_norm(x, (6,))
    weight, bias = (torch.from_numpy(part).float() for part in augmented(normed, y - residual * x))
    assert torch.allclose(one(x), normed @ weight.T + bias + residual * x, atol=1e-4)
