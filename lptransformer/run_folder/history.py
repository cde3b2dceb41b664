"""How the starts of a run began and how the last one ended: environment.json and ended.json, and what a person typed.
Nothing here needs torch."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lptransformer import files, hub
from lptransformer.errors import RunError

ENVIRONMENT, ENDED = "environment.json", "ended.json"
COMMAND_VARIABLE = "LPTRANSFORMER_COMMAND"  # what a person typed, for the processes that a launcher starts


def hub_commits(folder: Path) -> dict[str, str]:
    """The commits of models of the hub that the newest start of a run took; none where nothing says so."""
    try:
        found: dict[str, str] = read_starts(folder)[-1].get("hub_commits", {})
    except RunError:
        return {}
    return found


def public_name(folder: Path, model: str) -> str:
    """What a model that a run read is called on other machines: OWNER/NAME, or the name of its folder."""
    return model if model in hub_commits(folder) else Path(model).name


def what_changed(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every start of a run that went on with another configuration."""

    def text(value: Any) -> str:
        return "not set" if value is None else str(value)

    return [
        f"resumed after update {start['resumed_after']} with "
        + ", ".join(f"{key} {text(before)} -> {text(now)}" for key, (before, now) in start["changed"].items())
        for start in starts
        if start.get("changed")
    ]


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """What environment.json has of every start of a run, the newest last. Raises RunError."""
    path = folder / ENVIRONMENT
    try:
        starts = json.loads(path.read_text())
        if not (isinstance(starts, list) and starts and all(isinstance(start, dict) for start in starts)):
            raise ValueError("it holds no list of starts")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    return starts


def note_end(folder: Path, how: str, update: int, command: Sequence[str | int]) -> None:
    """How the run ended, written last: finished, stopped (it can be resumed), failed, or lost a process; and by which
    command it was started ([host, pid])."""
    files.write_text(folder / ENDED, json.dumps({"how": how, "update": update, "command": command}) + "\n")


def read_end(folder: Path, command: Sequence[str | int] | None = None) -> str | None:
    """How the run in a folder ended; None while it goes on, where it was killed, or another command started it."""
    try:
        end = json.loads((folder / ENDED).read_text())
        how: str = end["how"]
    except (OSError, ValueError, KeyError):
        return None
    return how if command is None or end.get("command") == list(command) else None


def forget_end(folder: Path) -> None:
    """Before a run goes on."""
    (folder / ENDED).unlink(missing_ok=True)


def environment() -> dict[str, Any]:
    """What the run's numbers depend on beside its configuration."""
    packages = ("lptransformer", "torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
    return {
        "command": typed_command(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": {name: _version(name) for name in packages},
        "hub_commits": hub.commits(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """The answer of git about the checkout that this code is in; None where it is in none."""
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command_line() -> list[str]:
    return [Path(sys.executable).name, *sys.argv]


def typed_command() -> list[str]:
    """What a person typed to start this run, also in the processes of a launcher."""
    words: list[str] = json.loads(os.environ.get(COMMAND_VARIABLE) or "null") or command_line()
    return words


def program(started_by: str = "") -> str:
    """How a person calls this program: as the console script where that was typed."""
    return "lptransformer" if Path(started_by or sys.argv[0]).name == "lptransformer" else "python -m lptransformer"


def command_to_resume() -> str | None:
    """What a person typed to start this run, with --resume; None where another launcher started it."""
    _, script, *arguments = typed_command()
    if Path(script).name not in ("__main__.py", "lptransformer"):
        return None
    once = ("--until", "--step")
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before not in once and word not in ("--resume", "--overwrite") and word.partition("=")[0] not in once
    ]
    return f"{program(script)} {shlex.join([*kept, '--resume'])}"


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a run that holds an object. Raises RunError."""
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
