"""VMs without a marker whose name and id match: the rules, which keep a VM in doubt, and the destruction."""

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

MAX_AGE = 7 * 24 * 3600
"""Seconds of age from which a VM without a marker is kept."""


def rows(
    host: PveHost, settings: Settings, excluded: set[int | None], extra: frozenset[int], now: int
) -> list[Row]:
    """A row for each VM whose name and id match ours, except `excluded`, the ids in pools of runs.

    An id in `extra` is a candidate with any name. `now` is the host's clock, epoch seconds. Raises PveError.
    """
    candidates = []
    jobs: _Jobs | None = None
    for guest in qemu.list_guests(host.api):
        if guest.vmid in excluded:
            continue
        is_extra = guest.vmid in extra
        if not is_extra and (
            not in_range(settings, guest.vmid) or (settings.any_id and guest.kind != "qemu")
        ):
            continue
        if not is_extra and guest.name is not None and not name_matches(settings, guest.name):
            continue
        jobs = jobs or _Jobs.read(host)
        row = _row(host, settings, guest, is_extra, jobs, now)
        if row is not None:
            candidates.append(row)
    return candidates


def _row(
    host: PveHost, settings: Settings, guest: Guest, is_extra: bool, jobs: _Jobs, now: int
) -> Row | None:
    label = guest.name or f"VM {guest.vmid}"
    row = Row(guest.vmid, guest.node, label, None, None, None, None, "keep", "", needs_confirmation=True)
    if guest.kind != "qemu":
        return row.kept("it is a container", is_leftover=False) if is_extra or guest.name else None
    try:
        config = qemu.guest_config(host.api, guest.node, guest.vmid)
    except GuestNotFound:
        return None
    except PveError as e:
        return row.kept(f"its configuration cannot be read: {e}", is_leftover=False)
    name = config.get("name")
    if not is_extra and not name_matches(settings, name):
        return None
    row = replace(
        row, name=str(name or row.name), digest=str(config.get("digest") or ""), created=_created(config)
    )
    marker = parse_marker(config.get("description"))
    if marker is not None:
        return replace(row, run=marker.run).kept(
            f"its marker names run {marker.run}, but it is not in that run's pool", is_leftover=False
        )
    if marker_lines(config.get("description")):
        return row.kept("its marker is malformed", is_leftover=False)
    if settings.any_id and not is_extra:
        return None  # with the range `any` only marked VMs are candidates
    reason = _find_reason_to_keep(host, guest, config, _read_status(host, guest), jobs, now)
    if reason:
        return row.kept(f"no marker, and {reason}", is_leftover=False)
    if not settings.force_stop and guest.status != "stopped":
        return row.kept("no marker; it runs, and force_stop is off")
    source = "the context file names it" if is_extra else "its name and id match"
    return replace(row, verdict="destroy", reason=f"no marker, but {source}")


@dataclass(frozen=True)
class _Jobs:
    """Guests in use: `listed` by backup or replication jobs (`everything`: a job may include any guest), and
    `pooled`, members of pools, read from the file: /cluster/resources is a broadcast and may lack them."""

    everything: bool
    listed: frozenset[int]
    pooled: frozenset[int]

    @classmethod
    def read(cls, host: PveHost) -> _Jobs:
        everything, listed = False, set[int]()
        for job in entries(host.api.get("/cluster/backup"), call="get /cluster/backup", strict=True):
            ids = re.split(r"[,;\s]+", str(job["vmid"]).strip(",; ")) if job.get("vmid") else []
            vmids = [whole(part) for part in ids]
            # Neither a list of ids nor a pool (whose guests are kept anyway): the job may include any guest.
            unclear = None in vmids or not (vmids or answers.text(job.get("pool")))
            everything = everything or unclear or qemu.protects(job, "all")
            listed |= {vmid for vmid in vmids if vmid is not None}
        call = "get /cluster/replication"
        for job in entries(host.api.get("/cluster/replication"), call=call, strict=True):
            vmid = whole(job.get("guest"))
            everything = everything or vmid is None
            listed |= {vmid} if vmid is not None else set()
        return cls(everything, frozenset(listed), frozenset(ids_in_pools(host)))


