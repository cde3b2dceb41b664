"""lptransformer: training of large language models with local updates (arXiv 2012.03837) on DeepSpeed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lptransformer.training.build import initialize as initialize

__all__ = ["__version__", "initialize"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`initialize` on first use: importing torch and deepspeed takes seconds, and bad configuration should not."""
    if name == "initialize":
        from lptransformer.training.build import initialize

        return initialize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
