"""A local file is replaced by a complete one or not at all, and no draft of it is left over."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pytest_nestedpve.pve import local_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("old")
    return path


def test_a_written_file_has_the_content_and_no_reader_but_its_owner(path: Path) -> None:
    path.chmod(0o644)
    local_file.write(path, "näu\n")
    assert path.read_bytes() == "näu\n".encode()
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["file"]


def test_a_mode_is_less_the_umask_like_that_of_any_new_file(path: Path) -> None:
    before = os.umask(0o027)
    try:
        local_file.write(path, b"new", mode=0o666)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_the_old_content_remains_until_the_new_one_is_complete(path: Path) -> None:
    with local_file.replacement(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_write_that_fails_leaves_the_old_file_alone(path: Path, error: BaseException) -> None:
    def write_half() -> None:
        with local_file.replacement(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write_half()
    assert path.read_text() == "old"
    assert os.listdir(path.parent) == ["file"]


def test_a_name_that_cannot_be_replaced_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(IsADirectoryError):
        local_file.write(tmp_path / "directory", b"new")
    assert os.listdir(tmp_path) == ["directory"]


def test_a_link_is_replaced_and_its_target_is_not_written(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path)
    local_file.write(link, b"new")
    assert path.read_text() == "old"
    assert not link.is_symlink()
    assert link.read_text() == "new"
