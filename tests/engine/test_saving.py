"""Saves on their way: in the background, one at a time, and what happens where one fails."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import Pool
from engine_jobs import open_engine
from torch import Tensor

from lptransformer.engine import engine as engines
from lptransformer.engine import saving
from lptransformer.engine.p2p import Control
from lptransformer.errors import DataError, TrainingError
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics import EvaluationReport

CHUNKED = ("objective.chunks=2",)


@contextlib.contextmanager
def written_by(write: Callable[..., Any]) -> Iterator[None]:
    """In here this takes the place of saved_stage.write."""
    real = saved_stage.write
    saved_stage.write = write
    try:
        yield
    finally:
        saved_stage.write = real


def saved_while_training(run: Path) -> tuple[list[bool], bool]:
    """The writer waits until two more updates are made: was it a save of the update at which it was asked for?"""
    engine, gate, seen = open_engine(CHUNKED), threading.Event(), list[bool]()
    write = saved_stage.write

    def late(*args: Any) -> Any:
        gate.wait(60)
        return write(*args)

    with written_by(late):
        engine.train_batch()
        held: list[dict[str, Tensor]] = [stage.weights() for stage in engine.local.values()]
        engine.save_checkpoint(run)
        engine.train_batch()
        engine.train_batch()
        seen.append(checkpoint.complete_updates(run) == [])
        gate.set()
        engine.settle()
        seen.append(checkpoint.complete_updates(run) == [1])
        engine.close()
    found = [saved_stage.read_weights(folder) for folder in saved_stage.folders(run, 1)]
    return seen, all(torch.equal(one[name], own[name]) for one, own in zip(found, held, strict=True) for name in own)


def test_what_is_saved_is_what_it_was_though_training_goes_on(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(1, saved_while_training, tmp_path) == [([True, True], True)]


def failing(run: Path, failures: int, options: tuple[str, ...]) -> tuple[list[str], list[int]]:
    """Three saves, of which the first so many fail on process 1."""
    engine, said, write = open_engine((*CHUNKED, "parallel.pipeline=2", *options)), list[str](), saved_stage.write
    engine.on_problem = said.append
    done = 0

    def full(*args: Any) -> Any:
        nonlocal done
        done += 1
        if done <= failures and engine.world.global_rank == 1:
            write(*args)  # half of it is there
            raise OSError(28, "No space left on device")
        return write(*args)

    with written_by(full):
        for _ in range(3):
            engine.train_batch()
            engine.save_checkpoint(run)
            engine.settle()
        engine.close()
    return said, checkpoint.complete_updates(run)


def test_a_save_that_fails_is_said_once_and_the_run_goes_on(pool: Pool, tmp_path: Path) -> None:
    (said, found), (other, _) = pool.run(2, failing, tmp_path, 1, ())
    assert found == [2, 3] and len(said) == 1 and other == []
    assert "the checkpoint after 1 updates was not saved" in said[0] and "No space left" in said[0]
    assert not list((tmp_path / "checkpoints").glob(".step-*"))


def test_a_save_that_fails_ends_the_run_where_that_is_asked_for(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="the checkpoint after 1 updates was not saved"):
        pool.run(2, failing, tmp_path, 1, ("checkpoint.on_error=stop",))


def failing_at_first(run: Path, what: str) -> tuple[list[str], list[int]]:
    """One update, saved, and saved again when all know what became of that; `what` fails on process 1 at first."""
    engine, said = open_engine((*CHUNKED, "parallel.pipeline=2")), list[str]()
    engine.on_problem = said.append
    module: Any = {"write": saved_stage, "make_folders": saving.files}[what]
    real, failures = getattr(module, what), [OSError(28, "No space left on device")] * engine.world.global_rank

    def at_first(*args: Any) -> Any:
        if failures:
            raise failures.pop()
        return real(*args)

    setattr(module, what, at_first)
    try:
        engine.train_batch()
        for _ in range(3):  # the last one has nothing to do
            engine.save_checkpoint(run)
            engine.settle()
    finally:
        setattr(module, what, real)
    engine.close()
    return said, checkpoint.complete_updates(run)


@pytest.mark.parametrize("what", ["write", "make_folders"])
def test_what_was_not_saved_can_be_saved_again_at_the_same_update(pool: Pool, tmp_path: Path, what: str) -> None:
    (said, found), _ = pool.run(2, failing_at_first, tmp_path / "run", what)
    assert found == [1] and len(said) == 1 and "the checkpoint after 1 updates was not saved" in said[0]


def saved_while_evaluating(run: Path, control: Control) -> tuple[bool, int, list[int]]:
    """The save is done when the evaluation reports, to somebody who takes all that came before a checkpoint."""
    engine, gate, taken = open_engine(CHUNKED), threading.Event(), list[Any]()
    engine.before_commit = lambda reports: taken.extend(reports) or []
    write, to_host = saved_stage.write, engines.to_host

    def late(*args: Any) -> Any:
        gate.wait(60)
        return write(*args)

    def after_the_save(tensors: Any) -> Any:
        gate.set()
        assert engine._saving is not None
        engine._saving.wait()
        return to_host(tensors)

    engine.train_batch()
    engines.to_host = after_the_save
    try:
        with written_by(late):
            engine.save_checkpoint(run)
            engine.request(control, urgent=bool(control))
            left = engine.eval_batch("valid")
            gate.set()
    finally:
        engines.to_host = to_host
    cut_short = engine.cut_short
    engine.close()
    of_evaluation = [one for one in (*left, *taken) if isinstance(one, EvaluationReport)]
    return cut_short, len(of_evaluation), checkpoint.complete_updates(run)


@pytest.mark.parametrize(("control", "found"), [(Control.NOTHING, (False, 2, [1])), (Control.STOP, (True, 0, [1]))])
def test_a_checkpoint_that_counts_as_an_evaluation_ends_does_not_cut_it_short(
    pool: Pool, tmp_path: Path, control: Control, found: tuple[bool, int, list[int]]
) -> None:
    assert pool.run(1, saved_while_evaluating, tmp_path, control) == [found]


def copied_for_saves(run: Path) -> list[int]:
    """Bytes of buffers after every save, of a run whose heads hold versions that are others each time."""
    engine, found = open_engine(("objective.chunks=2", "head.kind=shared", "head.refresh_every=1")), list[int]()
    for _ in range(5):
        engine.train_batch()
        engine.save_checkpoint(run)
        engine.settle()
        found.append(engine._host_copies.num_bytes)
    engine.close()
    return found


def test_a_save_takes_the_buffers_of_the_save_before_it(pool: Pool, tmp_path: Path) -> None:
    (found,) = pool.run(1, copied_for_saves, tmp_path)
    assert len(set(found[2:])) == 1, found  # by then as many versions are on their way as ever


def loading(run: Path, overrides: tuple[str, ...], others: tuple[str, ...]) -> str:
    """What is wrong with a load one update later, or with other keys."""
    engine = open_engine(overrides)
    engine.request(Control.SAVE)
    engine.train_batch()
    engine.save_checkpoint(run)
    engine.train_batch()
    engine.settle()
    if others:
        engine.close()
        engine = open_engine((*overrides, *others))
    try:
        engine.load_checkpoint(run)
    except (DataError, TrainingError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def test_a_checkpoint_of_other_updates_or_within_one_is_refused(pool: Pool, tmp_path: Path) -> None:
    delayed = ("objective.name=delayed", "objective.chunks=2", "parallel.pipeline=2")
    said, _ = pool.run(2, loading, tmp_path / "delayed", delayed, ())
    assert said.startswith("TrainingError: the next update has begun"), said
    (said,) = pool.run(1, loading, tmp_path / "other", CHUNKED, ("train.micro_batches_per_update=8",))
    assert "DataError" in said and "has taken 4 micro-batches, but train.micro_batches_per_update = 8" in said, said


def slow_to_write(run: Path) -> list[float | None]:
    """Two saves, one right after the other, that take a second each to write."""
    engine, write = open_engine(CHUNKED), saved_stage.write

    def late(*args: Any) -> Any:
        time.sleep(1.0)
        return write(*args)

    with written_by(late):
        for _ in range(2):
            engine.train_batch()
            engine.save_checkpoint(run)
        engine.close()
    return [checkpoint.lost_seconds(run, update) for update in (1, 2)]


def test_a_checkpoint_says_what_it_kept_training_for(pool: Pool, tmp_path: Path) -> None:
    """The second waits for the first."""
    ((first, second),) = pool.run(1, slow_to_write, tmp_path)
    assert first is not None and second is not None and first < 0.5 < second


def without_room(run: Path) -> tuple[list[str], list[int], bool]:
    """Neither for copies in memory, nor then on the disk."""
    engine, said = open_engine(CHUNKED), list[str]()
    engine.on_problem = said.append
    memory, usage = engines.host_memory, saving.shutil.disk_usage
    engines.host_memory = lambda: 0
    try:
        for _ in range(2):
            engine.train_batch()
            engine.save_checkpoint(run)
            assert engine._saving is not None and engine._saving.is_done, "training waited"
        saving.shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
        engine.train_batch()
        engine.save_checkpoint(run)
        engine.close()
    finally:
        engines.host_memory, saving.shutil.disk_usage = memory, usage
    return said, checkpoint.complete_updates(run), engine._host_copies.num_bytes == 0


def test_without_room_for_copies_training_waits_and_without_room_on_the_disk_nothing_is_begun(
    pool: Pool, tmp_path: Path
) -> None:
    ((said, found, nothing_kept),) = pool.run(1, without_room, tmp_path)
    assert found == [1, 2] and nothing_kept and len(said) == 2
    assert "do not fit: training waits for it" in said[0]
    assert "0 MB are free on the disk" in said[1] and "the checkpoint after 3 updates was not saved" in said[1]


def saved_twice(run: Path, other: Path) -> tuple[list[int], list[int], bool]:
    """Two saves of one update; then the weights of another run, saved where frozen ones of this run are."""
    frozen = (*CHUNKED, "train.freeze=['*.mlp.*']")
    first = open_engine((*frozen, "train.seed=1"))
    first.train_batch()
    first.save_checkpoint(other)
    first.close()
    engine = open_engine(frozen)
    engine.train_batch()
    engine.save_checkpoint(run)
    engine.save_checkpoint(run)
    engine.settle()
    twice = checkpoint.complete_updates(run)
    engine.load_checkpoint(other)
    engine.train_batch()
    held = [stage.weights() for stage in engine.local.values()]
    engine.save_checkpoint(run)
    engine.close()
    found = [saved_stage.read_weights(folder) for folder in saved_stage.folders(run, 2)]
    same = all(torch.equal(one[name], own[name]) for one, own in zip(found, held, strict=True) for name in own)
    return twice, checkpoint.complete_updates(run), same


def test_twice_is_once_and_frozen_weights_are_those_that_were_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(1, saved_twice, tmp_path / "run", tmp_path / "other") == [([1], [1, 2], True)]


def averages(run: Path, chunks: int, save: bool) -> dict[str, Tensor]:
    """Of a head that follows the blocks above it, as it begins: its copies, averages, and what they follow."""
    keys = ("head.kind=shared", "head.blocks=1", "head.ema_decay=0.9") if chunks > 1 else ()
    engine = open_engine((f"objective.chunks={chunks}", *keys), resumed=None if save else run)
    if save:
        for _ in range(3):
            engine.train_batch()
        engine.save_checkpoint(run)
    else:
        engine.load_checkpoint(run)
    found = {name: one.clone() for stage in engine.local.values() for name, one in stage.weights().items()}
    engine.close()
    return found


def test_a_new_head_that_averages_begins_with_the_loaded_weights(pool: Pool, tmp_path: Path) -> None:
    pool.run(1, averages, tmp_path, 1, True)
    (found,) = pool.run(1, averages, tmp_path, 2, False)
    copies = {name: one for name, one in found.items() if name.startswith("head.blocks.")}
    assert copies
    for name, copy in copies.items():
        assert torch.equal(copy, found[f"body.{name.removeprefix('head.blocks.')}"]), name
        assert torch.equal(copy, found[name.replace("head.blocks.", "head.average.")].to(copy)), name
