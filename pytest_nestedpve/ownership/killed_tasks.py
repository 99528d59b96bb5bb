"""Leftovers of killed create and destroy tasks: configurations that are only a lock, and whose they are.

Such a configuration has neither marker nor name, and that of a killed create is in no pool, so the tasks
decide: it is ours only if the newest task of that id is one that this run's audit log names, of the kind that
leaves such a lock, and has ended (recordings of killed workers, PVE 9.2).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import entries, mapping, shown, whole
from pytest_nestedpve.pve.errors import GuestNotFound, UnreadableAnswer
from pytest_nestedpve.pve.tasks import Upid, parse_upid

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import PveHost

_KIND_BY_LOCK = {"create": "qmcreate", "destroyed": "qmdestroy"}
_LIMIT = 200
_LATEST = 1 << 40  # epoch seconds that no clock shows


@dataclass(frozen=True)
class Leftover:
    """A configuration that is only `lock`. `ours`: proved by its newest task; `reason`: why, or why not.

    `running`: that task, or another one of the id, has not ended.
    """

    lock: str
    ours: bool
    running: bool
    reason: str


def bare_lock(host: PveHost, node: str, vmid: int) -> str | None:
    """The lock, if the VM's configuration is only that; None for any other VM, and if there is no VM.

    `lock: destroyed` makes `pvesh` refuse to print the configuration; then the file itself is read, because
    any other unreadable configuration may be a whole VM. Raises PveError.
    """
    try:
        config = qemu.guest_config(host.api, node, vmid)
    except GuestNotFound:
        return None
    except UnreadableAnswer:
        return _lock_in_file(host, node, vmid)
    return is_bare(config)


def is_bare(config: Any) -> str | None:
    """The lock, if a configuration is only that."""
    if not isinstance(config, dict) or not set(config) <= {"lock", "digest"}:
        return None
    lock = config.get("lock")
    return lock if isinstance(lock, str) and lock else None


def _lock_in_file(host: PveHost, node: str, vmid: int) -> str | None:
    answer = host.run(["cat", "--", f"/etc/pve/nodes/{node}/qemu-server/{vmid}.conf"], timeout=20)
    match = re.fullmatch(r"\s*lock: ([a-z-]+)\s*", answer.stdout) if answer.ok else None
    return match[1] if match else None


def find_leftover(host: PveHost, node: str, vmid: int, own_tasks: frozenset[str]) -> Leftover | None:
    """The leftover of a killed task at this id, judged now; None if there is none. Raises PveError."""
    lock = bare_lock(host, node, vmid)
    if lock is None:
        return None
    only_lock = f"its configuration is only a lock ({lock})"
    if running_tasks(host.api, node, vmid):
        return Leftover(lock, False, True, f"{only_lock}, and a task still runs")
    if bare_lock(host, node, vmid) != lock:
        return None  # its task ended between the two answers

    def not_ours(why: str) -> Leftover:
        return Leftover(lock, False, False, f"{only_lock}{why}")

    kind = _KIND_BY_LOCK.get(lock)
    if kind is None:
        return not_ours(", which no create leaves")
    newest = _newest_tasks(host.api, node, vmid)
    if not newest:
        return not_ours(", and no task is known")
    for upid in newest:
        if upid not in own_tasks:
            return not_ours(", and not by a task of this run")
        if parse_upid(upid).type != kind:
            return not_ours(f", which {upid} does not leave")
        end = _end(host.api, node, upid)
        if end is None:
            return Leftover(lock, True, True, f"its task {upid} still runs")
        if end == "OK" or "already exists" in end:
            # A task that did its work leaves no such lock, and one that was refused met it.
            return not_ours(f", and {upid} ended with {end!r}")
    return Leftover(lock, True, False, f"leftover of a killed task (lock {lock}, {newest[0]})")


def running_tasks(api: Api, node: str, vmid: int) -> list[str]:
    """The UPIDs of the tasks that work on that id now. Raises PveError."""
    listed = read_tasks(api, node, source="active", vmid=vmid)
    # The list of active tasks is written when a task begins and ends: a killed task may still be in it.
    return [task.text for task, over in listed if not over and not _ended(api, node, task.text)]


def read_tasks(api: Api, node: str, **filters: Any) -> list[tuple[Upid, bool]]:
    """Tasks of a node, and whether each of them is over. Raises PveError.

    Which task works on a VM, and which did last, decides what is destroyed. So a list with a task that cannot
    be read is unreadable as a whole.
    """
    path = f"/nodes/{node}/tasks"
    tasks = []
    for entry in entries(api.get(path, **filters), call=f"get {path}", strict=True):
        task = parse_upid(entry.get("upid"))
        end = whole(entry.get("endtime"))
        tasks.append((task, end is not None and task.starttime <= end < _LATEST))
    return tasks


def _newest_tasks(api: Api, node: str, vmid: int) -> list[str]:
    """The newest task of an id; several, if they began in the same second and cannot be ordered."""
    listed = read_tasks(api, node, vmid=vmid, source="all", limit=_LIMIT)
    starts = [(task.starttime, task.text) for task, _ in listed]
    latest = max((start for start, _ in starts), default=0)
    # A create comes before a destroy in the same second, unless it failed: then neither proves anything about
    # that id, and both have to be ours.
    return sorted({upid for start, upid in starts if start == latest}, reverse=True)


def _ended(api: Api, node: str, upid: str) -> bool:
    return _end(api, node, upid) is not None


def _end(api: Api, node: str, upid: str) -> str | None:
    """How a task ended, in PVE's words; None while it runs. Raises PveError."""
    path = f"/nodes/{node}/tasks/{upid}/status"
    status = mapping(api.get(path), call=f"get {path}")
    if status.get("status") != "stopped":
        return None
    end = status.get("exitstatus")
    if not isinstance(end, str) or not end.strip():
        raise UnreadableAnswer(f"expected how the task ended, found {shown(end)}", call=f"get {path}")
    return end.strip()
