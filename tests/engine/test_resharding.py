"""A run goes on with another layout: the optimizer's state, by name, has the saved bits at every stop, whichever
processes hold it.

What is compared is collected from the live engines, not read from files: of every parameter what each process owns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from distributed import Pool
from engine_jobs import VOCAB_SIZE, load_config, open_engine
from overlays import overlay, with_overlay
from test_frozen import tied_folder
from tiers import full, slow
from torch import Tensor

from lptransformer.engine.optimizer_state import BEFORE
from lptransformer.models.blueprint import make_blueprint
from lptransformer.planning.disk import checkpoint_bytes
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.saved_stage import FP32

State = dict[str, Tensor]
Seen = tuple[State, State, dict[str, float]]
AT = "deepspeed.zero_optimization.stage={}".format
OFFLOADED = "deepspeed.zero_optimization.offload_optimizer={device: cpu}"


@dataclass
class Held:
    """What one process holds: ranges of flattened tensors by "kind/name", whole ones, counts of steps, and losses."""

    ranges: list[tuple[str, int, int, Tensor]]
    whole: State
    steps: dict[str, float]
    losses: list[float]


def travel(overrides: Sequence[str], updates: int, load: Path | None, save: Path | None) -> Held:
    """Load, say what is there, train, save."""
    engine = open_engine(overrides, resumed=load)
    if load is not None:
        engine.load_checkpoint(load)
    held = Held([], {}, {}, [])

    def look() -> None:
        held.ranges, held.whole, held.steps = [], {}, {}
        for stage in engine.local.values():

            def named(name: str, last: int = stage.plan.last_block) -> str:
                return f"{last}:{name}" if name.startswith("head.") else name

            content = stage.content({}, {})
            for key, tensor in content.pieces.flat.items():
                kind, _, name = key.partition("/")
                size = torch.Size(content.pieces.shapes[name]).numel()
                place = content.pieces.start[name]
                held.ranges.append((f"{kind}/{named(name)}", place, size, tensor.clone().float()))
            held.whole |= {named(name): one.clone().float() for name, one in content.weights.items()}
            held.whole |= {named(name): one.clone().float() for name, one in stage.frozen().tensors.items()}
            held.steps |= {named(name): count for name, count in content.pieces.steps.items()}

    if load is not None:
        look()
    for _ in range(updates):
        result = engine.train_batch()
        held.losses += [r.loss_sum for r in result.reports if getattr(r, "loss_sum", None) is not None]
    if save is not None:
        engine.save_checkpoint(save)
        look()
    engine.close()
    return held


def joined(all_held: Sequence[Held]) -> Seen:
    """The optimizer's tensors whole, the weights as exactly as they are anywhere, and the steps."""
    tensors: State = {}
    seen: dict[str, Tensor] = {}
    for held in all_held:
        for key, place, size, part in held.ranges:
            whole = tensors.setdefault(key, torch.zeros(size))
            mask = seen.setdefault(key, torch.zeros(size, dtype=torch.bool))
            whole[place : place + len(part)] = part
            mask[place : place + len(part)] = True
    assert all(mask.all() for mask in seen.values()), "nobody holds a part of a tensor"
    weights = {name: one.flatten() for held in all_held for name, one in held.whole.items()}
    weights |= {key.removeprefix(f"{FP32}/"): one for key, one in tensors.items() if key.startswith(f"{FP32}/")}
    moments = {key: one for key, one in tensors.items() if not key.startswith(f"{FP32}/")}
    steps = {name: count for held in all_held for name, count in held.steps.items()}
    return moments, weights, steps


def processes(overrides: Sequence[str]) -> int:
    sizes = dict(one.split("=") for one in overrides)
    return int(sizes.get("parallel.pipeline", 1)) * int(sizes.get("parallel.data", 1))


def same(one: State, other: State) -> None:
    assert one.keys() == other.keys(), sorted(one.keys() ^ other.keys())
    assert all(torch.equal(one[name], other[name]) for name in one), [
        n for n in one if not torch.equal(one[n], other[n])
    ]


def layout(pipeline: int, data: int, zero: int, dtype: str = "fp32") -> tuple[str, ...]:
    return f"parallel.pipeline={pipeline}", f"parallel.data={data}", AT(zero), f"train.dtype={dtype}"


