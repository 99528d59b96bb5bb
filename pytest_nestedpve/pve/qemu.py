"""Guests of a PVE host: their lists and configurations, and the calls that change them, awaited."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pytest_nestedpve.pve.answers import entries, mapping, text, whole
from pytest_nestedpve.pve.api import Api, call_limit
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    ApiError,
    BadParameter,
    LockTimeout,
    Running,
    TaskFailed,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.host import NODE_NAME
from pytest_nestedpve.pve.tasks import TaskResult, wait_task

# Keys of a VM's configuration that bring a volume with them.
_DISK = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+\Z")
UNREADABLE = "(unreadable)"
"""Replaces an unreadable name of a pool or lock; no pool or lock has this name."""


@dataclass(frozen=True)
class Guest:
    """A guest as /cluster/resources shows it: up to ten seconds old, and without description.

    `name` is None for a guest without one. `kind` is "qemu" or "lxc", `status` PVE's word.
    """

    vmid: int
    node: str
    name: str | None
    status: str
    pool: str | None
    tags: tuple[str, ...]
    template: bool
    lock: str | None
    kind: str


def list_guests(api: Api) -> list[Guest]:
    """All guests of the host or cluster, by id, without unreadable entries."""
    call = "get /cluster/resources"
    guests = (read_guest(entry) for entry in entries(api.get("/cluster/resources", type="vm"), call=call))
    return sorted((guest for guest in guests if guest is not None), key=lambda guest: guest.vmid)


def read_guest(entry: Mapping[str, Any]) -> Guest | None:
    """A guest from an entry of /cluster/resources or of a pool's members; None if the entry is no guest.

    An unreadable value is read as the one that protects the guest from changes.
    """
    vmid, node, kind = whole(entry.get("vmid")), text(entry.get("node")), entry.get("type")
    if vmid is None or not is_vmid(vmid) or kind not in ("qemu", "lxc"):
        return None
    if node is None or not NODE_NAME.match(node):
        return None
    name = text(entry.get("name"))
    return Guest(
        vmid=vmid,
        node=node,
        # PVE shows a guest without a name by this text, which no guest can have as its name.
        name=None if name in (f"VM {vmid}", f"CT {vmid}") else name,
        status=text(entry.get("status")) or "unknown",
        pool=text(entry.get("pool")) or (UNREADABLE if protects(entry, "pool") else None),
        tags=read_tags(entry.get("tags")),
        template=protects(entry, "template"),
        lock=text(entry.get("lock")) or (UNREADABLE if protects(entry, "lock") else None),
        kind=str(kind),
    )


def read_tags(value: Any) -> tuple[str, ...]:
    """Tags in any of PVE's separators, in lower case as PVE stores them."""
    if not isinstance(value, str):
        return ()
    return tuple(tag.lower() for tag in re.split(r"[;,\s]+", value) if tag)


def cautious(value: Any) -> bool:
    """False only for certain negatives (absent, 0, "0", "", false): for flags that protect a guest."""
    return value not in (None, 0, "0", "", False)


def protects(values: Mapping[str, Any], key: str) -> bool:
    """Whether a key that protects a guest from changes is set: it exists and is no certain negative."""
    return key in values and (values[key] is None or cautious(values[key]))


def is_vmid(value: int) -> bool:
    """Whether a guest may have this id."""
    return 100 <= value <= 999_999_999


def guest_config(api: Api, node: str, vmid: int, *, current: bool = False) -> dict[str, Any]:
    """A VM's configuration; with `current` the active values instead of the pending ones.

    Raises GuestNotFound; UnreadableAnswer for a VM whose destroy was killed half-way (facts of PVE
    9.2: `lock: destroyed` fails the host's own verification).
    """
    path = f"{path_of(node, vmid)}/config"
    return mapping(api.get(path, current=True if current else None), call=f"get {path}")


def guest_status(api: Api, node: str, vmid: int) -> str:
    """ "running", "stopped" or another word of PVE's. Raises GuestNotFound, UnreadableAnswer."""
    path = f"{path_of(node, vmid)}/status/current"
    status = mapping(api.get(path), call=f"get {path}").get("status")
    if not isinstance(status, str) or not status:
        raise UnreadableAnswer(f"expected a status, found {status!r}", call=f"get {path}")
    return status


