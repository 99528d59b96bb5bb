"""Control groups (version 2): the processes of a machine as a group, ended and frozen as one."""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path


class CgroupError(Exception):
    """No usable cgroup v2 hierarchy, or a group that did not reach the requested state."""


def root() -> Path:
    """The mount point of the cgroup v2 hierarchy: pure (systemd's default) or beside version 1.

    CgroupError without a writable one, or if the kernel lacks cgroup.kill (before 5.14).
    """
    for candidate in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (candidate / "cgroup.procs").exists() and (candidate / "cgroup.controllers").exists():
            if os.access(candidate / "cgroup.procs", os.W_OK):
                return candidate
            raise CgroupError(f"{candidate} is mounted read-only")
    raise CgroupError("no cgroup v2 hierarchy at /sys/fs/cgroup or /sys/fs/cgroup/unified")


def enter(group: Path) -> None:
    """Move this process into `group`, which is created if missing."""
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


def await_event(group: Path, name: str, value: bool, limit: float) -> None:
    """Wait until the event `name` has `value`; the kernel notifies of changes. CgroupError after `limit`
    seconds."""
    deadline = time.monotonic() + limit
    try:
        watched = (group / "cgroup.events").open()
    except OSError as e:
        if value:
            raise CgroupError(f"{group} is gone") from e
        return
    with watched:
        poller = select.poll()
        poller.register(watched, select.POLLPRI | select.POLLERR)
        while event(group, name) != value:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                state = "still" if not value else "not"
                raise CgroupError(f"{group} is {state} {name} after {limit:g} s")
            # A change between two reads may raise no notification: poll at least every 0.2 s.
            poller.poll(min(remaining, 0.2) * 1000)
            with contextlib.suppress(OSError):  # the group was removed: `event` is False then
                watched.seek(0)
                watched.read()


def freeze(group: Path, on: bool, limit: float = 10.0) -> None:
    """Freeze (or thaw) every process of the group, and wait until it is done."""
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
