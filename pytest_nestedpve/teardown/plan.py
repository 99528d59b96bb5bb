"""What earlier runs left on a host, whether it may go, and its end: the plan behind --nested-destroy-only."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.lease import Lease, parse_lease
from pytest_nestedpve.ownership.pool import host_clock, pool_name, run_of_pool
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import NodeUnreachable
from pytest_nestedpve.pve.parallel import in_parallel
from pytest_nestedpve.run import kept_runs, old_runs
from pytest_nestedpve.run.audit_log import task_ids
from pytest_nestedpve.run.identity import client_hash, owner
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.teardown import templates, unmarked
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.leftovers import clear_rest
from pytest_nestedpve.teardown.plan_row import Row

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost

WIDTH = 4


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
    rows += templates.rows(host, settings)
    if settings.run_id is None:
        rows += unmarked.rows(host, settings, {row.vmid for row in rows}, frozenset(extra), now)
    # What is only a lock may be any run's: it is told once, of the run whose task left it if that is known.
    bare = {row.vmid: row for row in sorted(rows, key=lambda row: row.verdict == "destroy") if row.bare}
    rows = [row for row in rows if not row.bare or bare[row.vmid] is row]
    return sorted(rows, key=lambda row: (row.vmid is None, row.vmid or 0, row.run or ""))


def execute(
    host: PveHost,
    settings: Settings,
    rows: Iterable[Row],
    told: Callable[[Row, Outcome], None] | None = None,
) -> dict[Row, Outcome]:
    """Destroy the rows whose verdict that is, several at a time, each proved again; never fails for one.

    `told` hears of each as soon as its end is known, in the thread that brought it about.
    """
    chosen = [row for row in rows if row.verdict == "destroy"]
    by_run: dict[tuple[str, str], list[Row]] = {}
    own = [row for row in chosen if templates.NAME.match(str(row.run))]
    for row in chosen:
        if row.run is not None and row.pool is not None and row not in own:
            by_run.setdefault((row.run, row.pool), []).append(row)
    width = WIDTH if len(by_run) <= 1 else 1
    jobs: list[Callable[[], dict[Row, Outcome]]] = [
        partial(_end_run, host, _below(settings, pool), run_id, members, width)
        for (run_id, pool), members in by_run.items()
    ]
    jobs += [partial(_end_template, host, settings, row) for row in own]
    jobs += [partial(_end_unmarked, host, settings, row) for row in chosen if row.run is None]
    outcomes: dict[Row, Outcome] = {}

    def work(job: Callable[[], dict[Row, Outcome]]) -> None:
        for row, outcome in job().items():
            outcomes[row] = outcome
            if told is not None:
                told(row, outcome)

    in_parallel(work, jobs, WIDTH)
    return outcomes


def _end_template(host: PveHost, settings: Settings, row: Row) -> dict[Row, Outcome]:
    return {row: templates.destroy_template(host, _below(settings, str(row.pool)), row)}


def _end_unmarked(host: PveHost, settings: Settings, row: Row) -> dict[Row, Outcome]:
    return {row: unmarked.destroy_unmarked(host, settings, row)}


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
    names = {guest.vmid: guest.name for guest in qemu.list_guests(host.api)}
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
        found = killed_tasks.find_leftover(host, candidate.node, candidate.vmid, task_ids(audit))
        if found is not None:
            return (
                replace(row, reason=found.reason)
                if found.ours
                else row.kept(found.reason, owed=candidate.pooled)
            )
    try:
        proof = prove(host.api, settings, candidate, str(row.run))
    except NodeUnreachable as e:
        return row.kept(f"its node {candidate.node} cannot be reached: {e.text}")
    row = replace(row, node=proof.node)
    if proof.config is not None and isinstance(proof.config.get("name"), str):
        row = replace(row, name=proof.config["name"])
    if not proof.ok and not proof.gone:
        # Whoever's it is: with it the run's pool stays, and a session's own teardown calls that left.
        return row.kept(f"not proved to be the run's: {proof.reason}", owed=candidate.pooled)
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
    host = host.within(lambda: pool_name(settings, run_id))
    try:
        audit = settings.run_dir / run_id / "audit.jsonl"
        machines = {row.vmid: row for row in rows if row.vmid is not None}
        candidates = [
            Candidate(row.vmid, row.node, row.reason, row.bare) for row in rows if row.vmid is not None
        ]
        prover = RunProver(host.api, settings, run_id, task_ids(audit))
        force_stop = settings.force_stop
        for outcome in destroy(host, prover, candidates, force_stop=force_stop, width=width):
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
    if all(each.result == "gone" for each in found.values()):
        kept_runs.forget(run_id)
        old_runs.note_over(settings.run_dir / run_id, host.name)
    return found
