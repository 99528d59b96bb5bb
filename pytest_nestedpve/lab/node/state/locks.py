"""The per-VM lock files, /var/lock/qemu-server/lock-ID.conf: `flock` with PVE's limit and messages."""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
import time
from collections.abc import Iterator

from ..api.errors import PveFailure
from . import output, paths, worker

WAIT = 10.0
_held: dict[tuple[int, int, str, int], int] = {}  # depth: re-entrant as PVE's


@contextlib.contextmanager
def guest(vmid: int, *, timeout: float = WAIT, rc: int = 255, quiet: bool = False) -> Iterator[None]:
    """Hold the lock file of guest `vmid`.

    A wait prints "trying to acquire lock...", on stdout in a worker, else on stderr [recordings
    concurrency-015 to 023]; `quiet` for callers without a terminal. PveFailure after `timeout` seconds.
    """
    key = (os.getpid(), threading.get_ident(), str(paths.root()), vmid)
    if _held.get(key):
        _held[key] += 1
        try:
            yield
        finally:
            _held[key] -= 1
        return
    descriptor, name = _open(vmid)
    try:
        _acquire(descriptor, name, timeout, rc, quiet)
        _held[key] = 1
        try:
            yield
        finally:
            _held.pop(key, None)
            # Unlock explicitly: a process forked meanwhile (a machine's supervisor) may have a copy.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _open(vmid: int) -> tuple[int, str]:
    """The lock file's descriptor, and its path on the node."""
    folder = paths.at("/var/lock/qemu-server")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"lock-{vmid}.conf"
    return os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), paths.shown(file)


def hold(vmid: int, seconds: float) -> None:
    """Hold the lock file of guest `vmid` for `seconds`, in a detached process."""
    from .store import release

    descriptor, _ = _open(vmid)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    release()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.setsid()
            os.closerange(0, descriptor)
            threading.Event().wait(seconds)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(descriptor)


def _acquire(descriptor: int, name: str, timeout: float, rc: int, quiet: bool) -> None:
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    print_line = output.line if worker.current.get() is not None else output.error
    if not quiet:
        print_line("trying to acquire lock...")
    end = time.monotonic() + timeout
    pause = threading.Event()
    while time.monotonic() < end:
        pause.wait(0.05)  # flock has no wait with a limit
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        if not quiet:
            print_line(" OK")
        return
    raise PveFailure(f"can't lock file '{name}' - got timeout", rc=rc)
