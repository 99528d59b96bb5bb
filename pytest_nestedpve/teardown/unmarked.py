"""VMs without a marker that look like ours: rules that err on keeping, and their end."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.create import ids_in_pools
from pytest_nestedpve.ownership.marker import TAG, marker_lines, parse_marker
from pytest_nestedpve.ownership.pool import host_clock
from pytest_nestedpve.ownership.proof import in_range, name_matches
from pytest_nestedpve.pve import answers, qemu
from pytest_nestedpve.pve.answers import entries, whole
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import GuestNotFound, PveError
from pytest_nestedpve.teardown.destroy import Outcome
from pytest_nestedpve.teardown.plan_row import Row
from pytest_nestedpve.teardown.volumes import Volumes

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.pve.qemu import Guest

OLD = 7 * 24 * 3600
"""Seconds after which a VM without a marker is taken for somebody's own."""


def rows(
    host: PveHost, settings: Settings, known: set[int | None], extra: frozenset[int], now: int
) -> list[Row]:
    """The candidates that are in no run's pool (`known` are those that are) and what would become of each.

    Name and id make a candidate; for the ids in `extra` neither counts. `now` is the host's clock. Raises
    PveError.
    """
    found = []
    jobs: _Jobs | None = None
    for guest in qemu.list_guests(host.api):
        if guest.vmid in known:
            continue
        asked = guest.vmid in extra
        if not asked and (not in_range(settings, guest.vmid) or (settings.any_id and guest.kind != "qemu")):
            continue
        if not asked and guest.name is not None and not name_matches(settings, guest.name):
            continue
        jobs = jobs or _Jobs.read(host)
        row = _row(host, settings, guest, asked, jobs, now)
        if row is not None:
            found.append(row)
    return found


def _row(host: PveHost, settings: Settings, guest: Guest, asked: bool, jobs: _Jobs, now: int) -> Row | None:
    row = Row(
        guest.vmid, guest.node, guest.name or f"VM {guest.vmid}", None, None, None, None, "keep", "", ask=True
    )
    if guest.kind != "qemu":
        return row.kept("it is a container", owed=False) if asked or guest.name else None
    try:
        config = qemu.guest_config(host.api, guest.node, guest.vmid)
    except GuestNotFound:
        return None
    except PveError as e:
        return row.kept(f"its configuration cannot be read: {e}", owed=False)
    name = config.get("name")
    if not asked and not name_matches(settings, name):
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
    if settings.any_id and not asked:
        return None  # with the range `any` only marked VMs are candidates
    why = _why_kept(host, guest, config, jobs, now)
    if why:
        return row.kept(f"no marker, and {why}", owed=False)
    if not settings.force_stop and guest.status != "stopped":
        return row.kept("no marker; it runs, and force_stop is off")
    source = "named by the context file" if asked else "its name and id match"
    return replace(row, verdict="destroy", reason=f"no marker, but {source}")


@dataclass(frozen=True)
class _Jobs:
    """Who else counts on guests: backup jobs, replication, pools (of ids too that /cluster/resources, which
    is a broadcast, shows in none)."""

    everything: bool
    listed: frozenset[int]
    pooled: frozenset[int]

    @classmethod
    def read(cls, host: PveHost) -> _Jobs:
        everything, listed = False, set[int]()
        for job in entries(host.api.get("/cluster/backup"), call="get /cluster/backup", strict=True):
            ids = re.split(r"[,;\s]+", str(job["vmid"]).strip(",; ")) if job.get("vmid") else []
            named = [whole(part) for part in ids]
            # Neither a list of ids nor a pool (whose guests stay anyway): it may be about any guest.
            unclear = None in named or not (named or answers.text(job.get("pool")))
            everything = everything or unclear or qemu.protects(job, "all")
            listed |= {vmid for vmid in named if vmid is not None}
        call = "get /cluster/replication"
        for job in entries(host.api.get("/cluster/replication"), call=call, strict=True):
            vmid = whole(job.get("guest"))
            everything = everything or vmid is None
            listed |= {vmid} if vmid is not None else set()
        return cls(everything, frozenset(listed), frozenset(ids_in_pools(host)))


