"""Runs whose lease has lapsed go when the next session begins on their host, whoever made them."""

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
    """Destroy what lapsed runs left, by the same proof as ever; say what went and what stays."""
    host, settings = env.outer, env.settings
    try:
        rows = [
            row for run in _lapsed(env) for row in plan.plan(host, replace(settings, run_id=run))
        ]  # fmt: skip
        if not rows:
            return
        env.progress("destroying what runs left whose lease has lapsed")
        outcomes = plan.execute(host, settings, rows)
    except PveError as e:
        env.remark(f"what lapsed runs left on {host.name} could not be looked at: {e}")
        return
    for row in rows:
        outcome = outcomes.get(row)
        env.remark(_line(row, outcome.result if outcome else "", outcome.reason if outcome else ""))


def _lapsed(env: Environment) -> list[str]:
    """The runs whose lease has lapsed, and whose session is not known to live."""
    now = host_clock(env.outer)
    found = []
    for entry in entries(env.outer.api.get("/pools"), call="get /pools"):
        run, lease = run_of_pool(entry.get("poolid")), parse_lease(entry.get("comment"))
        if run and run != env.run.id and lease and lease.lapsed(now) and not SessionLock.alive(run):
            found.append(run)
    return found


def _line(row: Row, result: str, reason: str) -> str:
    what = row.name if row.vmid is None else f"VM {row.vmid} ({row.name})"
    whose = f"{what} of run {row.run}, {row.owner}'s"
    if result == "gone":
        return f"{whose}: destroyed, {row.reason}"
    return f"{whose}: stays, {reason or row.reason}"