def create_diskless(
    api: Api,
    node: str,
    vmid: int,
    *,
    name: str,
    pool: str | None = None,
    description: str | None = None,
    timeout: float = 60.0,
    **options: Any,
) -> TaskResult:
    """Create a VM without any volume; `options` are further keys of its configuration.

    Raises AlreadyExists when the id is in use (try the next one). After any other error the VM may exist
    (facts of PVE 9.2, 67): read the id's configuration.
    """
    disks = sorted(key for key in options if _DISK.match(key))
    if disks:
        raise BadParameter(f"expected options of a VM without volumes, found {', '.join(disks)}")
    config = {"vmid": vmid, "name": name, "pool": pool, "description": description, **options}
    return awaited(api, lambda: api.post(path_of(node), **config), timeout)


def configure(api: Api, node: str, vmid: int, *, timeout: float = 120.0, **options: Any) -> TaskResult:
    """Change a VM's configuration by a task, which may import or allocate volumes."""
    return awaited(api, lambda: api.post(f"{path_of(node, vmid)}/config", **options), timeout)


def start(api: Api, node: str, vmid: int, *, timeout: float = 120.0) -> TaskResult | None:
    """Start a VM; None if it is running. Raises the typed reason of a failed task."""
    try:
        return awaited(api, lambda: api.post(f"{path_of(node, vmid)}/status/start"), timeout)
    except Running:
        return None


def stop(api: Api, node: str, vmid: int, *, timeout: float = 60.0) -> TaskResult:
    """Switch a VM off at once; no error for a stopped VM. Raises the typed reason of a failed task."""
    return awaited(api, lambda: api.post(f"{path_of(node, vmid)}/status/stop"), timeout)


def shutdown(api: Api, node: str, vmid: int, *, timeout: float = 60.0) -> TaskResult:
    """Shut the guest down; raises ApiError ("… got timeout") if it still runs after `timeout` seconds."""
    seconds = max(1, int(timeout))
    post = f"{path_of(node, vmid)}/status/shutdown"
    return awaited(api, lambda: api.post(post, timeout=seconds), timeout + 30)


def destroy(api: Api, node: str, vmid: int, *, timeout: float = 120.0) -> TaskResult:
    """Destroy a stopped VM with the volumes of its configuration, and nothing else.

    Never with `purge` or `destroy-unreferenced-disks`. A held lock file raises LockTimeout at once: a delete
    that waits for a lock may destroy another VM of the same id (facts of PVE 9.2, 52), so the caller proves
    the VM again before a retry.
    """
    return awaited(api, lambda: api.delete(path_of(node, vmid)), timeout, again=False)


def awaited(api: Api, call: Callable[[], Any], timeout: float, *, again: bool = True) -> TaskResult:
    """Do a call that starts a task and wait for the task's end, at most `timeout` seconds (nominal).

    With `again`, a call that failed because the lock file was held (PVE waits 10 s) is retried within the
    limit. Raises the typed reason of a failed task, with the TaskFailed and its log as cause; TaskFailed
    itself when the reason has no type.
    """
    deadline = Deadline(timeout)
    refused: ApiError | None = None

    def attempt() -> TaskResult | None:
        nonlocal refused
        limit = max(1.0, deadline.nominal())
        try:
            with call_limit(limit):
                upid = call()
            return wait_task(api, upid, timeout=limit)
        except TaskFailed as error:
            reason = error.reason
            if again and isinstance(reason, LockTimeout) and not deadline.expired:
                refused = error
                return None
            if type(reason) is ApiError:
                raise
            raise reason from error
        except LockTimeout as error:
            if not again or deadline.expired:
                raise
            refused = error
            return None

    return wait_until(
        attempt, deadline=deadline, what=lambda: f"the lock of a guest ({refused})", interval=(0.2, 2.0)
    )


def path_of(node: str, vmid: int | None = None) -> str:
    """The API path of a node's guests, or of one guest. Raises BadParameter for an invalid node or id."""
    if not isinstance(node, str) or not NODE_NAME.match(node):
        raise BadParameter(f"expected the name of a node, found {node!r}")
    if vmid is not None and (isinstance(vmid, bool) or not isinstance(vmid, int) or not is_vmid(vmid)):
        raise BadParameter(f"expected the id of a guest, 100 or above, found {vmid!r}")
    return f"/nodes/{node}/qemu" if vmid is None else f"/nodes/{node}/qemu/{vmid}"
