"""Packages that a slow test needs in other versions, or at all, than requirements.txt has: a folder for PYTHONPATH."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def overlay(name: str, folder: Path) -> Path:
    """Install tests/overlay-NAME.txt into `folder`, without what it depends on; the environment stays as it is."""
    pins = Path(__file__).parent / f"overlay-{name}.txt"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(pins)], check=True)
    return folder


def with_overlay(folder: str, job: Callable[..., Any], *args: Any) -> Any:
    """A job in a process that finds its packages there."""
    sys.path.append(folder)
    try:
        return job(*args)
    finally:
        sys.path.remove(folder)


def peft_logits(base: Path, adapter: Path, ids: Any) -> Any:
    """Those [b, T, V] of a model folder with an adapter of peft on it; for a process that finds peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        return model.eval()(ids).logits
