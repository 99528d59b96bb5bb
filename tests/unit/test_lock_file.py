"""A lock file is held by one process or shared, and always the one that has the name."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from pytest_nestedpve.pve.lock_file import lock, locked


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.lock"


@pytest.fixture
def shared(path: Path) -> Iterator[int]:
    descriptor = lock(path, shared=True)
    yield descriptor
    os.close(descriptor)


def test_a_held_lock_is_refused_at_once_without_waiting(path: Path) -> None:
    with locked(path), pytest.raises(BlockingIOError):
        lock(path, wait=False)
    os.close(lock(path, wait=False))


def test_a_shared_lock_has_several_holders_and_excludes_a_single_one(path: Path, shared: int) -> None:
    os.close(lock(path, shared=True, wait=False))
    with pytest.raises(BlockingIOError):
        lock(path, wait=False)
    assert os.fstat(shared).st_mode & 0o777 == 0o600


def test_a_missing_lock_file_is_not_created_by_a_question(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        lock(path, create=False)
    assert not path.exists()


def test_a_link_in_place_of_a_lock_file_is_refused(path: Path) -> None:
    path.symlink_to(path.with_name("other"))
    with pytest.raises(OSError, match="symbolic link"):
        lock(path)
    assert not path.with_name("other").exists()


def test_a_file_deleted_while_it_is_waited_for_is_not_the_one_locked(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(path), pytest.raises(BlockingIOError):
        lock(path, wait=False)


def test_a_refused_lock_leaves_no_file_open(path: Path) -> None:
    with locked(path):
        before = os.listdir("/proc/self/fd")
        with pytest.raises(BlockingIOError):
            lock(path, wait=False)
        assert os.listdir("/proc/self/fd") == before
