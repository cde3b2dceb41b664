"""The run folder: what a run was, beside what it made. Nothing here needs torch.

config.yaml       every resolved value         metrics.jsonl, metrics.csv   one row per update and evaluation
*.broken          what a resume set aside of environment.json, metrics.jsonl
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
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lptransformer import files, hub
from lptransformer.config.epochs import steps
from lptransformer.config.load import load, to_dict, to_yaml
from lptransformer.config.resume import changes, resume_differences
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError, RunError
from lptransformer.run_folder.metrics_log import readable

CONFIG, ENVIRONMENT, TOKENIZER, DATA, MODEL = "config.yaml", "environment.json", "tokenizer", "data.json", "model.json"
ENDED, PRETRAINED = "ended.json", "pretrained"
WITHOUT_TOKENIZER = "a run keeps its tokenizer there; one on rows of a program has that which data.tokenizer names"
COMMAND_VARIABLE = "LPTRANSFORMER_COMMAND"  # what a person typed, for the processes that a launcher starts
# All that a run can leave in its folder: what --overwrite removes, and nothing else.
CONTENTS = (
    *(CONFIG, ENVIRONMENT, TOKENIZER, DATA, MODEL, PRETRAINED),
    *("metrics.jsonl", "metrics.csv", "loss.png", "loss.svg", "checkpoints", "tensorboard", "wandb"),
    *(f"{ENVIRONMENT}.broken", "metrics.jsonl.broken"),
    ENDED,
    *("diagnosis.json", "diagnosis.png", "diagnosis.svg", "record.json"),
    *("trace.jsonl", "trace.json", "trace.png", "trace.svg"),
)


def holds_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in CONTENTS)


def check(folder: Path, config: Config, resume: bool, overwrite: bool) -> None:
    """Refuse to start in a folder that holds a run, and to resume what is not the same run.

    Raises RunError: a run is there and neither flag is given; there is nothing to resume; the configuration differs.
    """
    if folder.exists() and not folder.is_dir():
        raise RunError(f"run.dir is {folder}: that is a file, not a folder")
    out = Path(config.run.export or "")
    if config.run.export is not None and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(f"run.export is {out}: something is there already; give a new folder, or an empty one")
    if resume and overwrite:
        message = "--resume and --overwrite were both given: continue the run, or replace it"
        raise RunError(message, change={"--overwrite": ""})
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

    done = checkpoint.latest(folder)
    if done > steps(config):
        raise RunError(f"{config.at('train.steps')}: {folder} already has {done} updates; give {done + 1} or more")
    if done == steps(config) and has_ended(folder, config, done):
        message = f"{folder} is complete: {done} updates of train.steps = {steps(config)}; nothing to resume"
        raise RunError(message, command=f"report {folder}")


def is_evaluated(config: Config, update: int, until: int | None = None) -> bool:
    """Whether an evaluation follows an update, as configured; the last one, or `until`, is followed by one always. 0 is
    before training: what that makes of a pretrained model shows in comparison alone."""
    if update == 0:
        return config.model.pretrained is not None
    every = config.train.eval_every
    return update >= (until or steps(config)) or (every > 0 and update % every == 0)


def owed(folder: Path, config: Config, update: int, until: int | None = None) -> list[str]:
    """The validation sets whose evaluation after `update` is due, and not in the metrics."""
    if not is_evaluated(config, update, until):
        return []
    made = [row["evaluation"] for row in readable(folder)[0] if "evaluation" in row and row["update"] == update]
    return [name for name in config.data.valid_names if name not in made]


def has_ended(folder: Path, config: Config, update: int, until: int | None = None) -> bool:
    """Whether a run that is saved after its last update, or after `until`, has nothing left to do: no evaluation, no
    note of its end, which is written last."""
    return read_end(folder) == "finished" and not owed(folder, config, update, until)


def check_until(config: Config, until: int | None, resume: bool) -> None:
    """Raises RunError when --until names no update of the run, or one that the run to be resumed has done already."""
    if until is None:
        return
    if config.train.steps is not None and not 1 <= until <= config.train.steps:
        raise RunError(f"--until={until}: give an update from 1 to train.steps = {config.train.steps}")
    if resume:
        from lptransformer.run_folder import checkpoint

        assert config.run.dir is not None
        done = checkpoint.latest(config.run.dir)
        if done > until or (done == until and has_ended(Path(config.run.dir), config, done, until)):
            raise RunError(f"--until={until}: {config.run.dir} already has {done} updates; nothing to resume")


def _is_complete(folder: Path, config: Config) -> bool:
    """Whether the run there has all of its updates, as far as its folder says so."""
    try:
        ended = json.loads((folder / ENDED).read_text())
        return ended["how"] == "finished" and ended["update"] >= steps(config)
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return False


def check_data(folder: Path, data: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse to resume on token sets of other content, wherever they are. Raises RunError."""
    before = read_data(folder)
    names = list(before.get("train", {})), list(data["train"])
    if names[0] != names[1]:
        raise RunError(f"{folder} cannot be resumed: data.train has {names[1]} now and had {names[0]}, in this order")
    for kind, sets in data.items():
        for name, path in sets.items():
            then = before.get(kind, {}).get(name)
            if then is None or address_of_set(then) != address_of_set(path):
                raise RunError(
                    f"{folder} cannot be resumed: the text of data.{kind} ({name}) or its tokens are not those that "
                    f"the run was started with ({then} then, {path} now)"
                )


