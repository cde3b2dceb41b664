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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
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
from lptransformer.run_folder import checkpoint, history
from lptransformer.run_folder.checkpoint import FORMAT, Sums

WEIGHTS, STATE, COPIES, DEEPSPEED = "weights.safetensors", "state.json", "copies.safetensors", "deepspeed"
OTHERS = "others.safetensors"  # of format 1: copies, and the weights of one update before
FP32 = "fp32"
SECOND_NAMES = "second_names"  # in state.json: of a tensor that has two names
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
class Frozen:
    """The weights of a stage that never change: `tensors` until they are written, then the `file` that all checkpoints
    share, and its `record`."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    file: str | None = None
    record: list[int | str] = field(default_factory=list)


@dataclass
class StageContent:
    """What one process writes of a stage: replica 0 all of this, others their `pieces` alone."""

    pieces: Pieces = field(default_factory=Pieces)
    state: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    copies: dict[str, Tensor] = field(default_factory=dict)
    frozen: Frozen = field(default_factory=Frozen)

    @property
    def changing_bytes(self) -> int:
        """Of what has to be copied before the next update."""
        of_files = (self.pieces.flat, self.weights, self.copies)
        return sum(tensor.nbytes for tensors in of_files for tensor in tensors.values())

    @property
    def num_bytes(self) -> int:
        return self.changing_bytes + sum(tensor.nbytes for tensor in self.frozen.tensors.values())


def describe(
    plan: StagePlan, num_stages: int, update: int, position: Mapping[str, int], dtype: str, head: Mapping[str, Any]
) -> dict[str, Any]:
    """What state.json says about where the stage belongs, what auxiliary heads are, and how far into the data (epoch,
    offset) it came."""
    where = {"update": update, "position": dict(position), "num_stages": num_stages, "dtype": dtype, "head": head}
    return {"format": FORMAT, **where, "plan": asdict(plan)}


def write(run: Path, update: int, stage: int, replica: int, content: StageContent, generation: int = 0) -> Sums:
    """Write a process's files of a stage, onto the disk, into a checkpoint that does not count yet.

    Returns the bytes and sums of its files for `checkpoint.finish`. Raises OSError.
    """
    step = checkpoint.unfinished_folder(run, update, generation)
    folder = step / f"stage-{stage}"
    files.make_folders(folder)
    sums: dict[str, list[int | str]] = {}

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
        if content.frozen.tensors:
            _write_frozen(step.parent, f"{stage}.{generation}", content.frozen)
        if content.frozen.file is not None:
            sums[f"../{content.frozen.file}"] = content.frozen.record
        state = {**content.state, "frozen": content.frozen.file}
        files.write_text(folder / STATE, json.dumps(state, indent=1) + "\n")
        sums[f"{folder.name}/{STATE}"] = files.record(folder / STATE)
    files.sync(folder)
    return sums


def _write_frozen(folder: Path, own: str, frozen: Frozen) -> None:
    """The file is named by its content, so that stages and starts of a run that have the same share it. `own` is the
    stage and the start that write it."""
    begun = folder / f".frozen-{own}"
    _save(begun, frozen.tensors)
    frozen.record = files.record(begun)
    frozen.file = f"frozen-{frozen.record[1]}.safetensors"
    begun.replace(folder / frozen.file)
    files.sync(folder)
    frozen.tensors = {}


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors writes files that nobody else may read
    files.sync(path)


# ---------------------------------------------------------------------------------------------- reading


def read_state(folder: Path) -> dict[str, Any]:
    """What state.json says. Raises RunError when it is damaged."""
    checkpoint.check(folder.parent, [f"{folder.name}/{STATE}"])
    state = history.read_object(folder / STATE)
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
    """A stage of a checkpoint, whose tensors are read by name, from whichever file has them. Every file is compared
    with its sum before it is read."""

    def __init__(self, folder: Path) -> None:
        """Raises RunError where the folder is damaged."""
        self.folder = folder
        self.state = read_state(folder)
        self.plan = StagePlan(**self.state["plan"])
        self._opened: dict[Path, Any] = {}
        self._second_names: dict[str, str] = self.state.get(SECOND_NAMES, {})

    @cached_property
    def _whole(self) -> dict[str, Path]:
        """The files of whole tensors."""
        folder, frozen = self.folder, self.state.get("frozen")
        if frozen is not None and not (isinstance(frozen, str) and checkpoint.FROZEN.fullmatch(frozen)):
            raise RunError(f"{folder / STATE} is damaged (frozen is {frozen!r}): choose another checkpoint")
        paths = [folder / WEIGHTS, *([folder.parent.parent / frozen] if frozen else [])]
        if not self.is_older and folder / WEIGHTS not in _own_files(folder):
            paths.pop(0)  # all of it is frozen, or in pieces
        return {name: path for path in paths for name in self._file(path).keys()}  # noqa: SIM118

    @cached_property
    def _pieces(self) -> list[tuple[Path, Pieces]]:
        paths = sorted(path for path in _own_files(self.folder) if path.name.startswith("optimizer-"))
        found = []
        for path in paths:
            with _readable(path):  # of those that hold nothing which is asked for the header alone is read
                found.append((path, _described(safe_open(path, "pt"), path)))
        return found

    @cached_property
    def _kinds(self) -> dict[str, list[str]]:
        found: dict[str, set[str]] = {}
        for _, pieces in self._pieces:
            for key in pieces.flat:
                kind, _, name = key.partition("/")
                found.setdefault(name, set()).add(kind)
        return {name: sorted(kinds) for name, kinds in found.items()}

    @cached_property
    def names(self) -> list[str]:
        """Of all weights and copies."""
        own = f"{FP32}/"
        of_pieces = {key.removeprefix(own) for _, one in self._pieces for key in one.flat if key.startswith(own)}
        return sorted(self._whole.keys() | of_pieces | self._second_names.keys())

    def weight(self, name: str) -> Tensor:
        """A tensor as training computes with it. Raises RunError."""
        name = self._second_names.get(name, name)
        if name in self._whole:
            return self._get(self._whole[name], name)
        dtype: torch.dtype = getattr(torch, DTYPES[self.state["dtype"]].name)
        return self.part(FP32, name).to(dtype)

    def exact(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """A weight, or a flat range of it, as the optimizer has it: in fp32 where it keeps one."""
        name = self._second_names.get(name, name)
        if FP32 in self.kinds(name):
            return self.part(FP32, name, start, numel)
        weight = self.weight(name)
        return weight if numel is None else weight.view(-1)[start : start + numel]

    @property
    def is_older(self) -> bool:
        """Whether it is of format 1, with its optimizer state in DeepSpeed's own files."""
        return bool(self.state.get("format", 0) < FORMAT)

    @property
    def is_of_pipeline_engine(self) -> bool:
        return (self.folder.parent / DEEPSPEED).is_dir()

    def kinds(self, name: str) -> list[str]:
        """The kinds of the optimizer's tensors that there are of a parameter."""
        return self._kinds.get(name, [])

    def step(self, name: str) -> float | None:
        """How many steps the optimizer has made with a parameter, where it counts them."""
        return next((pieces.steps[name] for _, pieces in self._pieces if name in pieces.steps), None)

    def part(self, kind: str, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        """Elements of one of the optimizer's tensors: a flat range, or all of it in the parameter's shape.

        Raises RunError where the files do not have all of them.
        """
        key = f"{kind}/{name}"
        held = [(path, one.start[name], one.flat[key].numel()) for path, one in self._pieces if key in one.flat]
        shape = next(torch.Size(one.shapes[name]) for _, one in self._pieces if name in one.shapes)
        stop = shape.numel() if numel is None else start + numel
        found = []
        for path, begin, length in sorted(held, key=lambda one: one[1]):
            low, high = max(start, begin), min(stop, begin + length)
            if low < high:
                found.append(self._slice(path, key, low - begin, high - begin))
        if sum(map(len, found)) != stop - start:
            raise RunError(f"{self.folder} does not have all of {key}: choose another checkpoint")
        out = torch.cat(found) if len(found) != 1 else found[0]
        return out if numel is not None else out.view(shape)

    def copies(self) -> dict[str, Tensor]:
        """Versions of other stages' weights that are not in use yet."""
        path = self.folder / COPIES
        return {name: self._get(path, name) for name in self._file(path).keys()} if path.exists() else {}  # noqa: SIM118

    def _file(self, path: Path) -> Any:
        if path not in self._opened:
            inside = f"{self.folder.name}/{path.name}" if path.parent == self.folder else f"../{path.name}"
            checkpoint.check(self.folder.parent, [inside])
            with _readable(path):
                self._opened[path] = safe_open(path, "pt")
        return self._opened[path]

    def _get(self, path: Path, name: str) -> Tensor:
        with _readable(path):
            tensor: Tensor = self._file(path).get_tensor(name)
        return tensor

    def _slice(self, path: Path, key: str, start: int, stop: int) -> Tensor:
        with _readable(path):
            tensor: Tensor = self._file(path).get_slice(key)[start:stop]
        return tensor


def check_head(saved: SavedStage, head: Mapping[str, Any]) -> None:
    """Raises RunError where a stage was saved with an auxiliary head of another kind than the run has by now."""
    if saved.plan.has_head and not saved.plan.is_last and saved.state.get("head", head) != head:
        before = ", ".join(f"{key}={value}" for key, value in saved.state["head"].items() if head.get(key) != value)
        raise RunError(f"{saved.folder} has a head of another kind than the run has now: it was saved with {before}")


@dataclass(frozen=True)
class SavedFor:
    """A checkpoint as a stage sees it that may have other blocks than those that were saved: `parts` are the saved
    stages that have some of its own."""

    plan: StagePlan
    parts: Sequence[SavedStage]

    def of(self, name: str) -> SavedStage | None:
        """What has the tensor of a name in the stage; None for that of a head which is new there.

        Raises RunError where a part of the model is missing.
        """
        of_head, head = name.startswith("head."), self.head
        if of_head and head is None and not self.plan.is_last:
            return None
        for part in self.parts if not of_head else [head] if head is not None else []:
            if name in part.names:
                return part
        raise RunError(f"{self.parts[0].folder.parent} has no {name} of the blocks {self._blocks}: choose another")

    def fill(self, tensors: Mapping[str, Tensor], saved_name: Callable[[str], str]) -> None:
        """Give tensors of the stage, by their names there, what is saved of them."""
        for name, tensor in tensors.items():
            if (part := self.of(saved_name(name))) is not None:
                tensor.data.copy_(part.exact(saved_name(name)))

    @property
    def head(self) -> SavedStage | None:
        """What has its head, if it had one."""
        plan, there = self.plan, (part for part in self.parts if part.plan.has_head)
        return next((p for p in there if (p.plan.last_block, p.plan.is_last) == (plan.last_block, plan.is_last)), None)

    @property
    def older(self) -> SavedStage | None:
        """The stage of format 1 that it is."""
        if not self.parts[0].is_older:
            return None
        (first, *more) = self.parts
        if more or (first.plan.first_block, first.plan.last_block) != (self.plan.first_block, self.plan.last_block):
            raise RunError(
                f"{first.folder.parent} is of an older format, which only the stages that wrote it can resume: the "
                f"blocks {self._blocks} are no stage there"
            )
        return first

    @property
    def _blocks(self) -> str:
        return f"{self.plan.first_block}-{self.plan.last_block}"


class SavedStep:
    """A complete checkpoint of a run."""

    def __init__(self, run: Path, update: int) -> None:
        """Raises RunError where it is not there, or damaged, as far as its states show."""
        self.update = update
        self.folder = checkpoint.folder_of(run, update)
        self.stages = [SavedStage(folder) for folder in folders(run, update)]

    def seen_by(self, plan: StagePlan) -> SavedFor:
        """Its tensors for a stage of these blocks."""
        first, last = plan.first_block, plan.last_block
        return SavedFor(
            plan, [one for one in self.stages if one.plan.first_block <= last and one.plan.last_block >= first]
        )

    def weight(self, block: int, name: str) -> Tensor:
        """A tensor of the stage that had a block."""
        stage = next(one for one in self.stages if one.plan.first_block <= block <= one.plan.last_block)
        return stage.weight(name)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
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


def _own_files(folder: Path) -> list[Path]:
    """The files of a stage that the marker of its checkpoint names, so that one that is missing is found."""
    return [
        folder / path.name for path in map(Path, checkpoint.read_sums(folder.parent)) if path.parent.name == folder.name
    ]


def read_others(folder: Path) -> dict[str, Tensor]:
    """Of format 1: the tensors of a stage that are no weights. Raises RunError when the file is damaged."""
    try:
        return load_file(folder / OTHERS) if (folder / OTHERS).exists() else {}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{folder / OTHERS} cannot be read ({error}): choose another checkpoint") from None
