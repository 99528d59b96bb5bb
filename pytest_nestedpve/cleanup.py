"""What earlier runs left on a host, whether it may go, and its end: the plan behind --nested-destroy-only."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pytest_nestedpve import zombies
from pytest_nestedpve.audit import task_ids
from pytest_nestedpve.destroy import Outcome, destroy
from pytest_nestedpve.discovery import Candidate, discover
from pytest_nestedpve.ownership import (
    TAG,
    Lease,
    host_clock,
    in_range,
    marker_lines,
    name_matches,
    parse_lease,
    parse_marker,
    prove,
    run_of_pool,
)
from pytest_nestedpve.pve import guests
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import NotFound, PveError
from pytest_nestedpve.run import SessionLock, client_hash, owner
from pytest_nestedpve.teardown import clear_rest

if TYPE_CHECKING:
    from pytest_nestedpve.pve.guests import Guest
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.settings import Settings

WIDTH = 4
OLD = 7 * 24 * 3600
"""Seconds after which a VM without a marker is taken for somebody's own."""


@dataclass(frozen=True)
class Row:
    """One VM that may be somebody's left-over, or the pool of a run without VMs (`vmid` is None).

    `verdict` is "destroy" or "keep", with the `reason`. `ask`: it carries no marker, so somebody has to
    confirm. `owed`: it should be gone, but stays. Times: epoch seconds of the host's clock.
    """

    vmid: int | None
    node: str
    name: str
    run: str | None
    owner: str | None
    created: int | None
    expires: int | None
    verdict: str
    reason: str
    ask: bool = False
    owed: bool = False
    digest: str = ""
    pool: str | None = None
    bare: str | None = None

    def public(self, outcome: str) -> dict[str, Any]:
        """The row of --nested-json."""
        keys = ("vmid", "node", "name", "run", "owner", "created", "expires", "verdict", "reason")
        return {**{key: getattr(self, key) for key in keys}, "outcome": outcome}

    def kept(self, reason: str, *, owed: bool = True) -> Row:
        """The same, but it stays."""
        return replace(self, verdict="keep", reason=reason, owed=owed)


@dataclass(frozen=True)
class _RunPool:
    pool: str
    run: str
    lease: Lease | None


def plan(host: PveHost, settings: Settings, *, extra: Iterable[int] = ()) -> list[Row]:
    """What is on the host and what would become of it; touches nothing. Raises PveError.

    `settings.run_id` limits it to one run, which may then be another owner's. `extra` are ids of a context
    file: those without a marker fall under the rules for unmarked VMs, pattern and range waived.
    """
    now = host_clock(host)
    rows: list[Row] = []
    for each in _run_pools(host):
        if settings.run_id in (None, each.run):
            rows += _rows_of_run(host, settings, each, now)
    if settings.run_id is None:
        rows += _unowned(host, settings, {row.vmid for row in rows}, frozenset(extra), now)
    # What is only a lock may be any run's: it is told once, of the run whose task left it if that is known.
    bare = {row.vmid: row for row in sorted(rows, key=lambda row: row.verdict == "destroy") if row.bare}
    rows = [row for row in rows if not row.bare or bare[row.vmid] is row]
    return sorted(rows, key=lambda row: (row.vmid is None, row.vmid or 0, row.run or ""))


def execute(host: PveHost, settings: Settings, rows: Iterable[Row]) -> dict[Row, Outcome]:
    """Destroy the rows whose verdict that is, several at a time, each proved again; never raises."""
    chosen = [row for row in rows if row.verdict == "destroy"]
    by_run: dict[tuple[str, str], list[Row]] = {}
    for row in chosen:
        if row.run is not None and row.pool is not None:
            by_run.setdefault((row.run, row.pool), []).append(row)
    jobs: list[Callable[[], dict[Row, Outcome]]] = []
    width = WIDTH if len(by_run) <= 1 else 1
    for (run_id, pool), members in by_run.items():
        jobs.append(_bound(_end_run, host, _below(settings, pool), run_id, members, width))
    jobs += [_bound(_end_unmarked, host, settings, row) for row in chosen if row.run is None]
    outcomes: dict[Row, Outcome] = {}
    with ThreadPoolExecutor(max_workers=WIDTH, thread_name_prefix="cleanup") as workers:
        for found in workers.map(lambda job: job(), jobs):
            outcomes.update(found)
    return outcomes


def _bound(function: Callable[..., dict[Row, Outcome]], *args: Any) -> Callable[[], dict[Row, Outcome]]:
    return lambda: function(*args)


# -- marked: runs by their pools -----------------------------------------------------------------


def _run_pools(host: PveHost) -> list[_RunPool]:
    found = []
    for entry in entries(host.api.get("/pools"), call="get /pools"):
        run = run_of_pool(entry.get("poolid"))
        if run is not None:
            found.append(_RunPool(str(entry["poolid"]), run, parse_lease(entry.get("comment"))))
    return found


