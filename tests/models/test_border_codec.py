"""What chunks hand over in fewer bytes. How the engine trains on it: engine/test_objectives_trained.py."""

from __future__ import annotations

import pytest
import torch

from lptransformer.methods.codecs import CODECS
from lptransformer.models.border_codec import as_received, make_codec

SHAPE = (2, 3, 8)


def hidden(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("kind", "wanted"), [("none", 4 * 48), ("bf16", 2 * 48), ("int8", 48 + 4 * 6)])
def test_bytes(kind: str, wanted: int) -> None:
    assert len(make_codec(kind).encode(hidden())) == wanted
    assert 6 * CODECS[kind].token_bytes(8, 4) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_without_rounding_the_bits_stay(dtype: torch.dtype) -> None:
    tensor = hidden(dtype=dtype)
    assert torch.equal(as_received(tensor, make_codec("none")), tensor)


def test_bf16_is_torchs_own() -> None:
    assert torch.equal(as_received(hidden(), make_codec("bf16")), hidden().bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_is_off_by_half_a_step_of_its_token_at_most(dtype: torch.dtype) -> None:
    tensor = hidden(1, dtype) * torch.tensor([1e-4, 1.0, 1e4])[None, :, None].to(dtype)  # each token has its own scale
    got = as_received(tensor, make_codec("int8"))
    step = tensor.float().abs().amax(-1, keepdim=True) / 127
    slack = 0.02 if dtype == torch.bfloat16 else 1e-5
    assert got.dtype == dtype and got.shape == SHAPE
    assert bool(((got - tensor).float().abs() <= step * (0.5 + 127 * slack)).all())
    assert not torch.equal(got, tensor)
    # The largest value of a token stays what it is.
    largest = tensor.abs().argmax(-1, keepdim=True)
    torch.testing.assert_close(got.gather(-1, largest), tensor.gather(-1, largest), rtol=slack, atol=0)


def test_int8_of_zeros_and_of_what_is_not_finite() -> None:
    tensor = hidden()
    tensor[0, 0] = 0.0
    tensor[0, 1, 3] = torch.inf
    tensor[1, 2, 0] = torch.nan
    got = as_received(tensor, make_codec("int8"))
    assert torch.equal(got[0, 0], torch.zeros(8))
    assert bool(got[0, 1].isnan().all()) and bool(got[1, 2].isnan().all()), "a gradient of this has to be found out"
    assert bool(got[0, 2].isfinite().all()) and bool(got[1, :2].isfinite().all())
