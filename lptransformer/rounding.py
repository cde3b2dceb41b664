"""Hidden states in fewer bytes, for slow links between chunks: what is sent, and what the next chunk gets to see.

A chunk computes with the rounded hidden states wherever it runs, in the same process or behind a link, so that the
result does not depend on the placement.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SCALE_BYTES = 4  # of a token's float32 scale


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype, kind: str | None) -> int:
    """Bytes of an encoded tensor [..., H] of that shape."""
    values = torch.Size(shape).numel()
    if kind is None:
        return values * dtype.itemsize
    return 2 * values if kind == "bf16" else values + _SCALE_BYTES * (values // shape[-1])


def encode(tensor: Tensor, kind: str | None) -> Tensor:
    """The bytes of a tensor [..., H], uint8 [num_bytes]: as they are (None), as `bf16`, or as `int8`.

    int8 is symmetric, with a scale per token: the largest of its H values is 127. A token with a value that is not
    finite comes out as NaN.
    """
    tensor = tensor.detach().contiguous()
    if kind is None:
        return tensor.view(torch.uint8).flatten()
    if kind == "bf16":
        return tensor.to(torch.bfloat16).view(torch.uint8).flatten()
    assert kind == "int8", kind
    scales = tensor.abs().amax(-1, keepdim=True).float() / 127
    values = (tensor / torch.where(scales == 0, 1.0, scales)).round().clamp(-127, 127)
    values = torch.where(scales.isfinite(), values, 0).to(torch.int8)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    return torch.cat([scales.view(torch.uint8).flatten(), values.view(torch.uint8).flatten()])


def decode(encoded: Tensor, shape: tuple[int, ...], dtype: torch.dtype, kind: str | None) -> Tensor:
    """The inverse of `encode`, but for the rounding. Without rounding the result shares its memory with `encoded`."""
    if kind is None:
        return encoded.view(dtype).view(shape)
    if kind == "bf16":
        return encoded.view(torch.bfloat16).view(shape).to(dtype)
    tokens = torch.Size(shape).numel() // shape[-1]
    scales, values = encoded[: _SCALE_BYTES * tokens], encoded[_SCALE_BYTES * tokens :]
    scales = scales.view(torch.float32).view(*shape[:-1], 1)
    return (values.view(torch.int8).view(shape).to(dtype) * scales).to(dtype)


def rounded(tensor: Tensor, kind: str | None) -> Tensor:
    """What the receiver of an encoded tensor has."""
    return tensor if kind is None else decode(encode(tensor, kind), tuple(tensor.shape), tensor.dtype, kind)
