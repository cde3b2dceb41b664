"""The run folder: what a run was, beside what it made. Nothing here needs torch.

config.yaml       every resolved value         metrics.jsonl, metrics.csv   a row per update (.jsonl: per evaluation)
*.broken          what a resume set aside of environment.json, metrics.jsonl
environment.json  versions, commit, command    loss.png                     the losses as a picture
tokenizer/        the run's own tokenizer      checkpoints/                 see run_folder/checkpoint.py
data.json         the token sets, with counts  diagnosis.*                  what `diagnose` found
model.json        the model's Hugging Face configuration
pretrained/       config.json and generation_config.json of the model folder that it started from
ended.json        how it ended, written last   record.json                  a run of a study, in one file
tensorboard/, wandb/  what these trackers keep (run.trackers)
trace.jsonl       traced updates (run.trace), and trace.json and trace.png that `report --trace` makes of them
profile/          what torch's profiler saw (run.profile): run_folder/profile.py
run.lock, generation  who may write here, see run_folder/lock.py; environment.json, ended.json: run_folder/history.py
Pictures are PNG; `report --svg` adds .svg beside them, and versions before 0.2 wrote both.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lptransformer import files, hub
from lptransformer.config.epochs import steps
from lptransformer.config.load import load, to_dict, to_yaml
from lptransformer.config.resume import changes, resume_differences
from lptransformer.config.schema import Config
from lptransformer.errors import ConfigError, RunError
from lptransformer.run_folder.history import (
    ENDED,
    ENVIRONMENT,
    environment,
    read_end,
    read_object,
    read_starts,
    what_changed,
)
from lptransformer.run_folder.metrics_log import readable

CONFIG, TOKENIZER, DATA, MODEL, PRETRAINED = "config.yaml", "tokenizer", "data.json", "model.json", "pretrained"
PROFILE = "profile"
WITHOUT_TOKENIZER = "a run keeps its tokenizer there; one on rows of a program has that which data.tokenizer names"
LOCK, GENERATION = "run.lock", "generation"  # they stay when a run is replaced: another start may look at them
# All else that a run can leave in its folder: what --overwrite removes, and nothing else.
CONTENTS = (
    *(CONFIG, ENVIRONMENT, TOKENIZER, DATA, MODEL, PRETRAINED),
    *("metrics.jsonl", "metrics.csv", "loss.png", "loss.svg", "checkpoints", "tensorboard", "wandb"),
    *(f"{ENVIRONMENT}.broken", "metrics.jsonl.broken"),
    ENDED,
    *("diagnosis.json", "diagnosis.png", "diagnosis.svg", "record.json"),
    *("trace.jsonl", "trace.json", "trace.png", "trace.svg", PROFILE),
)
# Folders in which others may have put something, and the files there that a run writes; its other folders are its own.
SHARED = ("checkpoints", "tensorboard", PROFILE)
_IN_STEP = r"(complete|deepspeed/.+|stage-\d+/(complete|state\.json|[\w.-]+\.safetensors|deepspeed/.+))"
_WRITTEN = re.compile(
    rf"checkpoints/(set-aside/)?(\.|\.replaced-|\.removed-)?step-\d{{8,}}(\.\d+)?/{_IN_STEP}(\.tmp)?"
    r"|checkpoints/\.?frozen-[\w.-]+|tensorboard/events\.out\.tfevents\..+"
    rf"|{PROFILE}/update-\d+-\d+-rank-\d+\.json\.gz(\.tmp)?"
)


def holds_run(folder: Path) -> bool:
    return bool(_there(folder))


def _there(folder: Path) -> list[str]:
    return [name for name in CONTENTS if os.path.lexists(folder / name)]


def signed(folder: Path) -> list[dict[str, Any]]:
    """What processes of the newest start of a run have written into its lock: host and pid of each, at least."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (folder / LOCK).read_text().splitlines():
            if isinstance(one := json.loads(line), dict) and "host" in one and isinstance(one.get("pid"), int):
                found.append(one)
    return found


