"""The files of one stage in a checkpoint, and its tensors by name.

    state.json              where the stage belongs, counters, place in the data
    weights.safetensors     the tensors that it computes with, but for those that are frozen or in pieces
    optimizer-<replica>...  what a replica owns: of every parameter a range, flat, for each kind of the optimizer's
                            tensors ("exp_avg/<name>"), and of the fp32 weight ("fp32/<name>") where weights.safetensors
                            does not have it. Its metadata say where each range begins, and after how many steps
    copies.safetensors      versions of other stages' weights that are not in use yet, if any
    deepspeed/              of format 1 and of DeepSpeed's own pipeline: its own files, which are pickles

Ranges need not be those of the processes that read, so another ZeRO stage, or another number of replicas, finds its
own. Only tensors and JSON are read: nothing here can execute code.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lptransformer import files
from lptransformer.errors import RunError
from lptransformer.methods.dtypes import DTYPES
from lptransformer.methods.stages import StagePlan
from lptransformer.run_folder import checkpoint
from lptransformer.run_folder.checkpoint import FORMAT

WEIGHTS, STATE, COPIES, DEEPSPEED = "weights.safetensors", "state.json", "copies.safetensors", "deepspeed"
OTHERS = "others.safetensors"  # of format 1: copies, and the weights of one update before
FP32 = "fp32"
Shape = tuple[int, ...]


@dataclass
class Pieces:
    """What one process owns of a stage's parameters. `flat` has by "kind/name" the elements from `start[name]` on of
    the flattened tensor, `steps` the optimizer's steps of the parameters that have made one, `shapes` are whole."""

    flat: dict[str, Tensor] = field(default_factory=dict)
    start: dict[str, int] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)


@dataclass
class StageContent:
    """What one process writes of a stage: replica 0 all of this, others their `pieces` alone."""

    pieces: Pieces = field(default_factory=Pieces)
    state: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    frozen: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        of_files = (self.pieces.flat, self.weights, self.frozen, self.copies)
        return sum(tensor.nbytes for tensors in of_files for tensor in tensors.values())


