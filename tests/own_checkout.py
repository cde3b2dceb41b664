"""A checkout for programs that tests start as a person would, in a folder of its own."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_checkout(copy: Path) -> Path:
    """A copy of the tracked files beside the environment that runs the tests."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    # An environment of its own to look at, whose parts are those of this one; the scripts find it installed.
    (copy / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != "installed":
            (copy / ".venv" / part.name).symlink_to(part)
    wanted = b"".join((copy / name).read_bytes() for name in ("requirements.txt", "pyproject.toml"))
    (copy / ".venv" / "installed").write_text(hashlib.sha256(wanted).hexdigest() + "\n")
    return copy


def environment(**more: str) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    keep = {key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    return {**keep, "PATH": path, "OMP_NUM_THREADS": "1", **more}


def run(checkout: Path, *command: str, timeout: float = 300, **more: str) -> str:
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, text=True, timeout=timeout, env=environment(**more)
    )
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout
