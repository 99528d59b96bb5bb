"""A lock file: `flock` on it, which ends with the last copy of the open file, also after SIGKILL."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def lock(path: Path, *, shared: bool = False, wait: bool = True, create: bool = True) -> int:
    """Lock the file at `path` and return its descriptor; closing that releases the lock.

    The lock is on the file that has the name when this returns: a holder may delete it. `shared`: together
    with other shared holders. Without `wait`, raises BlockingIOError while another process holds the lock;
    without `create`, FileNotFoundError for a missing file. A symbolic link is an error. Raises OSError.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_CREAT if create else 0)
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        descriptor = os.open(path, flags, 0o600)
        try:
            fcntl.flock(descriptor, how)
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock of `path` alone in the body; see `lock`."""
    descriptor = lock(path, wait=wait)
    try:
        yield
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False
