"""The lock of a session: held while the session lives, free once it is dead."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

from pytest_nestedpve.run.directory import RunDirectoryError
from pytest_nestedpve.run.identity import state_home


class SessionLock:
    """A lock file held while a session lives: a free one proves, on the same client, that it is dead.

    It lies outside the project, so that a session in any directory can ask. `flock` goes with the last copy
    of the open file, also after SIGKILL.
    """

    def __init__(self, run_id: str) -> None:
        self.path = state_home() / "locks" / f"{run_id}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """Raises RunDirectoryError when another session holds it."""
        while self._fd is None:
            fd = self._locked()
            if _is_at(fd, self.path):
                self._fd = fd
            else:
                os.close(fd)  # who held it has removed the file: another session may have made a new one

    def _locked(self) -> int:
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as e:
            raise RunDirectoryError(f"cannot make the session's lock file {self.path}: {e}") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            os.close(fd)
            raise RunDirectoryError(f"another session works on this run: {self.path} is locked") from e
        return fd

    def release(self, *, remove: bool = True) -> None:
        """Give it up. `remove=False` keeps the file: something is left, and a later session may ask whose."""
        if self._fd is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None

    @property
    def held(self) -> bool:
        """Whether this object holds it."""
        return self._fd is not None

    @staticmethod
    def alive(run_id: str) -> bool | None:
        """True: a session on this client holds the lock; False: it is dead; None: not known here."""
        path = state_home() / "locks" / f"{run_id}.lock"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(fd, path):
                return SessionLock.alive(run_id)
        except BlockingIOError:
            return True
        except OSError:
            return None
        finally:
            os.close(fd)
        return False


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is the one at that path."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False