def _why_kept(host: PveHost, guest: Guest, config: Mapping[str, Any], jobs: _Jobs, now: int) -> str:
    """The first thing that speaks against destroying a VM without a marker; empty if nothing does."""
    protects = partial(qemu.protects, config)
    status = host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/status/current")
    managed = status.get("ha") if isinstance(status, dict) else None
    created = _created(config)
    tags = [t for t in qemu.read_tags(config.get("tags")) if t != TAG and not t.startswith("npve-")]
    snapshots = [
        each
        for each in entries(
            host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/snapshot"),
            call="get snapshots",
            strict=True,
        )
        if each.get("name") != "current"
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


def end(host: PveHost, settings: Settings, row: Row) -> Outcome:
    """Destroy the VM of a row if all that was judged still holds, each time before it is touched; its volumes
    are looked for afterwards. Never raises."""
    assert row.vmid is not None
    try:
        volumes = Volumes(host.api)
        outcome = _end(host, settings, row, row.vmid, volumes)
        for _, stays in volumes.sweep({row.vmid: row.node} if outcome.result == "gone" else {}):
            return replace(outcome, result="left", reason=stays)
        return outcome
    except Exception as e:
        return Outcome(row.vmid, row.node, "left", f"{type(e).__name__}: {e}")


def _end(host: PveHost, settings: Settings, row: Row, vmid: int, volumes: Volumes) -> Outcome:
    def outcome(result: str, reason: str = "") -> Outcome:
        return Outcome(vmid, row.node, result, reason)

    volumes.look(row.node)
    try:
        volumes.note(row.node, vmid, _as_judged(host, row, vmid), marked=False)
        if qemu.guest_status(host.api, row.node, vmid) != "stopped":
            if not settings.force_stop:
                return outcome("left", "it runs, and force_stop is off")
            qemu.stop(host.api, row.node, vmid)
        # A delete is never sent to queue behind a task: what then has the id may be another VM.
        running = killed_tasks.running_tasks(host.api, row.node, vmid)
        if running:
            return outcome("left", f"the task {running[0]} works on it")
        # Nothing is between this and the call.
        _as_judged(host, row, vmid)
        qemu.destroy(host.api, row.node, vmid)
        # Its task ended well; the configuration says whether it is gone, and may be another VM's by now.
        after = qemu.guest_config(host.api, row.node, vmid)
    except _NotAsJudged as e:
        return outcome("foreign", str(e))
    except GuestNotFound:
        there = node_of(host.api, vmid)
        return outcome("gone") if there is None else outcome("foreign", f"its id is on {there} now")
    if str(after.get("digest")) == row.digest:
        return outcome("left", "its destroy ended well, and yet it is there")
    return outcome("gone")


class _NotAsJudged(Exception):
    """Something about the VM has changed that speaks for keeping it."""


def _as_judged(host: PveHost, row: Row, vmid: int) -> Mapping[str, Any]:
    """The configuration, when nothing has changed. Pools, jobs and HA are not in its digest: they are asked
    again, the configuration last. Raises _NotAsJudged, GuestNotFound, PveError."""
    guest = next((each for each in qemu.list_guests(host.api) if each.vmid == vmid), None)
    if guest is not None and (guest.kind, guest.node) != ("qemu", row.node):
        raise _NotAsJudged(f"its id is a {guest.kind} guest on {guest.node} now")
    jobs, now = _Jobs.read(host), host_clock(host)
    config = qemu.guest_config(host.api, row.node, vmid)
    if guest is None:
        raise _NotAsJudged("the host lists no such guest, and yet it has a configuration")
    why = _why_kept(host, guest, config, jobs, now)
    if why:
        raise _NotAsJudged(f"since it was judged, {why}")
    if not row.digest or str(qemu.guest_config(host.api, row.node, vmid).get("digest")) != row.digest:
        raise _NotAsJudged("its configuration changed since it was judged")
    return config
