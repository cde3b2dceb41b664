"""Floating-point operations of the parts of a model, for the partition. Plain arithmetic, no torch.

Only the forward pass is counted: a backward pass costs twice as much everywhere, which changes no ratio.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelCosts:
    """Forward FLOPs per token of one block (f / number of blocks) and of one LM head (g), as the README names them."""

    block_flops: float
    head_flops: float


def model_costs(block_parameters: int, hidden_size: int, vocab_size: int, sequence_length: int) -> ModelCosts:
    """Two FLOPs per weight and token, and the two products of causal attention (half of T positions on average)."""
    attention = 2 * sequence_length * hidden_size
    return ModelCosts(
        block_flops=2.0 * block_parameters + attention,
        head_flops=2.0 * hidden_size * vocab_size,
    )
