"""A stage's state on disk: folders, complete markers, weights by name.

    <run>/checkpoints/step-00000300/stage-0/weights.safetensors   what evaluation and export read
                                            state.json            counters, learning-rate schedule, place in the model
                                            deepspeed/            optimizer state, written by DeepSpeed
                                            others.safetensors    what else training needs to go on, if anything
                                            complete              written last

Every stage is written by its own processes at its own time, without waiting for the others: a checkpoint counts when
all its stages are complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lptransformer.errors import RunError
from lptransformer.methods.stages import StagePlan

WEIGHTS, STATE, COMPLETE, DEEPSPEED = "weights.safetensors", "state.json", "complete", "deepspeed"
OTHERS = "others.safetensors"
FORMAT = 1  # of state.json; older files have no number


def stage_folder(run: str | Path, update: int, stage: int) -> Path:
    return Path(run) / "checkpoints" / f"step-{update:08d}" / f"stage-{stage}"


def begin_stage(folder: Path) -> None:
    """An empty folder without a marker, also where an earlier, interrupted save left something."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def write_stage(
    folder: Path,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    others: Mapping[str, Tensor] | None = None,
) -> None:
    """Weights and state of a stage; finish_stage makes it count once all processes of the stage have written.

    `others` are tensors that are no weights and that training needs to go on: versions of weights that come later, or
    were before.
    """
    for name, tensors in ((WEIGHTS, weights), (OTHERS, others)):
        if tensors:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / name)
            (folder / name).chmod(folder.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
    (folder / STATE).write_text(json.dumps(state, indent=1))


def finish_stage(folder: Path) -> None:
    for path in (folder / WEIGHTS, folder / STATE, folder / OTHERS):
        if not path.exists():  # the last, where there is nothing else
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    (folder / COMPLETE).touch()


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises RunError when it is damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
        StagePlan(**state["plan"]), int(state["num_stages"])
        written = int(state.get("format", 0))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder / STATE} cannot be read ({error}): choose another checkpoint") from None
    if written > FORMAT:
        raise RunError(
            f"{folder / STATE} has format {written}, and this version reads {FORMAT} and older ones: use a newer one"
        )
    return state


def read_weights(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a stage with a wanted name, on the CPU. Raises RunError when the file is damaged."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if wanted(name)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / WEIGHTS} cannot be read ({error}): choose another checkpoint") from None


def read_others(folder: Path) -> dict[str, Tensor]:
    """The tensors of a stage that are no weights. Raises RunError when the file is damaged."""
    try:
        return load_file(folder / OTHERS) if (folder / OTHERS).exists() else {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / OTHERS} cannot be read ({error}): choose another checkpoint") from None


def describe(plan: StagePlan, num_stages: int, update: int, position: Mapping[str, int]) -> dict[str, Any]:
    """What state.json says about where the stage belongs, and how far into the data (epoch, offset) it came."""
    where = {"update": update, "position": dict(position), "num_stages": num_stages}
    return {"format": FORMAT, **where, "plan": asdict(plan)}


def complete_updates(run: str | Path) -> list[int]:
    """The updates of the checkpoints whose stages are all complete, oldest first."""
    updates = []
    for folder in sorted((Path(run) / "checkpoints").glob("step-*")):
        match = re.fullmatch(r"step-(\d{8,})", folder.name)
        stages = [stage for stage in folder.glob("stage-*") if (stage / COMPLETE).exists()]
        if match and stages and len(stages) == read_state(stages[0])["num_stages"]:
            updates.append(int(match[1]))
    return updates


def remove_newer(run: str | Path, update: int) -> None:
    """Remove what a run has saved after `update`: stages of a trajectory that a resumed run may not follow."""
    for folder in (Path(run) / "checkpoints").glob("step-*"):
        if folder.name[5:].isdigit() and int(folder.name[5:]) > update:
            shutil.rmtree(folder)


def latest(run: str | Path) -> int:
    """The update of the newest complete checkpoint. Raises RunError when there is none."""
    updates = complete_updates(run)
    if not updates:
        message = f"{run} holds no complete checkpoint: train first, or name another run folder"
        raise RunError(message, command=f"train CONFIG --run.dir={run}")
    return updates[-1]


def stage_folders(run: str | Path, update: int) -> list[Path]:
    """The folders of a complete checkpoint's stages, in order."""
    first = stage_folder(run, update, 0)
    return [stage_folder(run, update, stage) for stage in range(read_state(first)["num_stages"])]


def plan_of(folder: Path) -> StagePlan:
    return StagePlan(**read_state(folder)["plan"])
