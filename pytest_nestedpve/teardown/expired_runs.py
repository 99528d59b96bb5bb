"""Runs with an expired lease, of any owner, are destroyed when the next session begins on their host."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership.lease import parse_lease
from pytest_nestedpve.ownership.pool import host_clock, run_of_pool
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.teardown import plan
from pytest_nestedpve.teardown.plan_row import Row

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment


def sweep(env: Environment) -> None:
    """Destroy the VMs and pools of expired runs, by the usual proof; remark on each, destroyed or kept."""
    host, settings = env.outer, env.settings
    try:
        now = host_clock(host)
        runs = _expired(env, now)
        rows = [row for run in runs for row in plan.plan(host, replace(settings, run_id=run))]
        # Read again by the plan: a session that was suspended may have renewed its lease since.
        rows = [row if _has_expired(row, now) else row.kept("its lease was renewed") for row in rows]
        if not rows:
            return
        env.progress("destroying runs whose lease has expired")
        outcomes = plan.execute(host, settings, rows)
    except PveError as e:
        env.remark(f"leftovers of expired runs on {host.name} could not be examined: {e}")
        return
    for row in rows:
        outcome = outcomes.get(row)
        env.remark(_line(row, outcome.result if outcome else "", outcome.reason if outcome else ""))


def _has_expired(row: Row, now: int) -> bool:
    return row.expires is not None and now > row.expires


def _expired(env: Environment, now: int) -> list[str]:
    """The runs whose lease has expired at `now`, and whose session is not known to live."""
    runs = []
    for entry in entries(env.outer.api.get("/pools"), call="get /pools"):
        run, lease = run_of_pool(entry.get("poolid")), parse_lease(entry.get("comment"))
        if run and run != env.run.id and lease and lease.expired(now) and not SessionLock.alive(run):
            runs.append(run)
    return runs


def _line(row: Row, result: str, reason: str) -> str:
    name = row.name if row.vmid is None else f"VM {row.vmid} ({row.name})"
    subject = f"{name} of run {row.run}, owner {row.owner}"
    if result == "gone":
        return f"{subject}: destroyed, {row.reason}"
    return f"{subject}: kept, {reason or row.reason}"