TOURS = {
    "pipeline": [layout(4, 1, 0), layout(2, 1, 0), layout(1, 1, 0), layout(4, 1, 0)],
    "ZeRO": [layout(1, 2, 1), layout(2, 1, 3), layout(1, 2, 0), layout(1, 2, 3), layout(1, 1, 2), layout(1, 2, 1)],
    "bf16": [layout(1, 2, 2, "bf16"), layout(2, 2, 3, "bf16"), layout(1, 1, 0), layout(1, 2, 1, "bf16")],
    "below ZeRO 3": [
        *(layout(2, 1, 0), layout(1, 2, 1), layout(1, 2, 2, "bf16")),
        *(layout(2, 1, 1, "bf16"), layout(1, 1, 0)),
    ],
    "offloaded": [
        (*layout(1, 2, 2), OFFLOADED),
        layout(2, 1, 0),
        (*layout(1, 2, 3, "bf16"), OFFLOADED),
        (*layout(2, 1, 1), OFFLOADED),
    ],
    "every ordered pair": [
        layout(1, 1 + n % 2, int(zero)) for n, zero in enumerate("0102031213230")
    ],  # ordered, of ZeRO stages
}
PRETRAINED_LLAMA = ("model.hidden_size=null", "model.num_layers=null", "model.num_heads=null")
OPTIONS: dict[str, tuple[str, ...]] = {
    "chunked": ("objective.chunks=4",),
    "a shared head": ("objective.chunks=4", "head.kind=shared"),
    "frozen": ("objective.chunks=4", "train.freeze=['*.mlp.*']"),
    "backprop": ("objective.chunks=1",),
    "delayed": ("objective.name=delayed", "objective.chunks=2"),
    "LoRA": (*PRETRAINED_LLAMA, "objective.chunks=2", "lora.rank=4", "head.kind=fitted", "head.blocks=1"),
    "fitted": (*PRETRAINED_LLAMA, "objective.chunks=4", "head.kind=fitted", "head.blocks=1"),
    "tied": (*PRETRAINED_LLAMA, "objective.name=backprop", "model.tie=keep"),
    "SGD": ("objective.chunks=4", "optimizer.name=sgd"),
    "Muon": ("objective.chunks=4", "optimizer.name=muon"),
}


SLOW = {
    ("chunked", "offloaded"),
    ("chunked", "pipeline"),
    ("a shared head", "bf16"),
    ("LoRA", "ZeRO"),
    ("LoRA", "pipeline"),
}


def cases() -> list[object]:
    crossing = (
        "backprop",
        "delayed",
        "tied",
        "Muon",
    )  # gradients cross borders, which ZeRO 3 does not do; or there is one rank
    every = [(options, tour) for options in OPTIONS for tour in TOURS if options not in crossing]
    every.remove(("SGD", "offloaded"))  # which is refused
    every = [one for one in every if one[1] != "below ZeRO 3"]
    every += [("backprop", "pipeline"), ("delayed", "below ZeRO 3"), ("tied", "every ordered pair")]
    found = [one if one == ("chunked", "ZeRO") else slow(*one) if one in SLOW else full(*one) for one in every]
    return [*found, slow("Muon", "below ZeRO 3")]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "model"
    tied_folder("llama", folder)
    return folder


