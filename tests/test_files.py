"""Files that appear whole or not at all; those that a command line names: refused before the work, whole afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

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