def _read_status(host: PveHost, guest: Guest) -> object:
    return host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/status/current")


def _find_reason_to_keep(
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
        (protects("onboot"), "it starts at boot of the host"),
        (guest.pool is not None, f"it is in the pool {guest.pool}"),
        (guest.vmid in jobs.pooled, "it is in a pool"),
        (bool(snapshots), "it has snapshots"),
        (guest.vmid in jobs.listed, "a backup or replication job names it"),
        (jobs.everything, "a backup job includes all VMs"),
        (
            not isinstance(managed, dict) or "managed" not in managed or qemu.protects(managed, "managed"),
            "HA may manage it",
        ),
        (bool(tags), f"it has the tag {tags[0] if tags else ''}"),
        (not isinstance(config.get("tags", ""), str), "its tags cannot be read"),
        (protects("description"), "it has a description"),
        (created is None, "its age is unknown"),
        (created is not None and now - created > MAX_AGE, "it is older than 7 days"),
    )
    return next((text for holds, text in reasons if holds), "")


def _created(config: Mapping[str, Any]) -> int | None:
    match = re.search(r"(?:^|,)ctime=(\d{9,12})(?:,|$)", str(config.get("meta") or ""))
    return int(match[1]) if match else None


def destroy_unmarked(host: PveHost, settings: Settings, row: Row) -> Outcome:
    """Destroy the VM of a row in one attempt, if it is unchanged since the verdict. Never raises."""
    assert row.vmid is not None
    vm = Candidate(row.vmid, row.node, row.reason)
    return destroy(host, UnmarkedProver(host, row.digest), [vm], force_stop=settings.force_stop)[0]


@dataclass(frozen=True)
class UnmarkedProver:
    """Proves that a VM without a marker is unchanged since the plan, by the `digest` of its configuration.

    That digest does not cover pools, jobs and HA: each proof reads them anew, and the configuration last.
    """

    host: PveHost
    digest: str
    own_tasks: frozenset[str] | None = None
    retries: bool = False

    def prove(self, vm: Located) -> Proof:
        """Apply the rules once more; a VM that moved to another node is not proved. Raises PveError."""
        api = self.host.api
        guest = next((guest for guest in qemu.list_guests(api) if guest.vmid == vm.vmid), None)
        if guest is not None and (guest.kind, guest.node) != ("qemu", vm.node):
            return _refuse(f"a {guest.kind} guest on {guest.node}")
        jobs, now = _Jobs.read(self.host), host_clock(self.host)
        try:
            config = qemu.guest_config(api, vm.node, vm.vmid)
            if guest is None:
                return Proof(False, "the host does not list it, but its configuration exists")
            status = _read_status(self.host, guest)
            cause = _find_reason_to_keep(self.host, guest, config, status, jobs, now)
            digest = str(qemu.guest_config(api, vm.node, vm.vmid).get("digest") or "")
        except GuestNotFound:
            node = node_of(api, vm.vmid)
            return Proof(False, "the VM does not exist", gone=True) if node is None else _refuse(f"on {node}")
        reason = f"since the plan, {cause}" if cause else ""
        if not reason and (not self.digest or digest != self.digest):
            reason = "its configuration changed since the plan"
        power = status.get("status") if isinstance(status, dict) else None
        if not reason and (not isinstance(power, str) or not power):
            raise UnreadableAnswer(f"expected the status of VM {vm.vmid}, found {shown(status)}")
        return Proof(not reason, reason, status=str(power), identity=digest, config=config)


def _refuse(what: str) -> Proof:
    """A proof that fails: the id belongs to another guest now."""
    return Proof(False, f"its id is now {what}", identity=what)
