"""The lab of a test session: started unless it runs, held while the session lasts. Never runs apt."""

from __future__ import annotations

import contextlib
import os
import select
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pytest_nestedpve.pve.deadline import Deadline
from pytest_nestedpve.pve.lock_file import lock

from . import lifecycle, requirements
from .names import DEFAULT_LAB, check_name, lab_dir
from .node.machine.alive import held

# The supervisor lists VMs of runs on father and stops the lab: a second or two.
_RELEASE_LIMIT = 20.0


@dataclass
class LabSession:
    """A lab that runs at least until `release`."""

    name: str
    host: str
    ssh_config: Path
    _hold: IO[str] = field(repr=False)
    _supervisor: int = field(repr=False)

    def release(self) -> None:
        """End this session's use of the lab. If it was the last one and no VM of a run remains, wait until
        the lab has stopped. A second call does nothing."""
        if self._hold.closed:
            return
        folder = lab_dir(self.name)
        with contextlib.suppress(OSError):
            (folder / "kept").unlink(missing_ok=True)
        try:
            handle = os.pidfd_open(self._supervisor)
        except ProcessLookupError:
            self._hold.close()
            return
        try:
            self._hold.close()
            deadline = Deadline(_RELEASE_LIMIT)
            while not deadline.expired:
                if select.select([handle], [], [], 0.1)[0]:
                    return
                if (
                    (folder / "kept").exists()
                    or (folder / "hand").exists()
                    or held(folder / "session.lock", by_several=True)
                ):
                    return
        finally:
            os.close(handle)

    def __enter__(self) -> LabSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def acquire(name: str = "") -> LabSession:
    """Hold lab `name` (default: "default"), started unless it runs (seconds). LabUnavailable if this machine
    cannot run a lab; LabError for any other failure."""
    name = check_name(name or DEFAULT_LAB)
    requirements.check()
    lifecycle.sweep()
    with lifecycle.lab_lock(name):
        lab = lifecycle.start_locked(name, hand=False, report=_report)
        hold = os.fdopen(lock(lab_dir(name) / "session.lock", shared=True, create=False))
    with contextlib.suppress(OSError):
        (lab_dir(name) / "kept").unlink(missing_ok=True)
    return LabSession(name, lab.host, Path(lab.ssh_config), hold, lab.supervisor)


def is_running(name: str = "") -> bool:
    """Whether the lab runs. Never starts one."""
    return lifecycle.find(name or DEFAULT_LAB) is not None


def _report(text: str) -> None:
    print(f"nestedpve-lab: {text}", file=sys.__stderr__, flush=True)
