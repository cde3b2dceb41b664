"""A checkpoint that counts is on the disk: after a power cut it is whole, or it does not count.

The power is cut by copying the file behind a mounted file system, without telling that: the copy has what had reached
the disk. Where nothing can be mounted, the order in which files are written, synced and renamed is looked at.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from lptransformer.errors import RunError
from lptransformer.methods.stages import StagePlan
from lptransformer.run_folder import checkpoint, saved_stage
from lptransformer.run_folder.metrics_log import MetricsWriter, read_metrics
from lptransformer.run_folder.saved_stage import Frozen, Pieces, StageContent

PLAN = StagePlan(0, 0, 3, 0, has_head=True, is_first=True, is_last=True, trained=True)


def content(update: int, frozen: Frozen | None = None) -> StageContent:
    flat = torch.full((3000,), float(update))
    pieces = Pieces({"exp_avg/body.weight": flat}, {"body.weight": 0}, {"body.weight": 1.0}, {"body.weight": (3000,)})
    state = saved_stage.describe(PLAN, 1, update, {"epoch": 0, "offset": update}, "fp32", {})
    weights = {"body.weight": torch.full((3000,), -float(update))}
    return StageContent(pieces, state, weights, frozen=frozen or Frozen({"body.fixed": torch.ones(50)}))


def save(run: Path, update: int, frozen: Frozen | None = None) -> None:
    (run / "checkpoints").mkdir(exist_ok=True)
    checkpoint.finish(run, update, saved_stage.write(run, update, 0, 0, content(update, frozen)))


def is_whole(run: Path, update: int) -> bool:
    checkpoint.check(checkpoint.folder_of(run, update))
    saved = saved_stage.SavedStage(checkpoint.stage_folder(run, update, 0))
    first = saved.weight("body.weight")[0].item(), saved.part("exp_avg", "body.weight")[0].item()
    return first == (-update, update) and saved.weight("body.fixed").sum().item() == 50


def test_what_a_marker_names_was_synced_before_it_and_the_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename, replace = os.fsync, Path.rename, Path.replace

    def moved(source: Path, target: Path) -> None:
        """What was synced under a name is now synced under another."""
        events.extend(
            event.replace(f"synced {source}", f"synced {target}", 1)
            for event in list(events)
            if event == f"synced {source}" or event.startswith(f"synced {source}/")
        )
        events.append(f"renamed {target}")

    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), events.append(f"synced {name_of(file)}"))[0])
    monkeypatch.setattr(Path, "rename", lambda self, to: (rename(self, to), moved(self, Path(to)))[0])
    monkeypatch.setattr(Path, "replace", lambda self, to: (replace(self, to), moved(self, Path(to)))[0])
    save(tmp_path, 7)
    unfinished, final = checkpoint.unfinished_folder(tmp_path, 7), checkpoint.folder_of(tmp_path, 7)
    marked, named = events.index(f"renamed {unfinished / 'complete'}"), events.index(f"renamed {final}")
    for path in checkpoint.read_sums(final):
        assert f"synced {Path(os.path.normpath(unfinished / path))}" in events[:marked], path
    for folder in (unfinished / "stage-0", tmp_path / "checkpoints"):
        assert f"synced {folder}" in events[:marked], "the names of its files"
    assert f"synced {unfinished / 'complete'}" in events[:named]
    assert f"synced {unfinished}" in events[marked:named]
    assert f"synced {tmp_path / 'checkpoints'}" in events[named:]


def name_of(file: int) -> str:
    return os.readlink(f"/proc/self/fd/{file}")


def test_a_save_that_is_done_again_replaces_the_other_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename one of the two is there, under a name from which it comes back."""
    save(tmp_path, 7)
    final, rename = checkpoint.folder_of(tmp_path, 7), Path.rename

    def stop(self: Path, to: Path) -> None:
        if Path(to) == final and self != final.with_name(f".replaced-{final.name}"):
            raise KeyboardInterrupt
        rename(self, to)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 7)
    monkeypatch.undo()
    assert checkpoint.complete_updates(tmp_path) == []
    checkpoint.remove_unfinished(tmp_path)
    assert checkpoint.complete_updates(tmp_path) == [7] and is_whole(tmp_path, 7)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


