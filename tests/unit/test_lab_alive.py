"""A lock file is held exactly as long as its holder runs."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_nestedpve.lab.node.machine.alive import held

HOLDER = """
import fcntl, sys
file = open(sys.argv[1])
fcntl.flock(file, int(sys.argv[2]))
print("held", flush=True)
input()
"""


@pytest.mark.parametrize("kind", [fcntl.LOCK_EX, fcntl.LOCK_SH], ids=["alone", "by several"])
def test_a_lock_is_held_until_its_holder_is_killed(tmp_path: Path, kind: int) -> None:
    path, several = tmp_path / "lock", kind == fcntl.LOCK_SH
    path.touch()
    command = [sys.executable, "-c", HOLDER, str(path), str(kind)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert held(path, by_several=several)
        holder.kill()
    assert not held(path, by_several=several)


def test_a_missing_lock_file_is_not_held(tmp_path: Path) -> None:
    assert not held(tmp_path / "none")


def test_a_simultaneous_test_is_not_mistaken_for_the_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)  # as another test does
        assert not held(path)
