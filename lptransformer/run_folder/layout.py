"""The run folder: what a run was, beside what it made. Nothing here needs torch.

config.yaml       every resolved value         metrics.jsonl, metrics.csv   one row per update and evaluation
environment.json  versions, commit, command    loss.png                     the losses as a picture
tokenizer/        the run's own tokenizer      checkpoints/                 see run_folder/checkpoint.py
data.json         the token sets, with counts  diagnosis.*                  what `diagnose` found
model.json        the model's Hugging Face configuration
pretrained/       config.json and generation_config.json of the model folder that it started from
ended.json        how it ended, written last   record.json                  a run of a study, in one file
tensorboard/, wandb/  what these trackers keep (run.trackers)
trace.jsonl       traced updates (run.trace), and trace.json and trace.png that `report --trace` makes of them
Pictures are PNG; `report --svg` adds .svg beside them, and versions before 0.2 wrote both.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lptransformer import files, hub
from lptransformer.config.epochs import steps
from lptransformer.config.load import load, resume_differences, to_dict, to_yaml
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError, RunError

CONFIG, ENVIRONMENT, TOKENIZER, DATA, MODEL = "config.yaml", "environment.json", "tokenizer", "data.json", "model.json"
ENDED, PRETRAINED = "ended.json", "pretrained"
WITHOUT_TOKENIZER = "a run keeps its tokenizer there; one on rows of a program has that which data.tokenizer names"
COMMAND_VARIABLE = "LPTRANSFORMER_COMMAND"  # what a person typed, for the processes that a launcher starts
# All that a run can leave in its folder: what --overwrite removes, and nothing else.
CONTENTS = (
    *(CONFIG, ENVIRONMENT, TOKENIZER, DATA, MODEL, PRETRAINED),
    *("metrics.jsonl", "metrics.csv", "loss.png", "loss.svg", "checkpoints", "tensorboard", "wandb"),
    ENDED,
    *("diagnosis.json", "diagnosis.png", "diagnosis.svg", "record.json"),
    *("trace.jsonl", "trace.json", "trace.png", "trace.svg"),
)


def holds_run(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in CONTENTS)


def refuse_links(folder: Path, update: int | None = None) -> None:
    """Raises RunError for a link among what is read of a run folder, `update`: in that checkpoint too.

    A run writes none, and an export would hand on what one leads to. The folder itself may be a link. What trackers
    keep is not read (wandb makes links).
    """
    found = [path for path in _links(folder, deep=False) if Path(path).name in {*CONTENTS} - {"tensorboard", "wandb"}]
    for name, deep in ((TOKENIZER, True), (PRETRAINED, True), ("checkpoints", False)):
        found += _links(folder / name, deep)
    if update is not None:
        found += _links(folder / "checkpoints" / f"step-{update:08d}", deep=True)
    if found:
        raise RunError(
            f"{min(found)} is a link (to {os.readlink(min(found))}): a run folder holds nothing but its own files, so "
            "it is not read; put the files themselves there (the whole run folder may be behind a link)"
        )


def _links(folder: Path | str, deep: bool) -> Iterator[str]:
    """The links in a folder, `deep`: and in those below; nothing where it is missing."""
    if not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink():
                yield entry.path
            elif deep and entry.is_dir():
                yield from _links(entry.path, deep)


def check(folder: Path, config: Config, resume: bool, overwrite: bool, step: int | None = None) -> None:
    """Refuse to start in a folder that holds a run, and to resume what is not the same run.

    Raises RunError: a run is there and neither flag is given; there is nothing to resume, at all or after `step`
    updates; the configuration differs.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir is {folder}: that is a file, not a folder")
    out = Path(config.run.export or "")
    if config.run.export is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"run.export is {out}: something is there already; give a new folder, or an empty one")
    if resume and overwrite:
        message = "--resume and --overwrite were both given: continue the run, or replace it"
        raise RunError(message, change={"--overwrite": ""})
    if step is not None and not resume:
        raise RunError(f"--step={step}: it goes with --resume", change={"": "--resume"})
    if not resume:
        if holds_run(folder) and not overwrite:
            raise RunError(
                f"run.dir is {folder}: it already holds a run. Continue it with --resume, replace it with --overwrite, "
                f"or choose another folder with --run.dir=...",
                **({"command": f"report {folder}"} if _is_complete(folder, config) else {"change": {"": "--resume"}}),
            )
        return
    if not (folder / CONFIG).is_file():
        message = f"run.dir is {folder}: there is no run to resume (no {CONFIG}). Start it without --resume"
        raise RunError(message, change={"--resume": ""})
    differences = resume_differences(to_dict(read_config(folder)), to_dict(config))
    if differences:
        message = f"{folder} cannot be resumed with another configuration: {'; '.join(differences)}"
        raise RunError(message, command=f"train {folder / CONFIG} --resume")
    from lptransformer.run_folder import checkpoint

    done = checkpoint.latest(folder) if step is None else checkpoint.find(folder, step)
    refuse_links(folder, done)
    if done >= steps(config):
        message = f"{folder} is complete: {done} updates of train.steps = {steps(config)}; nothing to resume"
        raise RunError(message, command=f"report {folder}")


