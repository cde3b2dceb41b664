"""Border codecs at work: hidden states in fewer bytes, for slow links between chunks.

A chunk computes with what it would receive wherever it runs, in the same process or behind a link, so that the result
does not depend on the placement. methods/codecs.py has the rows that name these classes.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol

import torch
from torch import Tensor

from lptransformer.methods.codecs import CODECS, SCALE_BYTES


class BorderCodec(Protocol):
    """How hidden states [..., H] are handed over.

    `encode` gives their bytes, uint8 in one dimension, the row's `token_bytes` for every token; `decode` is its
    inverse, but for the rounding.
    """

    def encode(self, tensor: Tensor) -> Tensor: ...

    def decode(self, encoded: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...


class AsTheyAre:
    """No rounding: what is decoded shares its memory with what was encoded."""

    def encode(self, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().view(torch.uint8).flatten()

    def decode(self, encoded: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return encoded.view(dtype).view(shape)


class Bf16:
    """Two bytes for every value."""

    def encode(self, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().to(torch.bfloat16).view(torch.uint8).flatten()

    def decode(self, encoded: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return encoded.view(torch.bfloat16).view(shape).to(dtype)


class Int8:
    """Symmetric, with a scale per token: the largest of its H values is 127.

    A token with a value that is not finite comes out as NaN.
    """

    def encode(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().contiguous()
        scales = tensor.abs().amax(-1, keepdim=True).float() / 127
        values = (tensor / torch.where(scales == 0, 1.0, scales)).round().clamp(-127, 127)
        values = torch.where(scales.isfinite(), values, 0).to(torch.int8)
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        return torch.cat([scales.view(torch.uint8).flatten(), values.view(torch.uint8).flatten()])

    def decode(self, encoded: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tokens = torch.Size(shape).numel() // shape[-1]
        scales, values = encoded[: SCALE_BYTES * tokens], encoded[SCALE_BYTES * tokens :]
        scales = scales.view(torch.float32).view(*shape[:-1], 1)
        return (values.view(torch.int8).view(shape).to(dtype) * scales).to(dtype)


def make_codec(name: str) -> BorderCodec:
    """The codec of a row of CODECS."""
    module, _, kind = CODECS[name].builder.partition(":")
    return getattr(import_module(module), kind)()


def as_received(tensor: Tensor, codec: BorderCodec) -> Tensor:
    """What the receiver of a tensor [..., H] has."""
    return codec.decode(codec.encode(tensor), tuple(tensor.shape), tensor.dtype)