@pytest.fixture(scope="module")
def peft(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(overlay("peft", tmp_path_factory.mktemp("peft")))


@pytest.mark.parametrize(("options", "tour"), cases())
def test_the_state_has_the_saved_bits_at_every_stop(
    pool: Pool, request: pytest.FixtureRequest, tmp_path: Path, options: str, tour: str
) -> None:
    keys, found_in = OPTIONS[options], request.getfixturevalue("peft") if options == "LoRA" else str(tmp_path)
    if PRETRAINED_LLAMA[0] in keys:
        keys += (f"model.pretrained={request.getfixturevalue('llama')}",)

    def at(stop: tuple[str, ...], updates: int, load: Path | None, save: Path | None) -> Seen:
        return joined(pool.run(processes(stop), with_overlay, found_in, travel, (*keys, *stop), updates, load, save))

    before: Seen | None = None
    for number, stop in enumerate(TOURS[tour]):
        load = tmp_path / f"run-{number - 1}" if number else None
        if before is not None:
            found = at(stop, 0, load, None)
            dtype = torch.bfloat16 if "train.dtype=bf16" in stop else torch.float32
            # Of weights of one update before there are no masters: they are in the dtype of the passes.
            at_dtype = {name: one.to(dtype).float() for name, one in before[0].items() if name.startswith(BEFORE)}
            same(found[0], before[0] | at_dtype)
            assert load is not None
            newer = on_their_way(load)
            for name, one in found[1].items():  # a copy with a shorter lag than before goes on with a newer version
                wanted = [before[1][name], *newer.get(name, [])]
                wanted += [tensor.to(dtype).float() for tensor in wanted]  # in bf16 what has no fp32 weight beside it
                assert any(torch.equal(one, tensor.float()) for tensor in wanted), name
            assert found[2] == before[2]
        before = at(stop, 2, load, save := tmp_path / f"run-{number}")
        config = load_config((*keys, *stop))
        predicted = checkpoint_bytes(config, make_blueprint(config, VOCAB_SIZE, None))
        each, once = content_bytes(save)
        assert each == predicted.each and once <= predicted.once, "heads with the same frozen weights share a file"
        assert once == predicted.once or PRETRAINED_LLAMA[0] in keys


def on_their_way(run: Path) -> dict[str, list[Tensor]]:
    """The versions of copies that a checkpoint holds and its heads did not use yet, by name."""
    found: dict[str, list[Tensor]] = {}
    for folder in saved_stage.folders(run, checkpoint.latest(run)):
        saved = saved_stage.SavedStage(folder)
        for key, tensor in saved.copies().items():
            found.setdefault(f"{saved.plan.last_block}:{key.partition('/')[2]}", []).append(tensor.flatten())
    return found


def content_bytes(run: Path) -> tuple[int, int]:
    """Of all tensors of a checkpoint but copies on their way, and of the frozen ones beside it."""

    def payload(paths: Iterable[Path]) -> int:
        return sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in paths)

    newest = checkpoint.folder_of(run, checkpoint.latest(run))
    own = (path for path in newest.rglob("*.safetensors") if path.name != saved_stage.COPIES)
    return payload(own), payload(newest.parent.glob("*.safetensors"))


@pytest.mark.parametrize("zero", [0, slow(1), slow(3)])
def test_new_heads_join_and_old_ones_leave(pool: Pool, tmp_path: Path, zero: int) -> None:
    """From two chunks to four, to backprop, and back: what was there keeps its state, what is new begins."""
    tour = ["objective.chunks=2", "objective.chunks=4", "objective.chunks=1", "objective.chunks=2"]
    before: Seen | None = None
    for number, chunks in enumerate(tour):
        overrides = (chunks, *layout(1, 2 if zero else 1, zero))
        if before is not None:
            load = tmp_path / f"run-{number - 1}"
            moments, weights, steps = joined(pool.run(processes(overrides), travel, overrides, 0, load, None))
            shared = moments.keys() & before[0].keys()
            assert shared and all(torch.equal(moments[key], before[0][key]) for key in shared)
            assert all(torch.equal(weights[name], before[1][name]) for name in weights.keys() & before[1].keys())
            new = {key for key in moments.keys() - before[0].keys()}
            assert all(key.partition("/")[2].partition(":")[0] in "1357" and "head." in key for key in new)
            assert steps.items() <= before[2].items()
        else:
            load = None
        before = joined(pool.run(processes(overrides), travel, overrides, 2, load, tmp_path / f"run-{number}"))


@pytest.mark.parametrize(
    ("stops", "tolerance"),
    [
        ((layout(4, 1, 0), layout(1, 1, 0), layout(2, 1, 0)), 0.0),  # whole spans move
        slow((layout(1, 1, 0), layout(2, 2, 2), layout(1, 2, 3)), 1e-5),  # sums in another order
    ],
)
def test_the_run_goes_on_as_if_nothing_had_happened(
    pool: Pool, tmp_path: Path, stops: tuple[tuple[str, ...], ...], tolerance: float
) -> None:
    options = ("objective.chunks=4",)
    whole = joined(pool.run(processes(stops[0]), travel, (*options, *stops[0]), 6, None, tmp_path / "whole"))
    found = whole
    for number, stop in enumerate(stops):
        load = tmp_path / f"run-{number - 1}" if number else None
        found = joined(pool.run(processes(stop), travel, (*options, *stop), 2, load, tmp_path / f"run-{number}"))
    assert found[2] == whole[2]
    for name, weight in found[1].items():
        torch.testing.assert_close(weight, whole[1][name], rtol=tolerance, atol=tolerance, msg=name)
