"""In which tier a case of a matrix runs: what only repeats its neighbours is `slow`, the rest of a product `full`."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*case: Any) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


def full(*case: Any) -> Any:
    """For `bash launch/test.sh --full` alone; each pair of its values is in another case too."""
    return pytest.param(*case, marks=pytest.mark.full)