def is_own(folder: Path) -> bool:
    """Whether this program has made what is in a folder: a start of a run has signed its lock, or, as before there were
    locks, environment.json says what it ran with."""
    if signed(folder):
        return True
    try:
        starts = json.loads((folder / ENVIRONMENT).read_text())
        return (folder / CONFIG).is_file() and "lptransformer" in starts[0]["versions"]
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_replaceable(folder: Path) -> None:
    """Raises RunError where --overwrite would meet what this program has not made, or would have to follow a link."""
    there = _there(folder)
    if there and not is_own(folder):
        raise RunError(
            f"run.dir is {folder}: it holds {', '.join(there)}, and no run of this program (no signed {LOCK}, and no "
            f"{CONFIG} with its {ENVIRONMENT}), so all of that stays; choose another folder with --run.dir=..."
        )
    if links := [name for name in there if (folder / name).is_symlink()]:
        raise RunError(
            f"run.dir is {folder}: {', '.join(links)} there is a link, and --overwrite follows none; remove the link, "
            "or choose another folder with --run.dir=..."
        )


def refuse_links(folder: Path, update: int | None = None) -> None:
    """Raises RunError for a link among what is read of a run folder, `update`: in that checkpoint too.

    A run writes none, and an export would hand on what one leads to. The folder itself may be a link. What trackers
    keep is not read (wandb makes links).
    """
    found = [path for path in _links(folder, deep=False) if Path(path).name in {*CONTENTS} - {"tensorboard", "wandb"}]
    for name, deep in ((TOKENIZER, True), (PRETRAINED, True), ("checkpoints", False), (PROFILE, False)):
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
        if overwrite or not is_own(folder):
            check_replaceable(folder)
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
    """A new run folder, on the disk when this ends.

    Raises RunError when a run has appeared there meanwhile and `overwrite` does not allow it.
    """
    if holds_run(folder) and not overwrite:
        raise RunError(f"run.dir is {folder}: another run has started there meanwhile; choose another --run.dir=...")
    if left := remove(folder):
        what = ", ".join(str(path.relative_to(folder)) for path in left)
        print(f"lptransformer: left in {folder}, because no run wrote it: {what}", file=sys.stderr, flush=True)
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


def remove(folder: Path) -> list[Path]:
    """Remove a run's files; they vanish from the folder at once, then from the disk. Others stay, and those in the
    run's own folders are returned. Raises RunError where it is no run of this program."""
    check_replaceable(folder)
    written: list[Path] = []
    others: list[Path] = []
    for path in (folder / name for name in _there(folder)):
        if path.name == "wandb" and not (path / "run-id").is_file():  # of another program, which calls it the same
            others.append(path)
        elif path.name in SHARED:
            own, left = _sorted_out(folder, path)
            written, others = written + own, others + left
        else:
            written.append(path)
    if written:
        with tempfile.TemporaryDirectory(prefix=".removed-", dir=folder) as trash:
            for path in written:
                target = Path(trash) / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.rename(target)
    return others


def _sorted_out(folder: Path, path: Path) -> tuple[list[Path], list[Path]]:
    """What a run has written of `path` in its folder, each as whole as can be, and what is there beside it."""
    if path.is_symlink() or not path.is_dir():
        written = bool(_WRITTEN.fullmatch(path.relative_to(folder).as_posix())) and not path.is_symlink()
        return ([path], []) if written else ([], [path])
    own: list[Path] = []
    left: list[Path] = []
    for inside in sorted(path.iterdir()):
        of_inside, left_there = _sorted_out(folder, inside)
        own, left = own + of_inside, left + left_there
    return (own, left) if left else ([path], [])


def read_config(folder: Path) -> Config:
    """The configuration that a run was started with. Raises RunError where the folder holds no run, links, or only a
    part of the file; ConfigError where it is broken."""
    path = folder / CONFIG
    if not path.is_file():
        raise RunError(f"{folder} is no run folder: it has no {CONFIG}")
    refuse_links(folder)
    config = load(path, saved=True)
    if not re.search(r"^deepspeed:", path.read_text(), re.MULTILINE):  # what is cut off would be as by default
        raise RunError(
            f"{path} is not whole: its last section, deepspeed, is missing. `lptransformer config FILE` prints it for "
            "the file that the run was started with"
        )
    return config


def read_data(folder: Path) -> dict[str, Any]:
    """The token sets of a run: {"train": {name: folder}, "valid": {name: folder}}, as `create` was given them."""
    return read_object(folder / DATA)


def read_model_config(folder: Path) -> dict[str, Any]:
    """The configuration of the model that the run trains, as `create` was given it."""
    return read_object(folder / MODEL)
