"""The proof that a VM belongs to a run, from what the host reports now.

Sources for what PVE does are recordings of PVE 9.2 (pools, clones, reused ids) made for this project.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import (
    GuestNotFound,
    PveError,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.qemu import cautious, path_of, protects
from pytest_nestedpve.run.identity import RUN_ID, Run

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

from pytest_nestedpve.ownership.marker import marker_lines, parse_marker, uuid_of
from pytest_nestedpve.ownership.pool import pool_name, read_pool, run_of_pool

_MOVES = 4  # nodes on which a VM is looked for, one after the other, while it is being moved


class Located(Protocol):
    """Anything that says which guest is meant."""

    @property
    def vmid(self) -> int: ...

    @property
    def node(self) -> str: ...


@dataclass(frozen=True)
class Proof:
    """Whether a VM is this run's, by what its configuration, status and pool said just now.

    `reason` says why not; `gone`: there is no such VM; `unreadable`: PVE refuses to print it.
    `marked`: its marker is this run's, this VM's and this uuid's, whatever else speaks against it.
    `status` is PVE's; `lock` the lock property; `config` the configuration proved. `node` is where the VM
    was found, or looked for last: it may have been moved.
    """

    ok: bool
    reason: str
    config_digest: str = ""
    status: str = ""
    lock: str | None = None
    uuid: str = ""
    config: Mapping[str, Any] | None = None
    gone: bool = False
    unreadable: bool = False
    marked: bool = False
    node: str = ""


def prove(api: Api, settings: Settings, guest: Located, run: Run | str, *, pool: str | None = None) -> Proof:
    """Read configuration, status and pool of `guest` and judge. Never raises for a VM that is not ours.

    Raises PveError when the host cannot be asked: then nothing is proved either.
    `pool`: the pool's full name where it is known from discovery (another `pool_parent`).
    """
    run_id = run if isinstance(run, str) else run.id
    name = pool if pool is not None and run_of_pool(pool) == run_id else pool_name(settings, run_id)
    node = guest.node
    for _ in range(_MOVES):
        found = replace(_prove_at(api, settings, node, guest.vmid, run_id, name), node=node)
        if not found.gone:
            return found
        # No configuration on that node: it is gone only if it is on no other one either.
        there = node_of(api, guest.vmid)
        if there is None or there == node:
            return found
        node = there
    raise PveError(f"VM {guest.vmid} was on another node each time it was looked for, last on {node}")


def _prove_at(api: Api, settings: Settings, node: str, vmid: int, run_id: str, name: str) -> Proof:
    base = path_of(node, vmid)
    members = read_pool(api, name)
    try:
        # The configuration last: what is read of it is the youngest when the blow follows.
        status = api.get(f"{base}/status/current")
        config = api.get(f"{base}/config", current=1)
    except GuestNotFound:
        return Proof(False, "there is no such VM", gone=True)
    except UnreadableAnswer as e:
        # `lock: destroyed`, or written by hand: pvesh refuses to print such a configuration.
        return Proof(False, f"its configuration is not readable: {e.text}", unreadable=True)
    found = judge(settings, vmid, run_id, config, status)
    if (
        found.ok
        and members is not None
        and vmid in members.vmids
        and ("qemu", vmid, node) not in members.members
    ):
        members = read_pool(api, name)  # moved between the two answers
    if found.ok and members is None:
        return replace(found, ok=False, reason=f"the pool {name} does not exist")
    if found.ok and members is not None and ("qemu", vmid, node) not in members.members:
        return replace(found, ok=False, reason=f"it is not in the pool {name}")
    return found


def judge(settings: Settings, vmid: int, run_id: str, config: object, status: object) -> Proof:
    """The part of the proof that needs no host: every condition on configuration and status."""
    if not isinstance(config, dict) or not isinstance(status, dict):
        return Proof(False, "its configuration is not readable")
    lock = config.get("lock") or status.get("lock")
    found = Proof(
        True,
        "",
        config_digest=str(config.get("digest") or ""),
        status=str(
            status.get("qmpstatus") if status.get("qmpstatus") == "paused" else status.get("status") or ""
        ),
        lock=str(lock) if lock else None,
        uuid=uuid_of(config) or "",
        config=config,
    )
    copied = _unmarked(vmid, run_id, config)
    reason = copied or _against(settings, vmid, config, status)
    return replace(found, ok=not reason, reason=reason, marked=not copied)


def _unmarked(vmid: int, run_id: str, config: dict[str, Any]) -> str:
    """What is wrong with the marker; empty if it is this run's, this VM's and this uuid's."""
    marker = parse_marker(config.get("description"))
    if not RUN_ID.match(run_id):
        return f"{run_id[:40]!r} is no run"
    if marker is None:
        return "its marker is malformed" if marker_lines(config.get("description")) else "it has no marker"
    if marker.run != run_id:
        return f"its marker names another run, {marker.run}"
    if marker.vmid != vmid:
        return f"its marker names another VM, {marker.vmid}: it is a copy"
    uuid = uuid_of(config)
    if uuid is None or uuid != marker.uuid:
        return "its SMBIOS uuid is not the one in its marker: it is a copy, or another VM"
    return ""


def _against(settings: Settings, vmid: int, config: dict[str, Any], status: dict[str, Any]) -> str:
    """What speaks against taking a VM of ours away."""
    if not in_range(settings, vmid):
        return "its id is outside the range"
    if not name_matches(settings, config.get("name")):
        return f"its name {str(config.get('name'))[:60]!r} does not match the pattern"
    if protects(config, "template") or protects(status, "template"):
        return "it is a template"
    if protects(config, "protection"):
        return "it is protected"
    managed = status.get("ha")
    if not isinstance(managed, dict) or _set(managed.get("managed", 1)):
        return "it is managed by HA" if isinstance(managed, dict) else "whether HA manages it is not known"
    return ""


def _set(value: object) -> bool:
    """A PVE boolean; everything but a plain no is a yes, also what is there and says nothing."""
    return value is None or cautious(value)


def in_range(settings: Settings, vmid: int) -> bool:
    return any(low <= vmid <= high for low, high in settings.vmid_ranges)


def name_matches(settings: Settings, name: object) -> bool:
    return isinstance(name, str) and any(fnmatch.fnmatchcase(name, p) for p in settings.name_patterns)
