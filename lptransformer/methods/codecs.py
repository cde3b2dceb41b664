"""Codecs of borders: in which form hidden states are handed from chunk to chunk.

A row says how many bytes a token takes and which class encodes and decodes (models/border_codec.py has them), so that
code that only counts needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SCALE_BYTES = 4  # int8: of a token's float32 scale


@dataclass(frozen=True)
class CodecKind:
    """`token_bytes` is from (hidden_size, bytes of a number of the run's dtype) to the bytes of a token.

    `builder` is "module:class", made without arguments.
    """

    token_bytes: Callable[[int, int], int]
    builder: str


CODECS: dict[str, CodecKind] = {
    "none": CodecKind(
        lambda hidden_size, number_bytes: hidden_size * number_bytes, "lptransformer.models.border_codec:AsTheyAre"
    ),
    "bf16": CodecKind(lambda hidden_size, _: 2 * hidden_size, "lptransformer.models.border_codec:Bf16"),
    "int8": CodecKind(lambda hidden_size, _: hidden_size + SCALE_BYTES, "lptransformer.models.border_codec:Int8"),
}
