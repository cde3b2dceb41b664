"""Sweep files: a base configuration, groups of axes, and the runs that they make. Checked before anything starts.

base: ../quickstart.yaml       # relative to this file; every key of the configuration can be overridden
dir: runs/quick                # folder of the runs (default: runs/ and the name of this file)
set: {train.steps: 400}        # the same for all runs
grid:                          # the product of these axes ...
  train.learning_rate: [1.0e-3, 2.0e-3]
  train.seed: [0, 1]
methods:                       # ... with these groups of keys; a list for an axis of the grid replaces it
  backprop: {objective.name: backprop}
  chunked-4: {objective.name: chunked, objective.chunks: 4, train.learning_rate: [2.0e-3, 4.0e-3]}
halving: {updates: [100, 200, 400], keep: 0.5}  # successive halving per method; the last rung is train.steps
score: {set: choose, exit: last}  # validation set and exit (last, or the block before it) that decide
checkpoints: last              # last: of every run the newest; none: none once the run is over; all: all
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lptransformer.config.load import COMMAND_LINE, load, to_dict
from lptransformer.config.schema import Config
from lptransformer.config.text import parse_yaml, read_text
from lptransformer.errors import ConfigError, UserError
from lptransformer.methods import objectives
from lptransformer.methods.heads import HEADS
from lptransformer.study.halving import Halving

KEYS = ("base", "dir", "set", "grid", "methods", "halving", "score", "checkpoints")
SEED = "train.seed"
CHECKPOINTS = ("last", "none", "all")


@dataclass(frozen=True)
class Score:
    """The validation set and the exit (None: the last, else the block before its head) whose loss decides."""

    set: str
    exit_block: int | None = None


@dataclass(frozen=True)
class Run:
    """One run of a sweep. `setting` is its place in the grid but for the seed, `overrides` what it adds to the base."""

    name: str
    method: str
    setting: str
    folder: Path
    overrides: dict[str, Any]
    config: Config

    @property
    def processes(self) -> int:
        return self.config.parallel.pipeline * self.config.parallel.data

    @property
    def arguments(self) -> list[str]:
        """The overrides for the command line of `train`. JSON is YAML."""
        return [f"--{key}={json.dumps(value)}" for key, value in self.overrides.items()]


@dataclass(frozen=True)
class Sweep:
    file: Path
    base: Path
    folder: Path
    runs: tuple[Run, ...]
    halving: Halving | None
    score: Score
    checkpoints: str

    @property
    def methods(self) -> dict[str, dict[str, list[str]]]:
        """The names of the runs by method and setting."""
        found: dict[str, dict[str, list[str]]] = {}
        for run in self.runs:
            found.setdefault(run.method, {}).setdefault(run.setting, []).append(run.name)
        return found


def read(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a file; `overrides` ("--section.key=VALUE") are the same for all runs and win over the file.

    Raises ConfigError for what is wrong in the file, and for the first run whose configuration is refused.
    """
    file = Path(path)
    raw = _mapping(parse_yaml(read_text(file, "the sweep"), str(file)), f"{file}", KEYS)
    if not isinstance(raw.get("base"), str):
        raise ConfigError(f"{file}: base is {raw.get('base')!r}: give the configuration file that the runs start from")
    base = file.parent / raw["base"]
    folder = Path(_text(raw.get("dir", f"runs/{file.stem}"), f"{file}: dir"))
    common = _mapping(raw.get("set"), f"{file}: set") | _from_command_line(overrides)
    grid = _mapping(raw.get("grid"), f"{file}: grid")
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"{file}: grid: {key} is {values!r}: an axis is a list of values")
        if key in common:
            raise ConfigError(f"{file}: {key} is an axis of the grid and is set for all runs too: give it once")
    if "run.dir" in grid or "run.dir" in common:
        raise ConfigError(f"{file}: run.dir is made from `dir` ({folder}) and the run's name: remove it")
    methods = _mapping(raw.get("methods", {"runs": {}}), f"{file}: methods")
    if not methods:
        raise ConfigError(f"{file}: methods is empty: give a name and its keys, or leave it out")
    runs: list[Run] = []
    for method, own in methods.items():
        if not isinstance(method, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", method):
            raise ConfigError(f"{file}: methods: {method!r}: a name is made of letters, digits, '.', '_', '+' and '-'")
        keys = _mapping(own, f"{file}: methods: {method}")
        if "run.dir" in keys:
            raise ConfigError(f"{file}: methods: {method}: run.dir is made from `dir` and the run's name: remove it")
        runs += _runs(file, base, folder, method, common, grid, keys)
    _refuse_duplicates(file, runs)
    for one in runs:
        if one.config.train.patience is not None:
            raise ConfigError(f"{file}: {one.name}: train.patience: runs of a sweep end at the same update; remove it")
    checkpoints = raw.get("checkpoints", CHECKPOINTS[0])
    if checkpoints not in CHECKPOINTS:
        raise ConfigError(f"{file}: checkpoints is {checkpoints!r}: must be one of {', '.join(CHECKPOINTS)}")
    halving = _halving(file, raw["halving"], runs) if "halving" in raw else None
    return Sweep(file, base, folder, tuple(runs), halving, _score(file, raw.get("score"), runs), checkpoints)


def _runs(
    file: Path,
    base: Path,
    folder: Path,
    method: str,
    common: Mapping[str, Any],
    grid: Mapping[str, list[Any]],
    keys: Mapping[str, Any],
) -> Iterator[Run]:
    """The runs of one method: its own values for an axis replace those of the grid."""
    own_axes = {key: value if isinstance(value, list) else [value] for key, value in keys.items() if key in grid}
    axes = dict(grid) | own_axes
    fixed = {key: value for key, value in keys.items() if key not in grid}
    short = _short_names(grid)
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        words = {key: f"{short[key]}={_word(value)}" for key, value in place.items()}
        name = "/".join(filter(None, (method, ",".join(words.values()))))
        setting = ",".join(word for key, word in words.items() if key != SEED)
        overrides = {**common, **place, **fixed, "run.dir": str(folder / name)}
        given = [f"--{key}={json.dumps(value)}" for key, value in overrides.items()]
        try:
            config = load(base, given)
        except UserError as error:
            reason = str(error).replace(COMMAND_LINE, "in the sweep")
            raise type(error)(f"{file}: run {name}: {reason}") from None
        yield Run(name, method, setting, folder / name, overrides, config)


def _short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """The last part of every key, or the whole key where two end alike."""
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def _word(value: Any) -> str:
    """A value as a part of a folder's name."""
    text = value if isinstance(value, str) else json.dumps(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", text).strip("_") or "_"


def _refuse_duplicates(file: Path, runs: Sequence[Run]) -> None:
    names: set[str] = set()
    same: dict[str, str] = {}
    for run in runs:
        if run.name in names:
            raise ConfigError(f"{file}: two runs are called {run.name}: an axis has a value twice")
        names.add(run.name)
        values = to_dict(run.config)
        del values["run"]
        twin = same.setdefault(json.dumps(values, sort_keys=True), run.name)
        if twin != run.name:
            raise ConfigError(f"{file}: runs {twin} and {run.name} are the same run: remove one")


def _halving(file: Path, raw: Any, runs: Sequence[Run]) -> Halving:
    where = f"{file}: halving"
    given = _mapping(raw, where, ("updates", "keep"))
    updates, keep = given.get("updates"), given.get("keep", 0.5)
    whole = isinstance(updates, list) and all(type(update) is int and update > 0 for update in updates)
    if not isinstance(updates, list) or not whole or len(updates) < 2 or updates != sorted(set(updates)):
        raise ConfigError(f"{where}: updates is {updates!r}: give two or more rising whole numbers, [250, 500, 1000]")
    if type(keep) not in (int, float) or not 0 < keep < 1:
        raise ConfigError(f"{where}: keep is {keep!r}: a share between 0 and 1")
    for run in runs:
        if run.config.train.epochs is not None:
            at = run.config.at("train.epochs")
            raise ConfigError(f"{where} counts updates, and run {run.name} has {at}: give train.steps")
        if run.config.train.steps != updates[-1]:
            raise ConfigError(
                f"{where}: the last of updates is {updates[-1]}, but run {run.name} has "
                f"train.steps = {run.config.train.steps}: the two must be equal"
            )
    return Halving(tuple(updates), float(keep))


def _score(file: Path, raw: Any, runs: Sequence[Run]) -> Score:
    where = f"{file}: score"
    given = _mapping(raw, where, ("set", "exit"))
    first = next(iter(runs[0].config.data.valid_names), None)
    if first is None:
        raise ConfigError(f"{file}: run {runs[0].name} has no validation set: a sweep needs data.valid to compare by")
    name, exit_block = given.get("set", first), given.get("exit", "last")
    if exit_block != "last" and type(exit_block) is not int:
        raise ConfigError(f"{where}: exit is {exit_block!r}: must be last, or the number of the block before a head")
    for run in runs:
        if name not in run.config.data.valid_names:
            there = ", ".join(run.config.data.valid_names) or "none"
            raise ConfigError(f"{where}: set is {name!r}: the validation sets of run {run.name} are: {there}")
        if exit_block != "last" and HEADS[run.config.head.kind].fitted:
            raise ConfigError(f"{where}: exit is {exit_block}: run {run.name} balances its chunks when it starts: last")
        heads = objective_of(run.config).heads
        if exit_block != "last" and exit_block not in heads:
            raise ConfigError(f"{where}: exit is {exit_block}: run {run.name} has heads after the blocks {list(heads)}")
    return Score(name, None if exit_block == "last" else exit_block)


def objective_of(config: Config) -> objectives.Objective:
    return objectives.build(config.model.num_layers, **config.objective.model_dump())


def _from_command_line(overrides: Sequence[str]) -> dict[str, Any]:
    given = {}
    for text in overrides:
        key, equals, value = text.strip().removeprefix("--").partition("=")
        if not equals or not key:
            raise ConfigError(f"{text!r} {COMMAND_LINE} has no value: write --{key}=VALUE")
        given[key] = value if value.startswith("*") else parse_yaml(value, f"{key} {COMMAND_LINE}")
    return given


def _mapping(value: Any, where: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """A mapping, {} where nothing is given. Raises ConfigError for something else, and for a key not in `keys`."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} holds {value!r:.80}: must be a mapping" + (f" of {', '.join(keys)}" if keys else "")
        )
    for key in value:
        if keys and key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else f"valid are {', '.join(keys)}"
            raise ConfigError(f"{where}: unknown key {key}: {hint}")
    return dict(value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{where} is {value!r}: must be text")
    return value
