"""VMs without a marker that look like ours: the rules, which keep in doubt, and their destruction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.create import ids_in_pools
from pytest_nestedpve.ownership.discover import Candidate
from pytest_nestedpve.ownership.marker import TAG, marker_lines, parse_marker
from pytest_nestedpve.ownership.pool import host_clock
from pytest_nestedpve.ownership.proof import Proof, in_range, name_matches
from pytest_nestedpve.pve import answers, qemu
from pytest_nestedpve.pve.answers import entries, shown, whole
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import GuestNotFound, PveError, UnreadableAnswer
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.plan_row import Row

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.ownership.proof import Located
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.qemu import Guest

OLD = 7 * 24 * 3600
"""Seconds of age from which a VM without a marker is kept."""


def rows(
    host: PveHost, settings: Settings, known: set[int | None], extra: frozenset[int], now: int
) -> list[Row]:
    """A row for each VM that looks like ours and is in no run's pool (`known` are the ids that are).

    It looks like ours by name and id; an id in `extra` is a candidate whatever its name. `now` is the host's
    clock, epoch seconds. Raises PveError.
    """
    candidates = []
    jobs: _Jobs | None = None
    for guest in qemu.list_guests(host.api):
        if guest.vmid in known:
            continue
        named = guest.vmid in extra
        if not named and (not in_range(settings, guest.vmid) or (settings.any_id and guest.kind != "qemu")):
            continue
        if not named and guest.name is not None and not name_matches(settings, guest.name):
            continue
        jobs = jobs or _Jobs.read(host)
        row = _row(host, settings, guest, named, jobs, now)
        if row is not None:
            candidates.append(row)
    return candidates


def _row(host: PveHost, settings: Settings, guest: Guest, named: bool, jobs: _Jobs, now: int) -> Row | None:
    row = Row(
        guest.vmid, guest.node, guest.name or f"VM {guest.vmid}", None, None, None, None, "keep", "", ask=True
    )
    if guest.kind != "qemu":
        return row.kept("it is a container", owed=False) if named or guest.name else None
    try:
        config = qemu.guest_config(host.api, guest.node, guest.vmid)
    except GuestNotFound:
        return None
    except PveError as e:
        return row.kept(f"its configuration cannot be read: {e}", owed=False)
    name = config.get("name")
    if not named and not name_matches(settings, name):
        return None
    row = replace(
        row, name=str(name or row.name), digest=str(config.get("digest") or ""), created=_created(config)
    )
    marker = parse_marker(config.get("description"))
    if marker is not None:
        return replace(row, run=marker.run).kept(
            f"its marker names run {marker.run}, but it is not in that run's pool", owed=False
        )
    if marker_lines(config.get("description")):
        return row.kept("its marker is malformed", owed=False)
    if settings.any_id and not named:
        return None  # with the range `any` only marked VMs are candidates
    why = _why_kept(host, guest, config, _status(host, guest), jobs, now)
    if why:
        return row.kept(f"no marker, and {why}", owed=False)
    if not settings.force_stop and guest.status != "stopped":
        return row.kept("no marker; it runs, and force_stop is off")
    source = "named by the context file" if named else "its name and id match"
    return replace(row, verdict="destroy", reason=f"no marker, but {source}")


@dataclass(frozen=True)
class _Jobs:
    """Guests that others depend on: `listed` by backup or replication jobs (`everything`: a job may mean any
    guest), and `pooled` (by the file: /cluster/resources, a broadcast, may show no pool)."""

    everything: bool
    listed: frozenset[int]
    pooled: frozenset[int]

    @classmethod
    def read(cls, host: PveHost) -> _Jobs:
        everything, listed = False, set[int]()
        for job in entries(host.api.get("/cluster/backup"), call="get /cluster/backup", strict=True):
            ids = re.split(r"[,;\s]+", str(job["vmid"]).strip(",; ")) if job.get("vmid") else []
            vmids = [whole(part) for part in ids]
            # Neither a list of ids nor a pool (whose guests are kept anyway): the job may mean any guest.
            unclear = None in vmids or not (vmids or answers.text(job.get("pool")))
            everything = everything or unclear or qemu.protects(job, "all")
            listed |= {vmid for vmid in vmids if vmid is not None}
        call = "get /cluster/replication"
        for job in entries(host.api.get("/cluster/replication"), call=call, strict=True):
            vmid = whole(job.get("guest"))
            everything = everything or vmid is None
            listed |= {vmid} if vmid is not None else set()
        return cls(everything, frozenset(listed), frozenset(ids_in_pools(host)))


def _status(host: PveHost, guest: Guest) -> object:
    return host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/status/current")


def _why_kept(
    host: PveHost, guest: Guest, config: Mapping[str, Any], status: object, jobs: _Jobs, now: int
) -> str:
    """The first reason to keep a VM without a marker; empty if there is none."""
    protects = partial(qemu.protects, config)
    managed = status.get("ha") if isinstance(status, dict) else None
    created = _created(config)
    tags = [t for t in qemu.read_tags(config.get("tags")) if t != TAG and not t.startswith("npve-")]
    snapshots = [
        snapshot
        for snapshot in entries(
            host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/snapshot"),
            call="get snapshots",
            strict=True,
        )
        if snapshot.get("name") != "current"
    ]
    reasons = (
        (protects("template"), "it is a template"),
        (protects("protection"), "it is protected"),
        (protects("lock"), f"it is locked ({config.get('lock')})"),
        (protects("onboot"), "it starts with the host"),
        (guest.pool is not None, f"it is in the pool {guest.pool}"),
        (guest.vmid in jobs.pooled, "it is in a pool"),
        (bool(snapshots), "it has snapshots"),
        (guest.vmid in jobs.listed, "a backup or replication job names it"),
        (jobs.everything, "a backup job takes all VMs"),
        (
            not isinstance(managed, dict) or "managed" not in managed or qemu.protects(managed, "managed"),
            "HA may manage it",
        ),
        (bool(tags), f"it has the tag {tags[0] if tags else ''}"),
        (not isinstance(config.get("tags", ""), str), "its tags are not readable"),
        (protects("description"), "it has a description"),
        (created is None, "its age is not known"),
        (created is not None and now - created > OLD, "it is older than 7 days"),
    )
    return next((text for holds, text in reasons if holds), "")


def _created(config: Mapping[str, Any]) -> int | None:
    match = re.search(r"(?:^|,)ctime=(\d{9,12})(?:,|$)", str(config.get("meta") or ""))
    return int(match[1]) if match else None


def destroy_unmarked(host: PveHost, settings: Settings, row: Row) -> Outcome:
    """Destroy the VM of a row in one attempt, if everything that was judged is still true. Never raises."""
    assert row.vmid is not None
    vm = Candidate(row.vmid, row.node, row.reason)
    return destroy(host, UnmarkedProver(host, row.digest), [vm], force_stop=settings.force_stop)[0]


@dataclass(frozen=True)
class UnmarkedProver:
    """Proves that a VM without a marker is as it was judged, by the `digest` of its configuration then.

    Pools, jobs and HA are not in that digest: they are read again each time, the configuration last.
    """

    host: PveHost
    digest: str
    own_tasks: frozenset[str] | None = None
    retries: bool = False

    def prove(self, vm: Located) -> Proof:
        """Judge the VM again; it is not followed to another node. Raises PveError."""
        api = self.host.api
        guest = next((guest for guest in qemu.list_guests(api) if guest.vmid == vm.vmid), None)
        if guest is not None and (guest.kind, guest.node) != ("qemu", vm.node):
            return _elsewhere(f"a {guest.kind} guest on {guest.node}")
        jobs, now = _Jobs.read(self.host), host_clock(self.host)
        try:
            config = qemu.guest_config(api, vm.node, vm.vmid)
            if guest is None:
                return Proof(False, "the host lists no such guest, and yet it has a configuration")
            status = _status(self.host, guest)
            why = _why_kept(self.host, guest, config, status, jobs, now)
            digest = str(qemu.guest_config(api, vm.node, vm.vmid).get("digest") or "")
        except GuestNotFound:
            node = node_of(api, vm.vmid)
            return (
                Proof(False, "there is no such VM", gone=True) if node is None else _elsewhere(f"on {node}")
            )
        reason = f"since it was judged, {why}" if why else ""
        if not reason and (not self.digest or digest != self.digest):
            reason = "its configuration changed since it was judged"
        power = status.get("status") if isinstance(status, dict) else None
        if not reason and (not isinstance(power, str) or not power):
            raise UnreadableAnswer(f"expected the status of VM {vm.vmid}, found {shown(status)}")
        return Proof(not reason, reason, status=str(power), identity=digest, config=config)


def _elsewhere(what: str) -> Proof:
    """The id belongs to another guest now."""
    return Proof(False, f"its id is {what} now", identity=what)