def address_of_set(folder: str) -> str:
    """What stands for all that decides a token set (data/prepare); where its folder has gone, the end of its name."""
    try:
        found: str = json.loads((Path(folder) / "state.json").read_text())["_fingerprint"]
    except (OSError, ValueError, LookupError, TypeError):
        return Path(folder).name.rpartition("-")[2]
    return found


def create(
    folder: Path,
    config: Config,
    model_config: Mapping[str, Any],
    tokenizer_folder: Path | None,
    data: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """A new run folder. Raises RunError when a run has appeared there meanwhile and `overwrite` does not allow it."""
    if holds_run(folder) and not overwrite:
        raise RunError(f"run.dir is {folder}: another run has started there meanwhile; choose another --run.dir=...")
    remove(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer_folder is not None:
        shutil.copytree(tokenizer_folder, folder / TOKENIZER)
    (folder / DATA).write_text(json.dumps(data, indent=1) + "\n")
    (folder / MODEL).write_text(json.dumps(model_config, indent=1) + "\n")
    if config.model.pretrained is not None:
        (folder / PRETRAINED).mkdir()
        pretrained = hub.folder(config.model.pretrained, config.at("model.pretrained"))
        for name in ("config.json", "generation_config.json"):
            if (given := pretrained / name).is_file():
                shutil.copyfile(given, folder / PRETRAINED / name)
    (folder / ENVIRONMENT).write_text(json.dumps([environment()], indent=1) + "\n")
    (folder / CONFIG).write_text(to_yaml(config))


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


def note_resume(folder: Path, config: Config, update: int, data: Mapping[str, Any]) -> list[str]:
    """Add to a resumed run what it goes on with: environment.json has one entry per start, with what has changed.

    A broken environment.json is set aside. Returns what there is to say.
    """
    said = []
    try:
        starts = read_starts(folder)
    except RunError as error:
        starts = []
        if (folder / ENVIRONMENT).exists():
            error = RunError(f"{error}; it is {files.set_aside(folder / ENVIRONMENT).name} now")
        said.append(str(error))
    found = changes(to_dict(read_config(folder)), to_dict(config))
    changed = {one.key: [one.before, one.now] for one in found if not one.key.startswith("run.")}
    starts.append({**environment(), "resumed_after": update, "changed": changed})
    files.write_text(folder / ENVIRONMENT, json.dumps(starts, indent=1) + "\n")
    files.write_text(folder / DATA, json.dumps(data, indent=1) + "\n")
    files.write_text(folder / CONFIG, to_yaml(config))
    return said + what_changed(starts[-1:])


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
            if (folder / name).exists():
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
    """The configuration that a run was started with. Raises RunError where the folder holds no run, or only a part of
    the file is there; ConfigError where it is broken."""
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is no run folder: it has no {CONFIG}")
    config = load(path, saved=True)
    if not re.search(r"^deepspeed:", path.read_text(), re.MULTILINE):  # what is cut off would be as by default
        raise RunError(
            f"{path} is not whole: its last section, deepspeed, is missing. `lptransformer config FILE` prints it for "
            "the file that the run was started with"
        )
    return config


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
    kept = [
        word
        for before, word in zip(["", *arguments], arguments, strict=False)
        if before != "--until" and word not in ("--resume", "--overwrite") and word.partition("=")[0] != "--until"
    ]
    return f"{program(script)} {shlex.join([*kept, '--resume'])}"
