"""Files that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

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
