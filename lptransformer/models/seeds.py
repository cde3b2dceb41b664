"""Seeds of everything that is drawn at random, each from the run's seed and a name."""

from __future__ import annotations

import hashlib


def unit_seed(seed: int, unit: str) -> int:
    """The seed of one unit (`embedding`, `block 3`, `final`, `head 3`): the same however the model is partitioned."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{unit}".encode()).digest()[:8], "big") >> 1
