"""The plan of --nested-destroy-only: a verdict on each leftover of earlier runs, and the execution."""

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
from pytest_nestedpve.teardown.leftovers import delete_leftovers
from pytest_nestedpve.teardown.plan_row import Row

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost

WIDTH = 4
"""Leftovers destroyed at a time."""


@dataclass(frozen=True)
class _RunPool:
    pool: str
    run: str
    lease: Lease | None


def plan(host: PveHost, settings: Settings, *, extra: Iterable[int] = ()) -> list[Row]:
    """A row with a verdict for each leftover on the host; touches nothing. Raises PveError.

    `settings.run_id` limits it to one run, which may then be another owner's. `extra` are ids of a context
    file: a VM without a marker is judged by the rules of `unmarked`, with any name and id.
    """
    now = host_clock(host)
    rows: list[Row] = []
    for pool in _run_pools(host):
        if settings.run_id in (None, pool.run):
            rows += _rows_of_run(host, settings, pool, now)
    rows += templates.rows(host, settings)
    if settings.run_id is None:
        rows += unmarked.rows(host, settings, {row.vmid for row in rows}, frozenset(extra), now)
    # A configuration that is only a lock may be any run's: one row, of the run whose task left it if known.
    bare = {row.vmid: row for row in sorted(rows, key=lambda row: row.verdict == "destroy") if row.bare}
    rows = [row for row in rows if not row.bare or bare[row.vmid] is row]
    return sorted(rows, key=lambda row: (row.vmid is None, row.vmid or 0, row.run or ""))


def execute(
    host: PveHost,
    settings: Settings,
    rows: Iterable[Row],
    on_outcome: Callable[[Row, Outcome], None] | None = None,
) -> dict[Row, Outcome]:
    """Destroy the rows with the verdict "destroy", several at a time, each proved again; continues after
    failures. `on_outcome` is called for each row as soon as its outcome is known, by the thread that did it.
    """
    to_destroy = [row for row in rows if row.verdict == "destroy"]
    by_run: dict[tuple[str, str], list[Row]] = {}
    of_templates = [row for row in to_destroy if templates.NAME.match(str(row.run))]
    for row in to_destroy:
        if row.run is not None and row.pool is not None and row not in of_templates:
            by_run.setdefault((row.run, row.pool), []).append(row)
    width = WIDTH if len(by_run) <= 1 else 1
    jobs: list[Callable[[], dict[Row, Outcome]]] = [
        partial(_destroy_run, host, _with_pool_parent(settings, pool), run_id, members, width)
        for (run_id, pool), members in by_run.items()
    ]
    jobs += [partial(_destroy_template, host, settings, row) for row in of_templates]
    jobs += [partial(_destroy_unmarked, host, settings, row) for row in to_destroy if row.run is None]
    outcomes: dict[Row, Outcome] = {}

    def work(job: Callable[[], dict[Row, Outcome]]) -> None:
        for row, outcome in job().items():
            outcomes[row] = outcome
            if on_outcome is not None:
                on_outcome(row, outcome)

    in_parallel(work, jobs, WIDTH)
    return outcomes


def _destroy_template(host: PveHost, settings: Settings, row: Row) -> dict[Row, Outcome]:
    return {row: templates.destroy_template(host, _with_pool_parent(settings, str(row.pool)), row)}


def _destroy_unmarked(host: PveHost, settings: Settings, row: Row) -> dict[Row, Outcome]:
    return {row: unmarked.destroy_unmarked(host, settings, row)}


# -- runs, by their pools ------------------------------------------------------------------------


def _run_pools(host: PveHost) -> list[_RunPool]:
    pools = []
    for entry in entries(host.api.get("/pools"), call="get /pools"):
        run = run_of_pool(entry.get("poolid"))
        if run is not None:
            pools.append(_RunPool(str(entry["poolid"]), run, parse_lease(entry.get("comment"))))
    return pools


def _with_pool_parent(settings: Settings, pool: str) -> Settings:
    """The settings, for a run whose pool may have another parent than ours."""
    return replace(settings, pool_parent=pool.rpartition("/")[0] or None)