def check_until(config: Config, until: int | None, resume: bool, step: int | None = None) -> None:
    """Raises RunError when --until names no update of the run, or one that the run to be resumed has done already."""
    if until is None:
        return
    if config.train.steps is not None and not 1 <= until <= config.train.steps:
        raise RunError(f"--until={until}: give an update from 1 to train.steps = {config.train.steps}")
    if resume:
        from lptransformer.run_folder import checkpoint

        assert config.run.dir is not None
        done = checkpoint.latest(config.run.dir) if step is None else step
        if done >= until:
            raise RunError(f"--until={until}: {config.run.dir} already has {done} updates; nothing to resume")


def _is_complete(folder: Path, config: Config) -> bool:
    """Whether the run there has all of its updates, as far as its folder says so."""
    try:
        ended = json.loads((folder / ENDED).read_text())
        return ended["how"] == "finished" and ended["update"] >= steps(config)
    except (OSError, ValueError, KeyError, ConfigError):
        return False


def check_data(folder: Path, data: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to resume on other token sets; their folders' names say what is in them. Raises RunError."""
    before = read_data(folder)
    for kind, sets in data.items():
        for name, path in sets.items():
            if Path(before[kind].get(name, "none")).name != Path(path).name:
                raise RunError(
                    f"{folder} cannot be resumed: the text of data.{kind} ({name}) or its tokens are not those that "
                    f"the run was started with ({before[kind].get(name)} then, {path} now)"
                )


def create(
    folder: Path,
    config: Config,
    model_config: Mapping[str, Any],
    tokenizer_folder: Path | None,
    data: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """A new run folder, on the disk when this ends.

    Raises RunError when a run has appeared there meanwhile and `overwrite` does not allow it.
    """
    if holds_run(folder) and not overwrite:
        raise RunError(f"run.dir is {folder}: another run has started there meanwhile; choose another --run.dir=...")
    remove(folder)
    files.make_folders(folder)
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER)
        files.sync_all(folder / TOKENIZER)
    files.write_text(folder / DATA, json.dumps(data, indent=1) + "\n")
    files.write_text(folder / MODEL, json.dumps(model_config, indent=1) + "\n")
    if config.model.pretrained is not None:
        (folder / PRETRAINED).mkdir()
        pretrained = hub.folder(config.model.pretrained, config.at("model.pretrained"))
        for name in ("config.json", "generation_config.json"):
            if (given := pretrained / name).is_file():
                shutil.copyfile(given, folder / PRETRAINED / name)
        files.sync_all(folder / PRETRAINED)
    files.write_text(folder / ENVIRONMENT, json.dumps([environment()], indent=1) + "\n")
    files.write_text(folder / CONFIG, to_yaml(config))


def hub_commits(folder: Path) -> dict[str, str]:
    """The commits of models of the hub that the newest start of a run took; none where nothing says so."""
    try:
        found: dict[str, str] = json.loads((folder / ENVIRONMENT).read_text())[-1].get("hub_commits", {})
    except (OSError, ValueError, LookupError):
        return {}
    return found


def public_name(folder: Path, model: str) -> str:
    """What a model that a run read is called on other machines: OWNER/NAME, or the name of its folder."""
    return model if model in hub_commits(folder) else Path(model).name


def note_resume(folder: Path, config: Config, update: int) -> None:
    """Add to a resumed run what it goes on with: environment.json has one entry per start."""
    starts = json.loads((folder / ENVIRONMENT).read_text())
    starts.append({**environment(), "resumed_after": update})
    files.write_text(folder / ENVIRONMENT, json.dumps(starts, indent=1) + "\n")
    files.write_text(folder / CONFIG, to_yaml(config))


def note_end(folder: Path, how: str, update: int) -> None:
    """How the run ended, written last: finished, stopped (it can be resumed), failed, or lost a process."""
    files.write_text(folder / ENDED, json.dumps({"how": how, "update": update}) + "\n")


def read_end(folder: Path) -> str | None:
    """How the run in a folder ended; None while it goes on, or where it was killed."""
    try:
        how: str = json.loads((folder / ENDED).read_text())["how"]
    except (OSError, ValueError, KeyError):
        return None
    return how


def forget_end(folder: Path) -> None:
    """Before a run goes on."""
    (folder / ENDED).unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Remove a run's files; others in the folder stay. They vanish from the folder at once, then from the disk."""
    if not holds_run(folder):
        return
    with tempfile.TemporaryDirectory(prefix=".removed-", dir=folder) as trash:
        for name in CONTENTS:
            if os.path.lexists(folder / name):
                os.rename(folder / name, Path(trash) / name)


def environment() -> dict[str, Any]:
    """What the run's numbers depend on beside its configuration."""
    packages = ("lptransformer", "torch", "deepspeed", "transformers", "datasets", "sentencepiece", "numpy")
    return {
        "command": json.loads(os.environ.get(COMMAND_VARIABLE) or json.dumps(command_line())),
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


def read_config(folder: Path) -> Config:
    """The configuration that a run was started with. Raises RunError where the folder holds no run, or links."""
    if not (folder / CONFIG).is_file():
        raise RunError(f"{folder} is no run folder: it has no {CONFIG}")
    refuse_links(folder)
    return load(folder / CONFIG, saved=True)


def read_data(folder: Path) -> dict[str, Any]:
    """The token sets of a run: {"train": {name: folder}, "valid": {name: folder}}, as `create` was given them."""
    return _read_json(folder / DATA)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The configuration of the model that the run trains, as `create` was given it."""
    return _read_json(folder / MODEL)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        return content
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None


def command_line() -> list[str]:
    return [Path(sys.executable).name, *sys.argv]


def program(started_by: str = "") -> str:
    """How a person calls this program: as the console script where that was typed."""
    return "lptransformer" if Path(started_by or sys.argv[0]).name == "lptransformer" else "python -m lptransformer"


def command_to_resume() -> str | None:
    """What a person typed to start this run, with --resume; None where another launcher started it."""
    _, script, *arguments = json.loads(os.environ.get(COMMAND_VARIABLE) or json.dumps(command_line()))
    if Path(script).name not in ("__main__.py", "lptransformer"):
        return None
    once = ("--until", "--step")
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before not in once and word not in ("--resume", "--overwrite") and word.partition("=")[0] not in once
    ]
    return f"{program(script)} {shlex.join([*kept, '--resume'])}"
