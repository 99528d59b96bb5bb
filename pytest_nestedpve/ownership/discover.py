"""Discovery: the guests of a host that may belong to a run, by pool, by range and name, by marker."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.killed_tasks import bare_lock, is_bare
from pytest_nestedpve.ownership.marker import parse_marker
from pytest_nestedpve.ownership.pool import pool_name, read_pool
from pytest_nestedpve.ownership.proof import in_range, name_matches
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import GuestNotFound, NodeUnreachable, UnreadableAnswer
from pytest_nestedpve.pve.qemu import Guest, guest_config, list_guests

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost


@dataclass(frozen=True)
class Candidate:
    """A VM that may be the run's, with the reason `why`. A `Prover` decides whether it is.

    `bare` is the lock of a configuration that is only that lock: of a create or a destroy that was killed, or
    that still works. `pooled`: it is in the run's pool, which cannot be removed before it.
    """

    vmid: int
    node: str
    why: str
    bare: str | None = None
    pooled: bool = False


def discover(host: PveHost, settings: Settings, run_id: str, extra: Iterable[int] = ()) -> list[Candidate]:
    """The candidates of one run, by id. `extra` are further ids to examine (of a context file).

    /cluster/resources is a broadcast up to ten seconds old in which a new VM has no name (recorded on
    PVE 9.2), so the configuration of every entry in range is read unless its name speaks against it.
    Raises PveError when the host cannot be asked.
    """
    candidates: dict[int, Candidate] = {}
    pool = read_pool(host.api, pool_name(settings, run_id))
    for kind, vmid, node in pool.members if pool is not None else ():
        if kind == "qemu":
            try:
                bare = bare_lock(host, node, vmid)
            except NodeUnreachable:
                bare = None  # reported when it is destroyed; other candidates do not wait for it
            candidates[vmid] = Candidate(vmid, node, "it is in the run's pool", bare, pooled=True)
    extra_ids = set(extra)
    for guest in list_guests(host.api):
        if guest.kind != "qemu" or guest.vmid in candidates:
            continue
        if not in_range(settings, guest.vmid) and guest.vmid not in extra_ids:
            continue
        if guest.name is not None and not name_matches(settings, guest.name) and guest.vmid not in extra_ids:
            continue
        try:
            guest, config = _config(host, guest)
        except (GuestNotFound, NodeUnreachable):
            # Guests of a node that is off, or was removed from the cluster, are still listed (recorded);
            # those of the run are in its pool.
            continue
        except UnreadableAnswer:
            config = {}
        marker = parse_marker(config.get("description"))
        if marker is not None and marker.run == run_id:
            candidates[guest.vmid] = Candidate(guest.vmid, guest.node, "its marker names the run")
        elif not config or is_bare(config):
            lock = bare_lock(host, guest.node, guest.vmid)
            if lock is not None:
                why = f"its configuration is only a lock ({lock})"
                candidates[guest.vmid] = Candidate(guest.vmid, guest.node, why, lock)
    return [candidates[vmid] for vmid in sorted(candidates)]


def _config(host: PveHost, guest: Guest) -> tuple[Guest, dict[str, Any]]:
    """The guest on its current node, and its configuration: it may have been moved since it was listed."""
    try:
        return guest, guest_config(host.api, guest.node, guest.vmid)
    except GuestNotFound:
        node = node_of(host.api, guest.vmid)
        if node is None or node == guest.node:
            raise
        return replace(guest, node=node), guest_config(host.api, node, guest.vmid)
