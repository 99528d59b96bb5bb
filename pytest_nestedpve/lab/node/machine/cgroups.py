"""Control groups (version 2): a machine's processes together, so that they can be ended together."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path


class CgroupError(Exception):
    """There is no usable cgroup v2 hierarchy, or a group did not do what it was told."""


def root() -> Path:
    """The cgroup v2 hierarchy as mounted here: pure (systemd's default) or beside version 1.

    CgroupError if there is none that can be written, or the kernel lacks cgroup.kill (before 5.14).
    """
    for candidate in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (candidate / "cgroup.procs").exists() and (candidate / "cgroup.controllers").exists():
            if os.access(candidate / "cgroup.procs", os.W_OK):
                return candidate
            raise CgroupError(f"{candidate} is mounted read-only")
    raise CgroupError("no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified")


def enter(group: Path) -> None:
    """Move this process into `group`, made if need be."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "cgroup.procs").write_text(str(os.getpid()))


def processes(group: Path) -> list[int]:
    """The ids of the processes in the group itself, as seen from here (0: not visible from here)."""
    try:
        return [int(line) for line in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def event(group: Path, name: str) -> bool:
    """`populated` or `frozen`, for the group and those below it; False if the group is gone."""
    try:
        lines = (group / "cgroup.events").read_text().splitlines()
    except OSError:
        return False
    return f"{name} 1" in lines


def await_event(group: Path, name: str, wanted: bool, limit: float) -> None:
    """Wait until an event has the value `wanted`; the kernel tells when one changes. CgroupError at the
    limit (seconds)."""
    deadline = time.monotonic() + limit
    try:
        watched = (group / "cgroup.events").open()
    except OSError as e:
        if wanted:
            raise CgroupError(f"{group} is gone") from e
        return
    with watched:
        poller = select.poll()
        poller.register(watched, select.POLLPRI | select.POLLERR)
        while event(group, name) != wanted:
            left = deadline - time.monotonic()
            if left <= 0:
                state = "still" if not wanted else "not"
                raise CgroupError(f"{group} is {state} {name} after {limit:g} s")
            # The notification is raised on a read, so a change between two reads is never lost for long.
            poller.poll(min(left, 0.2) * 1000)
            with contextlib.suppress(OSError):  # the group is gone: `event` says so too
                watched.seek(0)
                watched.read()


def freeze(group: Path, on: bool, limit: float = 10.0) -> None:
    """Stop (or let go on) every process of the group, and wait until it is so."""
    (group / "cgroup.freeze").write_text("1" if on else "0")
    await_event(group, "frozen", on, limit)


def kill(group: Path, limit: float = 20.0) -> None:
    """End every process of the group and of those below it, and wait until they are gone."""
    if not group.is_dir():
        return
    with contextlib.suppress(FileNotFoundError):
        (group / "cgroup.kill").write_text("1")
    await_event(group, "populated", False, limit)


def remove(group: Path, limit: float = 20.0) -> None:
    """`kill`, then remove the group and those below it. No error if it is gone."""
    kill(group, limit)
    deadline = time.monotonic() + limit
    while True:
        busy: OSError | None = None
        for folder, _, _ in os.walk(group, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as e:
                busy = e
        if busy is None:
            return
        if time.monotonic() > deadline:
            raise CgroupError(f"{group} cannot be removed: {busy}") from busy
        select.select([], [], [], 0.01)
