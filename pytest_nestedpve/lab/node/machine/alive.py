"""Whether somebody lives, by a lock file: `flock` goes with the last copy of the open file."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def holding(path: Path) -> Iterator[None]:
    """Hold the lock file alone, and wait for that as long as another process does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def held(path: Path, *, by_several: bool = False) -> bool:
    """Whether a process holds the lock file; one that is not there or cannot be opened is held by nobody.

    `by_several`: its holders share it, so that only who wants it alone finds out. Without, those who ask at
    the same moment do not take each other for the holder.
    """
    try:
        with path.open() as file:
            fcntl.flock(file, (fcntl.LOCK_EX if by_several else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
