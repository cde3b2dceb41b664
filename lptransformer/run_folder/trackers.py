"""Where the metrics of a run go beside its folder: `run.trackers`. A tracker is a row.

Global rank 0 alone writes. What a tracker gets are the numbers of metrics.jsonl under tags such as `loss/stage0`, and
`books/perplexity/stage0` for the validation set `books`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lptransformer.config.text import parse_yaml
from lptransformer.errors import RunError
from lptransformer.run_folder.metrics import MetricsRow


class Tracker(NamedTuple):
    """An open tracker: `log` takes the number of an update and its scalars by tag."""

    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


@dataclass(frozen=True)
class TrackerRow:
    """`package` is what must be installed (the extra of this name brings it). `open` takes the run folder and, where
    the run is resumed, the update after which it goes on, in the tracker's run of before."""

    package: str
    open: Callable[[Path, int | None], Tracker]


def _tensorboard(folder: Path, resume_at: int | None) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder / "tensorboard", purge_step=None if resume_at is None else resume_at + 1)

    def log(update: int, scalars: dict[str, float]) -> None:
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, update)

    return Tracker(log, writer.close)


def _wandb(folder: Path, resume_at: int | None) -> Tracker:
    """Project, entity and mode come from wandb's own variables (WANDB_PROJECT, WANDB_MODE=offline)."""
    import wandb

    own, id_file = folder / "wandb", folder / "wandb" / "run-id"
    own.mkdir(exist_ok=True)
    if resume_at is None or not id_file.is_file():
        id_file.write_text(uuid.uuid4().hex[:12])
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "lptransformer"),
        id=id_file.read_text(),
        name=folder.name,
        dir=folder,
        resume="allow",
        config=parse_yaml((folder / "config.yaml").read_text(), "config.yaml"),
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="update")  # a resumed run may go back: wandb's own steps cannot
    return Tracker(lambda update, scalars: run.log({**scalars, "update": update}), run.finish)


TRACKERS = {"tensorboard": TrackerRow("tensorboard", _tensorboard), "wandb": TrackerRow("wandb", _wandb)}


def open_trackers(names: Iterable[str], folder: Path, resume_at: int | None) -> list[Tracker]:
    """Those that open; of the others a line says why not: a service that is down ends no run."""
    found = []
    for name in names:
        try:
            found.append(TRACKERS[name].open(folder, resume_at))
        except Exception as error:
            _warn(f"{name} does not open, and gets nothing: {error}")
    return found


def give_trackers(trackers: list[Tracker], update: int, numbers: dict[str, float]) -> None:
    """To all of them. One that fails gets nothing more, and leaves the list."""
    for tracker in list(trackers):
        try:
            tracker.log(update, numbers)
        except Exception as error:
            trackers.remove(tracker)
            _warn(f"one takes nothing, and gets no more: {error}")


def close_trackers(trackers: Iterable[Tracker]) -> None:
    for tracker in trackers:
        try:
            tracker.close()
        except Exception as error:
            _warn(f"one does not close: {error}")


def _warn(text: str) -> None:
    print(f"warning: run.trackers: {text}", file=sys.stderr, flush=True)


def check_installed(names: Iterable[str]) -> None:
    """Raises RunError for a tracker whose package is not there."""
    for name in names:
        spec = importlib.util.find_spec(TRACKERS[name].package)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise RunError(
                f'run.trackers has {name}, whose package is not installed: pip install "lptransformer[{name}]" '
                f"(or {TRACKERS[name].package} alone)"
            )


def scalars(row: MetricsRow) -> dict[str, float]:
    """The numbers of a row of metrics by tag."""
    prefix = f"{row['evaluation']}/" if "evaluation" in row else ""
    found: dict[str, float] = {}
    for key in ("tokens", "seconds", "tokens_per_second", "tflops_per_process", "mfu", "learning_rate"):
        if row.get(key) is not None:
            found[key] = row[key]
    entries: list[dict[str, Any]] = row.get("stages", []) + row.get("exits", [])
    for entry in entries:
        for key, value in entry.items():
            if key not in ("stage", "last_block") and value is not None:
                found[f"{prefix}{key}/stage{entry['stage']}"] = float(value)
    return found
