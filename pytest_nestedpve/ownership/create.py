"""Creation of a VM that can be proved ours from its first moment: diskless, in the pool, with its marker."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.killed_tasks import is_bare
from pytest_nestedpve.ownership.marker import TAG, Marker, new_uuid, parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import pool_name
from pytest_nestedpve.pve.answers import STORAGE_NAME, entries, shown, whole
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    AlreadyExists,
    CommandTimeout,
    GuestNotFound,
    Interrupted,
    Locked,
    PveError,
    SshError,
    UnreadableAnswer,
    WorkerFailed,
)
from pytest_nestedpve.pve.qemu import create_diskless, guest_config, list_guests

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run.identity import Run

_TRIES = 20
_DRAWN = 20_000
_SETTLE = 30.0
"""Seconds within which a create whose answer is unknown has ended."""
# After these it is not known whether a VM was created; after any other error, none was.
_UNCERTAIN = (SshError, CommandTimeout, WorkerFailed, Interrupted, Locked, UnreadableAnswer)


class NoFreeId(PveError):
    """Every id of the range is in use."""


@dataclass(frozen=True)
class Created:
    """The VM that was created."""

    vmid: int
    node: str
    name: str
    uuid: str


def guest_name(settings: Settings, run: Run, role: str) -> str:
    """The name of the run's VM: the literal prefix of the first pattern, the role of a leaf, the run."""
    prefix = settings.name_prefix
    return f"{prefix}-leaf-{run.id}" if role == "leaf" else f"{prefix}-{run.id}"


def create_marked(
    host: PveHost,
    run: Run,
    settings: Settings,
    role: str = "nested",
    *,
    timeout: float = 120.0,
    **options: Any,
) -> Created:
    """Create the run's VM without disks: marker, uuid and pool at create, tags afterwards.

    Ids are drawn at random in the range, never one with volumes or one that a pool lists. A create that
    failed may have created the VM all the same (recorded under load): the configuration is read; with our
    uuid the VM is ours, with another one the next id is drawn. Raises NoFreeId, PveError.
    """
    name, node, pool = guest_name(settings, run, role), host.node, pool_name(settings, run)
    refused: PveError | None = None
    for vmid, _ in zip(free_ids(host, settings), range(_TRIES), strict=False):
        marker = Marker(run.id, vmid, new_uuid(), role)
        try:
            create_diskless(
                host.api,
                node,
                vmid,
                name=name,
                pool=pool,
                description=marker.to_text(),
                smbios1=f"uuid={marker.uuid}",
                timeout=timeout,
                **options,
            )
        except (AlreadyExists, *_UNCERTAIN) as e:
            refused = e
            owner = _owner(host, marker, Deadline(_SETTLE))
            if owner == "unknown":
                raise
            if owner != "ours":
                continue  # if it is created after all, it has our marker, and the teardown discovers it
        # Tags at create are refused to a token whose rights come from the pool alone.
        path, tags = f"/nodes/{node}/qemu/{vmid}/config", f"{TAG};{run.tag}"
        patiently(partial(host.api.put, path, tags=tags))
        return Created(vmid, node, name, marker.uuid)
    ranges = ",".join(f"{low}-{high}" for low, high in settings.vmid_ranges)
    raise NoFreeId(
        f"expected a free VM id in {ranges} on {host.name}, found none"
        + (f" ({refused})" if refused else "")
        + "; widen nested_pve_vmid_range, or destroy leftovers with `pytest --nested-destroy-only`"
    ) from refused


def _owner(host: PveHost, marker: Marker, settle: Deadline) -> str:
    """ "ours", "another's", "nobody's", "unfinished", or "unknown" when the host cannot be asked.

    A configuration that is only `lock: create` is awaited: it may become ours.
    """
    seen = "unknown"

    def decided() -> str | None:
        nonlocal seen
        try:
            config = guest_config(host.api, host.node, marker.vmid)
        except GuestNotFound:
            return "nobody's"
        except PveError:
            seen = "unknown"
            return None
        if is_bare(config):
            seen = "unfinished"
            return None
        same = uuid_of(config) == marker.uuid and parse_marker(config.get("description")) == marker
        return "ours" if same else "another's"

    try:
        return wait_until(decided, deadline=settle, what=f"the create of VM {marker.vmid}")
    except CommandTimeout:
        return seen


def free_ids(host: PveHost, settings: Settings) -> Iterator[int]:
    """Ids of the range that are free, each once, at random. Raises PveError.

    A free id is one without a guest, without a volume on a storage of the node, and in no pool.
    """
    used = {guest.vmid for guest in list_guests(host.api)} | ids_in_pools(host)
    path = f"/nodes/{host.node}/storage"
    for entry in entries(host.api.get(path), call=f"get {path}"):
        name = entry.get("storage")
        if not isinstance(name, str) or not STORAGE_NAME.match(name):
            raise UnreadableAnswer(f"expected the name of a storage, found {shown(name)}", call=f"get {path}")
        if "images" in str(entry.get("content", "")).split(",") and whole(entry.get("active", 1)) != 0:
            listed = host.api.get(f"{path}/{name}/content", content="images")
            used |= {whole(volume.get("vmid")) or 0 for volume in entries(listed, call=f"get {path}")}
    draw = random.SystemRandom()
    if sum(high - low + 1 for low, high in settings.vmid_ranges) <= _DRAWN:
        free = sorted({vmid for low, high in settings.vmid_ranges for vmid in range(low, high + 1)} - used)
        draw.shuffle(free)
        yield from free
        return
    # A range too large to list: nearly every id drawn is free.
    for _ in range(_DRAWN):
        vmid = draw.randint(*draw.choice(settings.vmid_ranges))
        if vmid not in used:
            used.add(vmid)
            yield vmid


def ids_in_pools(host: PveHost) -> set[int]:
    """The ids that pools list, with or without a guest: a VM of such an id would belong to that pool.

    The API shows members that exist; ids without a guest are in the file only (recorded on PVE 9.2).
    """
    answer = host.run(["cat", "--", "/etc/pve/user.cfg"], timeout=20)
    vmids: set[int] = set()
    for line in answer.stdout.splitlines() if answer.ok else ():
        kind, *fields = line.split(":")
        if kind == "pool" and len(fields) >= 3:
            vmids |= {
                int(part) for part in re.split(r"[,;\s]+", fields[2]) if part.isascii() and part.isdigit()
            }
    return vmids