def _below(settings: Settings, pool: str) -> Settings:
    """The settings, for a run whose pool may have another parent than ours have."""
    return replace(settings, pool_parent=pool.rpartition("/")[0] or None)


def _rows_of_run(host: PveHost, settings: Settings, pool: _RunPool, now: int) -> list[Row]:
    verdict, reason = _verdict(pool, now, named=settings.run_id == pool.run)
    own = _below(settings, pool.pool)
    lease = pool.lease
    blank = Row(
        vmid=None,
        node=host.node,
        name=f"pool {pool.pool}",
        run=pool.run,
        owner=lease.owner if lease else None,
        created=lease.created if lease else None,
        expires=min(lease.expires, lease.hard) if lease else None,
        verdict=verdict,
        reason=reason,
        pool=pool.pool,
    )
    names = {guest.vmid: guest.name for guest in guests.list_guests(host.api)}
    rows = []
    for each in discover(host, own, pool.run):
        row = replace(
            blank,
            vmid=each.vmid,
            node=each.node,
            name=names.get(each.vmid) or f"VM {each.vmid}",
            bare=each.bare,
        )
        rows.append(_proved(host, own, row, each) if verdict == "destroy" else row)
    return rows or [blank]


def _proved(host: PveHost, settings: Settings, row: Row, candidate: Candidate) -> Row:
    if candidate.bare is not None:
        audit = settings.run_dir / str(row.run) / "audit.jsonl"
        found = zombies.remains(host, candidate.node, candidate.vmid, task_ids(audit))
        if found is not None:
            return replace(row, reason=found.reason) if found.ours else row.kept(found.reason, owed=False)
    proof = prove(host.api, settings, candidate, str(row.run))
    if proof.config is not None and isinstance(proof.config.get("name"), str):
        row = replace(row, name=proof.config["name"])
    if not proof.ok and not proof.gone:
        return row.kept(f"not proved to be the run's: {proof.reason}", owed=False)
    if proof.status not in ("", "stopped") and not settings.force_stop:
        return row.kept("it runs, and force_stop is off")
    return row


def _verdict(pool: _RunPool, now: int, *, named: bool) -> tuple[str, str]:
    """Whether a run may go, by its lease and by the lock of a session on this client."""
    lease, alive = pool.lease, SessionLock.alive(pool.run)
    if alive:
        return "keep", "a session on this machine is working on it"
    if lease is None:
        if named:
            return "destroy", "it was named, and its pool says nothing of an owner"
        return "keep", "its pool's comment is no lease; --nested-run names it"
    if lease.lapsed(now):
        return "destroy", f"its lease lapsed {_ago(now - min(lease.expires, lease.hard))} ago"
    mine = lease.client == client_hash() and lease.owner == owner()
    if mine and lease.state == "kept":
        return "destroy", "kept by you"
    if mine and alive is False:
        return "destroy", "its session on this machine is dead"
    if named:
        return "destroy", f"it was named; its owner is {lease.owner}"
    whose = "yours, but perhaps alive elsewhere" if mine else f"{lease.owner}'s"
    left = _ago(min(lease.expires, lease.hard) - now)
    return "keep", f"{lease.state} run, {whose}; its lease lasts {left} more; --nested-run names it"


