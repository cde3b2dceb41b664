"""The checkpoints of a run on disk: which there are, which of them count, and what keeps them whole.

    <run>/checkpoints/step-00000300/           has this name when all of it is on disk
                          complete             JSON: bytes and xxh3-128 of every file, seconds that it cost
                          stage-0/             the files of a stage (run_folder/saved_stage.py)
                      frozen-<sum>.safetensors weights that never change, once for all steps
                      .step-00000400.2/        being written by the second start, or left by it when it was killed

Every stage is written by its own processes at its own time, without waiting for the others. Global rank 0 hears of
each, and makes the checkpoint count.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

from lptransformer import files
from lptransformer.errors import RunError
from lptransformer.run_folder import history

COMPLETE = "complete"
HIDDEN = (".step-*", ".replaced-*", ".removed-*", ".frozen-*")  # what is on its way, or was left there
FROZEN = re.compile(r"frozen-[0-9a-f]{32}\.safetensors")
_INSIDE = re.compile(rf"(\.\./{FROZEN.pattern})|((stage-\d+|deepspeed)/)?[\w-][\w.-]*(/[\w-][\w.-]*)*")
FORMAT = 2  # of a checkpoint and its state.json; 1 is DeepSpeed's files with a marker in every stage's folder
Sums = Mapping[str, list[int | str]]
"""Bytes and xxh3-128 of files, by their path below the folder of a checkpoint; those of frozen weights are beside it,
so their paths begin with `../`."""


def folder_of(run: str | Path, update: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{update:08d}"


def unfinished_folder(run: str | Path, update: int, generation: int = 0) -> Path:
    """Where a checkpoint is while a start of the run writes it: every start has a place of its own."""
    return folder_of(run, update).with_name(f".step-{update:08d}.{generation}")


def stage_folder(run: str | Path, update: int, stage: int) -> Path:
    return folder_of(run, update) / f"stage-{stage}"


def finish(run: str | Path, update: int, sums: Sums, generation: int = 0, lost_seconds: float = 0.0) -> None:
    """Make the checkpoint count, all of whose files are on disk; one that had its name is gone. On global rank 0.

    `lost_seconds` are the most that saving it kept a process from training.
    """
    folder, final = unfinished_folder(run, update, generation), folder_of(run, update)
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        if path.relative_to(folder).as_posix() not in sums:  # of a save that was interrupted here
            path.unlink()
    about = {"format": FORMAT, "update": update, "generation": generation, "lost_seconds": round(lost_seconds, 3)}
    marker = {**about, "files": sums}
    files.write_text(folder / COMPLETE, json.dumps(marker, indent=1) + "\n")
    files.sync(folder)
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    files.sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_unfinished(run: str | Path) -> None:
    """Remove what a run that was killed had begun to save. A checkpoint that was being replaced is there again."""
    for replaced in (Path(run) / "checkpoints").glob(".replaced-*"):
        whole = replaced.with_name(replaced.name.removeprefix(".replaced-"))
        if whole.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(whole)
    for pattern in HIDDEN:
        for begun in (Path(run) / "checkpoints").glob(pattern):
            shutil.rmtree(begun) if begun.is_dir() else begun.unlink()
    if (Path(run) / "checkpoints").is_dir():
        files.sync(Path(run) / "checkpoints")


def complete_updates(run: str | Path) -> list[int]:
    """The updates of the checkpoints that count, oldest first."""
    updates = []
    for folder in sorted((Path(run) / "checkpoints").glob("step-*")):
        match = re.fullmatch(r"step-(\d{8,})", folder.name)
        if match and ((folder / COMPLETE).is_file() or _older_is_complete(folder)):
            updates.append(int(match[1]))
    return updates


def _older_is_complete(folder: Path) -> bool:
    """Of format 1: every stage has a marker of its own."""
    stages = [stage for stage in folder.glob("stage-*") if (stage / COMPLETE).exists()]
    with contextlib.suppress(RunError):
        return bool(stages) and len(stages) == history.read_object(stages[0] / "state.json").get("num_stages")
    return False


def latest(run: str | Path) -> int:
    """The update of the newest checkpoint that counts. Raises RunError when there is none."""
    updates = complete_updates(run)
    if not updates:
        message = f"{run} holds no complete checkpoint: train first, or name another run folder"
        raise RunError(message, command=f"train CONFIG --run.dir={run}")
    return updates[-1]


def find(run: str | Path, update: int) -> int:
    """`update`, where there is a checkpoint after so many updates that counts. Raises RunError where there is none."""
    updates = complete_updates(run)
    if update not in updates:
        there = f"there are those after {', '.join(map(str, updates))} updates" if updates else "there is none"
        raise RunError(f"{run} holds no complete checkpoint after {update} updates (--step): {there}")
    return update


def set_aside_newer(run: str | Path, update: int) -> list[Path]:
    """Move what a run has saved after `update` to `checkpoints/set-aside`: stages of a trajectory that a resumed run
    may not follow, or damaged. Returns where they are now."""
    moved = []
    for folder in sorted((Path(run) / "checkpoints").glob("step-*")):
        if folder.name[5:].isdigit() and int(folder.name[5:]) > update:
            aside = folder.parent / "set-aside"
            aside.mkdir(exist_ok=True)
            number = next(n for n in range(10**6) if not (aside / f"{folder.name}.{n}").exists())
            folder.rename(aside / f"{folder.name}.{number}")
            moved.append(aside / f"{folder.name}.{number}")
            files.sync(aside)
            files.sync(aside.parent)
    return moved


def lost_seconds(run: str | Path, update: int) -> float | None:
    """What saving it kept training for; None where its marker does not say so."""
    try:
        return float(history.read_object(folder_of(run, update) / COMPLETE)["lost_seconds"])
    except (RunError, LookupError, TypeError, ValueError):
        return None


def has_sums(run: str | Path, update: int) -> bool:
    """Whether a checkpoint has a marker of its own: those of format 1 have one in every stage's folder."""
    return (folder_of(run, update) / COMPLETE).is_file()


