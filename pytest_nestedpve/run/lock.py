"""The lock of a session: held while the session lives, free once it has exited."""

from __future__ import annotations

import os

from pytest_nestedpve.pve import lock_file
from pytest_nestedpve.run.directory import RunDirectoryError
from pytest_nestedpve.run.identity import state_home


class SessionLock:
    """A lock file held while a session lives: a free one proves, on the same client, that it has exited.

    The file is outside the project, so that sessions in all directories find it.
    """

    def __init__(self, run_id: str) -> None:
        self.path = state_home() / "locks" / f"{run_id}.lock"
        self._fd: int | None = None

    def acquire(self) -> None:
        """Hold the lock; does nothing when this object holds it. Raises RunDirectoryError if it cannot."""
        if self._fd is not None:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = lock_file.lock(self.path, wait=False)
        except BlockingIOError as e:
            raise RunDirectoryError(f"another session works on this run: {self.path} is locked") from e
        except OSError as e:
            raise RunDirectoryError(f"cannot create the session's lock file {self.path}: {e}") from e

    def release(self, *, remove: bool = True) -> None:
        """Release the lock. `remove=False` keeps its file: `alive` of a run with leftovers remains known."""
        if self._fd is None:
            return
        if remove:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._fd is not None

    @staticmethod
    def alive(run_id: str) -> bool | None:
        """True: a session on this client holds the lock; False: it has exited; None: unknown here."""
        try:
            os.close(lock_file.lock(SessionLock(run_id).path, wait=False, create=False))
        except BlockingIOError:
            return True
        except OSError:
            return None
        return False