def _ago(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _end_run(
    host: PveHost, settings: Settings, run_id: str, rows: list[Row], width: int
) -> dict[Row, Outcome]:
    found: dict[Row, Outcome] = {}
    try:
        audit = settings.run_dir / run_id / "audit.jsonl"
        machines = {row.vmid: row for row in rows if row.vmid is not None}
        candidates = [
            Candidate(row.vmid, row.node, row.reason, row.bare) for row in rows if row.vmid is not None
        ]
        for outcome in destroy(host, settings, run_id, candidates, ours=task_ids(audit), width=width):
            found[machines[outcome.vmid]] = outcome
        rest = clear_rest(host, settings, run_id)
        again = {each.vmid for each in discover(host, settings, run_id)}
        for row in rows:
            if row.vmid is None:
                found[row] = Outcome(0, row.node, "left" if rest else "gone", "; ".join(rest))
            elif row.vmid in again and found[row].result == "gone":
                found[row] = Outcome(row.vmid, row.node, "left", "found again afterwards")
            elif rest and found[row].result == "gone":
                found[row] = replace(found[row], result="left", reason="gone, but: " + "; ".join(rest))
    except Exception as e:
        for row in rows:
            found.setdefault(row, Outcome(row.vmid or 0, row.node, "left", f"{type(e).__name__}: {e}"))
    return found


# -- without a marker: rules that err on keeping ---------------------------------------------------


def _unowned(
    host: PveHost, settings: Settings, known: set[int | None], extra: frozenset[int], now: int
) -> list[Row]:
    rows = []
    jobs: _Jobs | None = None
    for guest in guests.list_guests(host.api):
        if guest.vmid in known:
            continue
        asked = guest.vmid in extra
        if not asked and (not in_range(settings, guest.vmid) or (settings.any_id and guest.kind != "qemu")):
            continue
        if not asked and guest.name is not None and not name_matches(settings, guest.name):
            continue
        jobs = jobs or _Jobs.read(host)
        row = _unowned_row(host, settings, guest, asked, jobs, now)
        if row is not None:
            rows.append(row)
    return rows


def _unowned_row(
    host: PveHost, settings: Settings, guest: Guest, asked: bool, jobs: _Jobs, now: int
) -> Row | None:
    row = Row(
        guest.vmid, guest.node, guest.name or f"VM {guest.vmid}", None, None, None, None, "keep", "", ask=True
    )
    if guest.kind != "qemu":
        return row.kept("it is a container", owed=False) if asked or guest.name else None
    try:
        config = guests.guest_config(host.api, guest.node, guest.vmid)
    except NotFound:
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
    """Who else counts on guests: backup jobs, replication, HA."""

    everything: bool
    listed: frozenset[int]

    @classmethod
    def read(cls, host: PveHost) -> _Jobs:
        everything, listed = False, set()
        for job in entries(host.api.get("/cluster/backup"), call="get /cluster/backup"):
            everything = everything or guests.cautious(job.get("all"))
            listed |= {
                int(part) for part in re.split(r"[,;\s]+", str(job.get("vmid") or "")) if part.isdigit()
            }
        for job in entries(host.api.get("/cluster/replication"), call="get /cluster/replication"):
            if str(job.get("guest") or "").isdigit():
                listed.add(int(job["guest"]))
        return cls(everything, frozenset(listed))


def _why_kept(host: PveHost, guest: Guest, config: Mapping[str, Any], jobs: _Jobs, now: int) -> str:
    """The first thing that speaks against destroying a VM without a marker; empty if nothing does."""
    cautious = guests.cautious
    status = host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/status/current")
    managed = status.get("ha") if isinstance(status, dict) else None
    created = _created(config)
    tags = [t for t in guests.read_tags(config.get("tags")) if t != TAG and not t.startswith("npve-")]
    snapshots = [
        each
        for each in entries(
            host.api.get(f"/nodes/{guest.node}/qemu/{guest.vmid}/snapshot"), call="get snapshots"
        )
        if each.get("name") != "current"
    ]
    reasons = (
        (cautious(config.get("template")), "it is a template"),
        (cautious(config.get("protection")), "it is protected"),
        (bool(config.get("lock")), f"it is locked ({config.get('lock')})"),
        (cautious(config.get("onboot")), "it starts with the host"),
        (guest.pool is not None, f"it is in the pool {guest.pool}"),
        (bool(snapshots), "it has snapshots"),
        (guest.vmid in jobs.listed, "a backup or replication job names it"),
        (jobs.everything, "a backup job takes all VMs"),
        (not isinstance(managed, dict) or cautious(managed.get("managed", 1)), "HA may manage it"),
        (bool(tags), f"it has the tag {tags[0] if tags else ''}"),
        (bool(str(config.get("description") or "").strip()), "it has a description"),
        (created is None, "its age is not known"),
        (created is not None and now - created > OLD, "it is older than 7 days"),
    )
    return next((text for holds, text in reasons if holds), "")


def _created(config: Mapping[str, Any]) -> int | None:
    match = re.search(r"(?:^|,)ctime=(\d{9,12})(?:,|$)", str(config.get("meta") or ""))
    return int(match[1]) if match else None


def _end_unmarked(host: PveHost, settings: Settings, row: Row) -> dict[Row, Outcome]:
    """Destroy a VM without a marker while its configuration is still the one that was judged."""
    assert row.vmid is not None

    def result(kind: str, reason: str = "") -> dict[Row, Outcome]:
        assert row.vmid is not None
        return {row: Outcome(row.vmid, row.node, kind, reason)}

    def unchanged() -> bool:
        found = guests.guest_config(host.api, row.node, row.vmid or 0)
        return bool(row.digest) and str(found.get("digest")) == row.digest

    try:
        if not unchanged():
            return result("foreign", "its configuration changed since it was judged")
        if guests.guest_status(host.api, row.node, row.vmid) != "stopped":
            if not settings.force_stop:
                return result("left", "it runs, and force_stop is off")
            guests.stop(host.api, row.node, row.vmid)
            if not unchanged():
                return result("foreign", "its configuration changed while it was stopped")
        # A delete is never sent to queue behind a task: what then has the id may be another VM.
        running = zombies.running_tasks(host.api, row.node, row.vmid)
        if running:
            return result("left", f"the task {running[0]} works on it")
        guests.destroy(host.api, row.node, row.vmid)
    except NotFound:
        return result("gone")
    except Exception as e:
        return result("left", f"{type(e).__name__}: {e}")
    return result("gone")
