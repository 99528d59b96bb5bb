"""The per-VM lock files, /var/lock/qemu-server/lock-ID.conf: `flock`, ten seconds, PVE's words."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
from collections.abc import Iterator

from ..api.errors import PveFailure
from . import paths

WAIT = 10.0
_held: dict[tuple[int, int], int] = {}  # (process, vmid) -> depth: the lock is re-entrant as PVE's


@contextlib.contextmanager
def guest(vmid: int, *, timeout: float = WAIT, rc: int = 255, quiet: bool = False) -> Iterator[None]:
    """Hold the lock file of guest `vmid`.

    Who has to wait says so ("trying to acquire lock..."): on stdout in a worker, else on stderr
    [recordings concurrency-015 to 023]; `quiet` for callers without a terminal.
    """
    key = (os.getpid(), vmid)
    if _held.get(key):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    folder = paths.at("/var/lock/qemu-server")
    folder.mkdir(parents=True, exist_ok=True)
    name = f"lock-{vmid}.conf"
    descriptor = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, f"/var/lock/qemu-server/{name}", timeout, rc, quiet)
        _held[key] = 1
        try:
            yield
        finally:
            _held.pop(key, None)
            # Said explicitly: a process forked meanwhile (a machine's supervisor) may have a copy.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, name: str, timeout: float, rc: int, quiet: bool) -> None:
    from . import tasks

    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    out = sys.stdout if tasks.in_worker() else sys.stderr
    if not quiet:
        print("trying to acquire lock...", file=out, flush=True)
    end = time.monotonic() + timeout
    nobody = threading.Event()
    while time.monotonic() < end:
        nobody.wait(0.05)  # flock has no wait with a limit
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        if not quiet:
            print(" OK", file=out, flush=True)
        return
    raise PveFailure(f"can't lock file '{name}' - got timeout", rc=rc)
