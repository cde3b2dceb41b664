"""Files that appear whole or not at all; those that a command line names: refused before the work, whole afterwards."""

from __future__ import annotations

import errno
import fcntl
import io
import os
from pathlib import Path

import pytest
import xxhash

from lptransformer import files
from lptransformer.errors import UserError
from lptransformer.files import replacing, write_text


def test_the_text_is_there_to_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    write_text(file, "é\r\n1\n")
    assert file.read_bytes() == b"\xc3\xa9\r\n1\n"
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_on_the_way_leaves_the_old_contents_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    with pytest.raises(ValueError, match="half way"), replacing(file) as temporary:
        temporary.write_text("new, but not all of it")
        assert file.read_text() == "old"
        raise ValueError("half way")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is synced and renamed from here on, in order, by name."""
    found: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted(descriptor: int) -> None:
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(path: Path, to: Path) -> Path:
        found.append(f"{path.name} to {to.name}")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", renamed)
    return found


def test_the_contents_are_on_the_disk_before_the_name_and_the_name_before_it_goes_on(
    tmp_path: Path, synced: list[str]
) -> None:
    write_text(tmp_path / "a.json", "text")
    assert synced == ["a.json.tmp", "a.json.tmp to a.json", tmp_path.name]


def test_new_folders_are_named_on_the_disk(tmp_path: Path, synced: list[str]) -> None:
    files.make_folders(tmp_path / "a" / "b" / "c")
    files.make_folders(tmp_path / "a" / "b")  # there already
    assert (tmp_path / "a" / "b" / "c").is_dir() and synced == [tmp_path.name, "a", "b"]


def test_all_of_a_folder_is_synced_from_the_inside(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").touch()
    (tmp_path / "a" / "link").symlink_to("nowhere")
    files.sync_all(tmp_path / "a")
    assert synced == ["file", "b", "a"]


def test_a_disk_that_syncs_no_folders_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refused)
    files.sync(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Invalid argument"):
        files.sync(tmp_path / "file")


SUMS = {b"": "99aa06d3014798d86001c324468d497f", b"abc": "06b05ab6733a618578af5f94892f3950"}  # of xxhsum -H2


@pytest.mark.parametrize("content", [*SUMS, bytes(range(256)) * 5_000])
def test_a_sum_is_that_of_the_bytes_whether_they_are_read_or_written(tmp_path: Path, content: bytes) -> None:
    with files.SummedFile(tmp_path / "file") as raw:
        with io.BufferedWriter(raw) as file:
            for start in range(0, len(content), 999):
                file.write(content[start : start + 999])
        expected = SUMS.get(content, xxhash.xxh3_128(content).hexdigest())
        assert raw.record == files.record(tmp_path / "file") == [len(content), expected]
    assert (tmp_path / "file").read_bytes() == content


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    link, file = tmp_path / "link.md", tmp_path / "elsewhere" / "file.md"
    link.symlink_to(file)
    write_text(link, "text")
    assert link.is_symlink() and file.read_text() == "text"
    assert list(file.parent.iterdir()) == [file]


def test_a_target_that_can_be_written_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "there.json").write_text("old")
    files.check_output(tmp_path / "there.json", "--json")
    files.check_output(tmp_path / "new.json", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]
    assert (tmp_path / "there.json").read_text() == "old"


@pytest.mark.parametrize("name", ["", "no/folder.json", "file/x.json", "x" * 254])
def test_a_target_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--json=.*: cannot be written: "):
        files.check_output(tmp_path / name, "--json")


def test_the_old_contents_stay_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there.json").write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        files.write_output(tmp_path / "there.json", "new", "--json")
    assert (tmp_path / "there.json").read_text() == "old"


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text("old")
    (tmp_path / "link.json").symlink_to("real.json")
    files.write_output(tmp_path / "link.json", "new", "--json")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "real.json").read_text() == "new"


def test_a_stream_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.check_output(tmp_path / "pipe", "--json")
    files.write_output(tmp_path / "pipe", "new", "--json")
    assert os.read(reader, 10) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


# ---- folders that appear whole


def left(parent: Path, name: str) -> Path:
    """What a process that was killed leaves."""
    folder = parent / f".unfinished-{name}-0123456789ab"
    (folder / "deeper").mkdir(parents=True)
    return folder


def test_a_folder_to_be_filled_vanishes_and_takes_leftovers_of_its_name_along(tmp_path: Path) -> None:
    mine, other, more = left(tmp_path, "out[1]"), left(tmp_path, "out1"), left(tmp_path, "out[1]-2")
    with pytest.raises(ValueError), files.unfinished(tmp_path / "out[1]") as folder:
        assert folder.parent == tmp_path and list(folder.iterdir()) == [] and not mine.exists()
        (folder / "file").touch()
        raise ValueError
    assert sorted(tmp_path.iterdir()) == sorted([other, more])
    files.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_fills_stays_until_that_one_is_gone(tmp_path: Path) -> None:
    ready, done = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        with files.unfinished(tmp_path / "out"):
            os.write(ready[1], b"1")
            os.close(done[1])
            os.read(done[0], 1)
            os._exit(0)  # killed: nothing is tidied up
    os.read(ready[0], 1)
    files.remove_unfinished(tmp_path)
    (folder,) = tmp_path.iterdir()
    with files.unfinished(tmp_path / "out"):
        assert folder.is_dir()
    os.write(done[1], b"1")
    os.waitpid(child, 0)
    assert list(tmp_path.iterdir()) == [folder]
    files.remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_locks_nothing_is_taken_for_a_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    folder = left(tmp_path, "out")
    with files.unfinished(tmp_path / "out") as mine:
        assert mine.is_dir()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_was_taken_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody tidies up between its making and its locking."""
    locked, taken = files._locked, []

    def late(folder: Path, more: int = 0) -> int | None:
        if not taken:
            taken.append(folder)
            files.remove_unfinished(tmp_path)
        return locked(folder, more)

    monkeypatch.setattr(files, "_locked", late)
    with files.unfinished(tmp_path / "out") as folder:
        assert folder.is_dir() and taken == [folder]
        files.remove_unfinished(tmp_path)
        assert folder.is_dir()
