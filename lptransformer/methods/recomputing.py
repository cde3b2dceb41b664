"""Which blocks compute their activations again in the backward pass: `train.activation_checkpointing`."""

from __future__ import annotations

import re

KEPT, SELECTIVE = "none", "selective"
VALUES = "none, blocks, selective, or every N (such as every 2)"


def right(how: str) -> str:
    """It, where it is a value of the key. Raises ValueError with what would be."""
    if how not in (KEPT, "blocks", SELECTIVE) and not re.fullmatch("every [1-9][0-9]*", how):
        raise ValueError(VALUES)
    return how


def period(how: str) -> int:
    """After how many blocks what they do repeats."""
    return int(how.removeprefix("every ")) if how.startswith("every ") else 1


def recomputed(how: str, block: int) -> bool:
    """Whether a block of the model keeps less than all; `every N`: each N-th one, whatever the placement."""
    return how != KEPT and (block + 1) % period(how) == 0


def forwards_again(how: str, block: int) -> int:
    """Forward passes of a block beside its own, by FLOPs: a selective one repeats no product."""
    return int(how != SELECTIVE and recomputed(how, block))
