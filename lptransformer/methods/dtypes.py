"""The dtypes that a run can have: the one table of them. Names of torch, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """`name` in torch; bytes of a number of weights, gradients and hidden states, and of optimizer states.

    Where the two differ the optimizer keeps a master copy of the weights, in `state_bytes` a number.
    """

    name: str
    bytes: int
    state_bytes: int

    @property
    def has_masters(self) -> bool:
        return self.state_bytes > self.bytes


DTYPES = {
    "fp32": DType("float32", 4, 4),
    "bf16": DType("bfloat16", 2, 4),
    "fp64": DType("float64", 8, 8),
}
