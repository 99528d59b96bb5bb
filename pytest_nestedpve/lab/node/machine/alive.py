"""Lock files as signs of life: `flock` ends with the last copy of the open file."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold the lock file exclusively; waits as long as another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(path: Path, *, by_several: bool = False) -> bool:
    """Whether a process holds the lock file. A missing or unreadable file counts as not held.

    `by_several`: the holders share the lock, so the test needs an exclusive lock. Without, the test takes a
    shared one, and simultaneous tests do not mistake each other for the holder.
    """
    try:
        with path.open() as file:
            fcntl.flock(file, (fcntl.LOCK_EX if by_several else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
