"""Packages that a slow test needs in other versions, or at all, than requirements.txt has: a folder for PYTHONPATH."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def overlay(name: str, folder: Path) -> Path:
    """Install tests/overlay-NAME.txt into `folder`, without what it depends on; the environment stays as it is."""
    pins = Path(__file__).parent / f"overlay-{name}.txt"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "--target", str(folder), "-r", str(pins)], check=True)
    return folder