def read_sums(folder: Path, set_aside: bool = False) -> Sums:
    """What the marker of a checkpoint says of its files; nothing for one of format 1. One that was set aside has
    another name.

    Raises RunError where the marker is damaged, or of another step.
    """
    if not (folder / COMPLETE).is_file():
        return {}
    marker = history.read_object(folder / COMPLETE)
    try:
        written, update = int(marker["format"]), int(marker["update"])
        sums: Sums = {str(path): [int(size), str(total)] for path, (size, total) in marker["files"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise _damaged(folder / COMPLETE, f"{type(error).__name__} {error}") from None
    if not sums:
        raise _damaged(folder / COMPLETE, "it names no file")
    if outside := next((path for path in sums if not _INSIDE.fullmatch(path)), None):
        raise _damaged(folder / COMPLETE, f"{outside!r} is no file of a checkpoint")
    if written > FORMAT:
        raise RunError(
            f"{folder / COMPLETE} has format {written}, and this version reads {FORMAT} and older ones: use a newer one"
        )
    if not set_aside and folder.name != f"step-{update:08d}":
        raise _damaged(folder / COMPLETE, f"it was written after {update} updates")
    return sums


def check(folder: Path, paths: Iterable[str] | None = None) -> None:
    """Compare files of a checkpoint (all of them, or some by their path below it) with their sums.

    A file that was found good is not read again by this process, unless it has changed. Raises RunError.
    """
    sums = read_sums(folder)
    for path in sums if paths is None else paths:
        if not sums:  # of format 1
            return
        if path not in sums:
            raise _damaged(folder / path, f"{COMPLETE} does not name it")
        size, total = sums[path]
        try:
            found = (folder / path).stat()
            if found.st_size != size:
                raise _damaged(folder / path, f"it has {found.st_size} bytes, and {size} were written")
            if _sum_of(folder / path, found.st_size, found.st_mtime_ns, found.st_ino) != total:
                raise _damaged(folder / path, "its content is not what was written")
        except OSError as error:
            raise _damaged(folder / path, error.strerror or str(error)) from None


@lru_cache(maxsize=4096)
def _sum_of(path: Path, *_state: int) -> str:
    return files.sum_of(path)


def _damaged(path: Path, why: str) -> RunError:
    return RunError(f"{path} is damaged ({why})")