# ---- with a real file system


def can_mount() -> bool:
    return (
        os.geteuid() == 0 and all(map(shutil.which, ("mkfs.ext4", "losetup", "mount"))) and os.path.exists("/dev/loop0")
    )


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file system of its own, and the file that it is in."""
    if not can_mount():
        pytest.skip("needs root, ext4 and loop devices; the order of writes, syncs and renames is tested without")
    image, place = tmp_path / "disk.img", tmp_path / "disk"
    mount(image, place, make=True)
    yield place, image
    subprocess.run(["umount", str(place)], check=True)


def mount(image: Path, place: Path, make: bool = False) -> None:
    place.mkdir()
    if make:
        subprocess.run(["truncate", "-s", "48M", str(image)], check=True)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    # It writes by itself once an hour: what is on the disk is what was synced.
    subprocess.run(["mount", "-o", "loop,commit=3600", str(image), str(place)], check=True)


def after_a_cut(image: Path, folder: Path) -> Path:
    """The file system as it comes back. Nobody may write to it meanwhile."""
    folder.mkdir()
    shutil.copyfile(image, folder / "disk.img")
    mount(folder / "disk.img", folder / "disk")
    return folder / "disk"


@pytest.mark.slow
def test_what_counts_survives_a_power_cut(disk: tuple[Path, Path], tmp_path: Path) -> None:
    place, image = disk
    (place / "run").mkdir()
    writer = MetricsWriter(place / "run")
    for update in (1, 2):
        writer.write({"update": update, "stages": []})
    writer.sync()
    save(place / "run", 2)
    writer.write({"update": 3, "stages": []})
    back = after_a_cut(image, tmp_path / "cut") / "run"
    try:
        assert checkpoint.complete_updates(back) == [2] and is_whole(back, 2)
        assert [row["update"] for row in read_metrics(back)] == [1, 2], "the third was not synced"
    finally:
        subprocess.run(["umount", str(back.parent)], check=True)


def save_on(run: str) -> None:
    frozen = Frozen({"body.fixed": torch.ones(50)})
    for number in range(10**6):
        save(Path(run), number // 2 + 1, frozen)


@pytest.mark.slow
def test_at_any_moment_what_is_there_is_whole(disk: tuple[Path, Path], tmp_path: Path) -> None:
    """Twelve cuts while another process saves checkpoints one after another, each of them twice."""
    place, image = disk
    (place / "run").mkdir()
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_durable; test_durable.save_on({str(place / 'run')!r})"
    saving = subprocess.Popen([sys.executable, "-c", code])
    seen = []
    try:
        while not checkpoint.complete_updates(place / "run"):
            time.sleep(0.05)
        for cut in range(12):
            time.sleep(0.05 + 0.013 * cut)
            saving.send_signal(signal.SIGSTOP)
            while psutil.Process(saving.pid).status() != psutil.STATUS_STOPPED:  # it is in no call of the kernel
                time.sleep(0.001)
            back = after_a_cut(image, tmp_path / f"cut-{cut}") / "run"
            saving.send_signal(signal.SIGCONT)
            try:
                checkpoint.remove_unfinished(back)
                updates = checkpoint.complete_updates(back)
                assert all(is_whole(back, update) for update in updates)
                seen.append(len(updates))
            finally:
                subprocess.run(["umount", str(back.parent)], check=True)
    finally:
        saving.kill()
        saving.wait()
    assert seen == sorted(seen) and seen[-1] > 1, seen


def test_a_file_that_was_never_written_is_found(tmp_path: Path) -> None:
    """What a disk without syncs would leave."""
    save(tmp_path, 7)
    path = checkpoint.stage_folder(tmp_path, 7, 0) / saved_stage.WEIGHTS
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(RunError, match="weights.safetensors is damaged"):
        is_whole(tmp_path, 7)
