"""Errors that are meant for the person who started the program: one clear message, an exit code, no traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class UserError(Exception):
    """A mistake in the request. The message names the value, where it came from and what would be right.

    What a person can type next is the same command with some words in place of others (`change`; the empty one is what
    comes at the end), or another one (`command`), where the code that raises knows it.
    """

    exit_code = 2

    def __init__(self, message: str, *, change: Mapping[str, str] | None = None, command: str = "") -> None:
        super().__init__(message)
        self.change, self.command = dict(change or {}), command


class ConfigError(UserError):
    """The configuration is wrong: an unknown key, a value out of range, options that contradict each other."""


class OptionError(ConfigError):
    """An option does not fit what it is used with: "KEY is VALUE: PROBLEM".

    `key` and the keys `beside` it are dotted keys of the configuration; code that knows where their values came
    from can add that.
    """

    def __init__(self, key: str, value: Any, problem: str, beside: Sequence[str] = ()) -> None:
        super().__init__(f"{key} is {value}: {problem}")
        self.key, self.problem, self.beside = key, problem, tuple(beside)


class NoMeaningError(ConfigError):
    """Dotted `keys` were given that have no meaning beside others, or a value that does not fit these.

    `instead` is the value that the (one) key could take; None: as if it was not given. Where a value that was typed is
    the reason and the keys come from a file, the configuration goes on without them.
    """

    def __init__(self, message: str, keys: Sequence[str], beside: Sequence[str], instead: Any = None) -> None:
        super().__init__(message, change={f"--{key}": "" for key in keys})
        self.keys, self.beside, self.instead = tuple(keys), tuple(beside), instead


class DataError(UserError):
    """A text file, token set or tokenizer is missing, broken, or does not fit the others."""


class ModelError(UserError):
    """A model folder is missing or broken, or the model cannot be cut as asked."""


class RunError(UserError):
    """A run folder or export folder is not in the state that the command needs."""


class TrainingError(Exception):
    """Training cannot go on, through no mistake of the user (for example: losses that are not finite).

    `reports` holds the reports that had arrived when it happened.
    """

    exit_code = 1
    how = "failed"

    def __init__(self, message: str, reports: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.reports = list(reports)


class LostProcessError(TrainingError):
    """Another process of the run has gone, or cannot be reached."""

    exit_code = 4
    how = "lost a process"


class TakenOverError(TrainingError):
    """Another start of this run has its folder now: this one must not write there any more."""