def describe(plan: StagePlan, num_stages: int, update: int, position: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """What state.json says about where the stage belongs, and how far into the data (epoch, offset) it came."""
    where = {"update": update, "position": dict(position), "num_stages": num_stages, "dtype": dtype}
    return {"format": FORMAT, **where, "plan": asdict(plan)}


def write(run: Path, update: int, stage: int, replica: int, content: StageContent) -> dict[str, tuple[int, str]]:
    """Write a process's files of a stage, onto the disk, into a checkpoint that does not count yet.

    Returns the bytes and sums of its files for `checkpoint.finish`. Raises OSError.
    """
    step = checkpoint.unfinished_folder(run, update)
    folder = step / f"stage-{stage}"
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}

    def put(name: str, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        if tensors:
            _save(folder / name, tensors, metadata)
            sums[f"{folder.name}/{name}"] = files.record(folder / name)

    pieces = content.pieces
    told = {"start": pieces.start, "steps": pieces.steps, "shapes": pieces.shapes}
    put(f"optimizer-{replica}.safetensors", pieces.flat, {name: json.dumps(value) for name, value in told.items()})
    if replica == 0:
        put(WEIGHTS, content.weights)
        put(COPIES, content.copies)
        frozen = _write_frozen(step.parent, stage, content.frozen) if content.frozen else None
        if frozen is not None:
            sums[f"../{frozen.name}"] = files.record(frozen)
        state = {**content.state, "frozen": frozen and frozen.name}
        files.write_text(folder / STATE, json.dumps(state, indent=1) + "\n")
        sums[f"{folder.name}/{STATE}"] = files.record(folder / STATE)
    files.sync(folder)
    return sums


def _write_frozen(folder: Path, stage: int, tensors: Mapping[str, Tensor]) -> Path:
    """Weights that never change are named by their content, so that all checkpoints share them."""
    begun = folder / f".frozen-{stage}"
    _save(begun, tensors)
    final = folder / f"frozen-{files.sum_of(begun)}.safetensors"
    begun.replace(final)
    files.sync(folder)
    return final


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
    files.sync(path)


# ---------------------------------------------------------------------------------------------- reading


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises RunError when it is damaged."""
    _check(folder, STATE)
    state = checkpoint.read_json(folder / STATE)
    try:
        StagePlan(**state["plan"]), int(state["num_stages"])
        written = int(state.get("format", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{folder / STATE} cannot be read ({error!r}): choose another checkpoint") from None
    if written > FORMAT:
        raise RunError(
            f"{folder / STATE} has format {written}, and this version reads {FORMAT} and older ones: use a newer one"
        )
    return state


def plan_of(folder: Path) -> StagePlan:
    return StagePlan(**read_state(folder)["plan"])


def folders(run: str | Path, update: int) -> list[Path]:
    """The folders of a complete checkpoint's stages, in order."""
    first = checkpoint.stage_folder(run, update, 0)
    return [checkpoint.stage_folder(run, update, stage) for stage in range(read_state(first)["num_stages"])]


def read_weights(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """The tensors of a stage with a wanted name, as training computes with them, on the CPU.

    Raises RunError where a file is damaged.
    """
    saved = SavedStage(folder)
    return {name: saved.weight(name) for name in saved.names if wanted(name)}


class SavedStage:
    """A stage of a checkpoint, whose tensors are read by name, from whichever file has them."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where the folder is damaged."""
        self.folder = folder
        self.state = read_state(folder)
        self.plan = StagePlan(**self.state["plan"])
        self._whole: dict[str, Path] = {}
        self._pieces: list[tuple[Path, Pieces]] = []
        frozen = self.state.get("frozen")
        for path in (folder / WEIGHTS, folder.parent.parent / str(frozen)):
            if path.exists() or path.name == frozen:
                with self._open(path) as file:
                    self._whole |= dict.fromkeys(file.keys(), path)
        for name in self._own_files("optimizer-*.safetensors"):
            with self._open(folder / name) as file:
                self._pieces.append((folder / name, _described(file, folder / name)))

    def _own_files(self, pattern: str) -> list[str]:
        """Those that the marker names: one that is missing is found."""
        own = Path(self.folder.name)
        named = [Path(path) for path in checkpoint.read_sums(self.folder.parent)]
        return sorted(path.name for path in named if path.parent == own and path.match(pattern))

    @property
    def names(self) -> list[str]:
        """Of all weights and copies."""
        of_pieces = {name for _, pieces in self._pieces for key in pieces.flat for name in [_name_of(key, FP32)] if name}
        return sorted(self._whole.keys() | of_pieces)

    def weight(self, name: str) -> Tensor:
        """A tensor as training computes with it. Raises RunError."""
        if name in self._whole:
            with self._open(self._whole[name]) as file:
                return file.get_tensor(name)
        dtype: torch.dtype = getattr(torch, DTYPES[self.state["dtype"]].name)
        return self.part(FP32, name).to(dtype)

    def exact(self, name: str) -> Tensor:
        """A tensor as the optimizer has it: in fp32 where it keeps one."""
        return self.part(FP32, name) if FP32 in self.kinds(name) else self.weight(name)

    def shape(self, name: str) -> Shape:
        if name in self._whole:
            with self._open(self._whole[name]) as file:
                return tuple(file.get_slice(name).get_shape())
        return next(tuple(pieces.shapes[name]) for _, pieces in self._pieces if name in pieces.shapes)

    def kinds(self, name: str) -> list[str]:
        """The kinds of the optimizer's tensors that there are of a parameter."""
        found = {key.partition("/")[0] for _, pieces in self._pieces for key in pieces.flat if key.endswith(f"/{name}")}
        return sorted(kind for kind in found if any(f"{kind}/{name}" in pieces.flat for _, pieces in self._pieces))

    def step(self, name: str) -> float | None:
        """How many steps the optimizer has made with a parameter, where it counts them."""
        return next((pieces.steps[name] for _, pieces in self._pieces if name in pieces.steps), None)

    def part(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements of one of the optimizer's tensors: a flat range, or all in the parameter's shape.

        Raises RunError where the files do not have all of it.
        """
        key, shape = f"{kind}/{name}", self.shape(name)
        size = torch.Size(shape).numel()
        stop = size if numel is None else start + numel
        found, out = 0, None
        for path, pieces in self._pieces:
            if key not in pieces.flat:
                continue
            begin, length = pieces.start[name], pieces.flat[key].numel()
            low, high = max(start, begin), min(stop, begin + length)
            if low >= high:
                continue
            with self._open(path) as file:
                some = file.get_slice(key)[low - begin : high - begin]
            if out is None:
                out = torch.empty(stop - start, dtype=some.dtype)
            out[low - start : high - start] = some
            found += high - low
        if out is None or found != stop - start:
            raise RunError(f"{self.folder}: of {key} {found} of {stop - start} elements are there: choose another")
        return out if numel is not None else out.view(shape)

    def copies(self) -> dict[str, Tensor]:
        """Versions of other stages' weights that are not in use yet."""
        path = self.folder / COPIES
        if not path.exists():
            return {}
        with self._open(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    @contextlib.contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        if path.parent == self.folder:
            _check(self.folder, path.name)
        else:
            checkpoint.check(self.folder.parent, [f"../{path.name}"])
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise RunError(f"{path} cannot be read ({error}): choose another checkpoint") from None


def _described(file: Any, path: Path) -> Pieces:
    """What a file of pieces holds; its tensors are empty ones of the right size."""
    try:
        told = {name: json.loads(value) for name, value in file.metadata().items()}
        flat = {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}  # noqa: SIM118
        return Pieces(flat, told["start"], told["steps"], told["shapes"])
    except (ValueError, KeyError, AttributeError) as error:
        raise RunError(f"{path} cannot be read ({error!r}): choose another checkpoint") from None


def _name_of(key: str, kind: str) -> str | None:
    return key.removeprefix(f"{kind}/") if key.startswith(f"{kind}/") else None


def _check(folder: Path, name: str) -> None:
    checkpoint.check(folder.parent, [f"{folder.name}/{name}"])


def check(folder: Path) -> None:
    """Compare all files of a stage with their sums. Raises RunError."""
    own = f"{folder.name}/"
    frozen = read_state(folder).get("frozen")
    sums = checkpoint.read_sums(folder.parent)
    checkpoint.check(folder.parent, [path for path in sums if path.startswith(own) or path == f"../{frozen}"])


def read_others(folder: Path) -> dict[str, Tensor]:
    """Of format 1: the tensors of a stage that are no weights. Raises RunError when the file is damaged."""
    try:
        return load_file(folder / OTHERS) if (folder / OTHERS).exists() else {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / OTHERS} cannot be read ({error}): choose another checkpoint") from None
