"""What a killed create or destroy leaves: a configuration that is nothing but a lock, and whose that is.

It has neither marker nor name, and a killed create is in no pool, so the tasks decide: it is ours only if the
newest task of that id is one that this run's audit log names, of the kind that leaves such a lock, and has
ended (recordings of killed workers, PVE 9.2).
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

_LEAVES = {"create": "qmcreate", "destroyed": "qmdestroy"}
_LIMIT = 200
_LATEST = 1 << 40  # epoch seconds that no clock shows


@dataclass(frozen=True)
class Remains:
    """A configuration that is nothing but `lock`. `ours`: proved by its newest task; `reason` says it.

    `running`: that task, or another one of the id, has not ended.
    """

    lock: str
    ours: bool
    running: bool
    reason: str


def bare_lock(host: PveHost, node: str, vmid: int) -> str | None:
    """The lock, if the VM's configuration is nothing else; None for any other VM, and for none.

    `lock: destroyed` makes `pvesh` refuse to print the configuration; then the file itself is read, because
    another unreadable configuration is somebody's VM. Raises PveError.
    """
    try:
        config = qemu.guest_config(host.api, node, vmid)
    except GuestNotFound:
        return None
    except UnreadableAnswer:
        return _lock_in_file(host, node, vmid)
    return is_bare(config)


def is_bare(config: Any) -> str | None:
    """The lock of a configuration that says nothing but that."""
    if not isinstance(config, dict) or not set(config) <= {"lock", "digest"}:
        return None
    lock = config.get("lock")
    return lock if isinstance(lock, str) and lock else None


def _lock_in_file(host: PveHost, node: str, vmid: int) -> str | None:
    answer = host.run(["cat", "--", f"/etc/pve/nodes/{node}/qemu-server/{vmid}.conf"], timeout=20)
    match = re.fullmatch(r"\s*lock: ([a-z-]+)\s*", answer.stdout) if answer.ok else None
    return match[1] if match else None


def remains(host: PveHost, node: str, vmid: int, ours: frozenset[str]) -> Remains | None:
    """What a killed task left at this id, judged now; None if that is not what is there. Raises PveError."""
    lock = bare_lock(host, node, vmid)
    if lock is None:
        return None
    running = bool(running_tasks(host.api, node, vmid))
    if running:
        return Remains(lock, False, True, f"its configuration is only a lock ({lock}), and a task still runs")
    kind = _LEAVES.get(lock)
    if kind is None:
        return Remains(
            lock, False, False, f"its configuration is only a lock ({lock}), which no create leaves"
        )
    newest = _newest_tasks(host.api, node, vmid)
    if not newest:
        return Remains(lock, False, False, f"its configuration is only a lock ({lock}), and no task is known")
    for upid in newest:
        if upid not in ours:
            return Remains(
                lock,
                False,
                False,
                f"its configuration is only a lock ({lock}), and not by a task of this run",
            )
        if parse_upid(upid).type != kind:
            return Remains(
                lock, False, False, f"its configuration is only a lock ({lock}), which {upid} does not leave"
            )
        end = _end(host.api, node, upid)
        if end is None:
            return Remains(lock, True, True, f"its task {upid} still runs")
        if end == "OK" or "already exists" in end:
            # A task that did its work leaves no such thing, and one that was refused found it there.
            return Remains(
                lock,
                False,
                False,
                f"its configuration is only a lock ({lock}), and {upid} ended with {end!r}",
            )
    return Remains(lock, True, False, f"what a killed task left (lock {lock}, {newest[0]})")


def running_tasks(api: Api, node: str, vmid: int) -> list[str]:
    """The UPIDs of the tasks that work on that id now. Raises PveError."""
    listed = read_tasks(api, node, source="active", vmid=vmid)
    # The list of active tasks is written when a task begins and ends: one that was killed may still be in it.
    return [task.text for task, over in listed if not over and not _ended(api, node, task.text)]


def read_tasks(api: Api, node: str, **chosen: Any) -> list[tuple[Upid, bool]]:
    """Tasks of a node, and of each whether it is over. Raises PveError.

    One that cannot be read may not be passed over: what is destroyed hangs on who works on it, and who did
    so last. So the list is then unreadable.
    """
    path = f"/nodes/{node}/tasks"
    found = []
    for each in entries(api.get(path, **chosen), call=f"get {path}", strict=True):
        task = parse_upid(each.get("upid"))
        end = whole(each.get("endtime"))
        found.append((task, end is not None and task.starttime <= end < _LATEST))
    return found


def _newest_tasks(api: Api, node: str, vmid: int) -> list[str]:
    """The newest task of an id; several, if they began in the same second and cannot be told apart."""
    listed = read_tasks(api, node, vmid=vmid, source="all", limit=_LIMIT)
    found = [(task.starttime, task.text) for task, _ in listed]
    latest = max((start for start, _ in found), default=0)
    # A task that makes a thing comes before one that takes it away in the same second, unless it failed: then
    # nothing at that id is proved by either, and both have to be ours.
    return sorted({upid for start, upid in found if start == latest}, reverse=True)


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