def _rows_of_run(host: PveHost, settings: Settings, pool: _RunPool, now: int) -> list[Row]:
    verdict, reason = _verdict(pool, now, named=settings.run_id == pool.run)
    settings = _with_pool_parent(settings, pool.pool)
    lease = pool.lease
    pool_row = Row(
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
    for vm in discover(host, settings, pool.run):
        row = replace(
            pool_row,
            vmid=vm.vmid,
            node=vm.node,
            name=names.get(vm.vmid) or f"VM {vm.vmid}",
            bare=vm.bare,
        )
        rows.append(_prove_row(host, settings, row, vm) if verdict == "destroy" else row)
    return rows or [pool_row]


def _prove_row(host: PveHost, settings: Settings, row: Row, candidate: Candidate) -> Row:
    """The row, with the verdict "keep" unless the VM is proved to be the run's."""
    if candidate.bare is not None:
        audit = settings.run_dir / str(row.run) / "audit.jsonl"
        leftover = killed_tasks.find_leftover(host, candidate.node, candidate.vmid, task_ids(audit))
        if leftover is not None and leftover.ours:
            return replace(row, reason=leftover.reason)
        if leftover is not None:
            return row.kept(leftover.reason, is_leftover=candidate.pooled)
    try:
        proof = prove(host.api, settings, candidate, str(row.run))
    except NodeUnreachable as e:
        return row.kept(f"its node {candidate.node} cannot be reached: {e.text}")
    row = replace(row, node=proof.node)
    if proof.config is not None and isinstance(proof.config.get("name"), str):
        row = replace(row, name=proof.config["name"])
    if not proof.ok and not proof.gone:
        # The VM blocks the removal of the run's pool; a session's own teardown reports that as a leftover.
        return row.kept(f"not proved to be the run's: {proof.reason}", is_leftover=candidate.pooled)
    if proof.status not in ("", "stopped") and not settings.force_stop:
        return row.kept("it runs, and force_stop is off")
    return row


def _verdict(pool: _RunPool, now: int, *, named: bool) -> tuple[str, str]:
    """("destroy" | "keep", reason) for a run, by its lease and by the lock of a session on this machine."""
    lease, is_alive = pool.lease, SessionLock.alive(pool.run)
    if is_alive:
        return "keep", "a session on this machine is working on it"
    if lease is None:
        if named:
            return "destroy", "selected by --nested-run, and its pool names no owner"
        return "keep", "its pool's comment is no lease; select it with --nested-run to destroy it"
    if lease.expired(now):
        return "destroy", f"its lease expired {_format_age(now - min(lease.expires, lease.hard))} ago"
    is_mine = lease.client == client_hash() and lease.owner == owner()
    if is_mine and lease.state == "kept":
        return "destroy", "kept by you"
    if is_mine and is_alive is False:
        return "destroy", "its session on this machine has exited"
    if named:
        return "destroy", f"selected by --nested-run; its owner is {lease.owner}"
    whose = "yours, perhaps with a session on another machine" if is_mine else f"{lease.owner}'s"
    remaining = _format_age(min(lease.expires, lease.hard) - now)
    return "keep", f"{lease.state} run, {whose}; lease expires in {remaining}; --nested-run destroys it"


def _format_age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def _destroy_run(
    host: PveHost, settings: Settings, run_id: str, rows: list[Row], width: int
) -> dict[Row, Outcome]:
    outcomes: dict[Row, Outcome] = {}
    host = host.within(lambda: pool_name(settings, run_id))
    try:
        audit = settings.run_dir / run_id / "audit.jsonl"
        rows_by_vmid = {row.vmid: row for row in rows if row.vmid is not None}
        candidates = [
            Candidate(row.vmid, row.node, row.reason, row.bare) for row in rows if row.vmid is not None
        ]
        prover = RunProver(host.api, settings, run_id, task_ids(audit))
        force_stop = settings.force_stop
        for outcome in destroy(host, prover, candidates, force_stop=force_stop, width=width):
            outcomes[rows_by_vmid[outcome.vmid]] = outcome
        leftovers = "; ".join(delete_leftovers(host, settings, run_id))
        remaining = {vm.vmid for vm in discover(host, settings, run_id)}
        for row in rows:
            if row.vmid is None:
                outcomes[row] = Outcome(0, row.node, "left" if leftovers else "gone", leftovers)
            elif row.vmid in remaining and outcomes[row].result == "gone":
                outcomes[row] = Outcome(row.vmid, row.node, "left", "still found after its destruction")
            elif leftovers and outcomes[row].result == "gone":
                reason = f"destroyed, but: {leftovers}"
                outcomes[row] = replace(outcomes[row], result="left", reason=reason)
    except Exception as e:
        for row in rows:
            outcomes.setdefault(row, Outcome(row.vmid or 0, row.node, "left", f"{type(e).__name__}: {e}"))
    if all(outcome.result == "gone" for outcome in outcomes.values()):
        kept_runs.forget(run_id)
        old_runs.record_cleanup(settings.run_dir / run_id, host.name)
    return outcomes
