"""What makes a folder, the marker, where it is executed: a pickle, a module, YAML, a template."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Planted:
    """Unpickled without care, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def pickled(marker: Path) -> bytes:
    return pickle.dumps(Planted(marker))


def saved(file: Path, marker: Path) -> None:
    """As torch saves it, beside tensors."""
    torch.save({"weight": torch.zeros(2), "planted": Planted(marker)}, file)


def module(marker: Path) -> str:
    """Of Python: imported it makes the folder, and there is a class of any kind in it."""
    return f"import os\nos.mkdir({str(marker)!r})\nclass Ours:\n    pass\ndef generate(*_, **__):\n    pass\n"


def yaml(marker: Path) -> str:
    return f"!!python/object/apply:os.mkdir [{str(marker)}]\n"


def template(marker: Path) -> str:
    return f"{{{{ cycler.__init__.__globals__.os.mkdir({str(marker)!r}) }}}}"
