"""Of an xdist session's workers: how many environments they can need at once, and the run they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.session.state import SessionState

#: What the controller tells its workers: how tests are dealt out (a worker's own options do not say).
DIST = "nestedpve_dist"


def at_once(config: pytest.Config, chosen: Iterable[pytest.Item]) -> int:
    """At most one for each worker, and no more than there are groups of `chosen` tests that go apart."""
    given: dict[str, Any] = getattr(config, "workerinput", {})
    count = int(given.get("workercount", 1))
    dist = given.get(DIST, "load")
    if dist == "each":
        return count
    return max(1, min(count, len({_group(item.nodeid, dist) for item in chosen})))


def _group(nodeid: str, dist: str) -> str:
    if dist == "loadscope":
        return nodeid.rpartition("::")[0]
    if dist == "loadfile":
        return nodeid.partition("::")[0]
    if dist == "loadgroup":
        return nodeid.rpartition("@")[2]
    return nodeid


def share(state: SessionState) -> dict[str, Any]:
    """As the controller: choose the run (a kept one, if one fits) and say what its workers need to know."""
    from pytest_nestedpve.environment import persistence
    from pytest_nestedpve.run import kept_runs
    from pytest_nestedpve.run.audit_log import AuditLog
    from pytest_nestedpve.run.directory import FINISHED
    from pytest_nestedpve.run.identity import Run
    from pytest_nestedpve.session.xdist.shared_run import BROKEN, SharedRun

    if state.shared is None:
        taken = kept_runs.take_lock(state.settings, state.config.rootpath, state.run_id, early=True)
        state.remark(*taken.remarks)
        run_id = taken.kept.run if taken.kept is not None else state.run_id
        run = Run.create(state.settings, state.config.rootpath, run_id=run_id)
        audit = AuditLog(run.directory.audit, run.id)
        audit.write("session", status="new" if taken.kept is None else "resumed")
        audit.close()
        if taken.kept is not None:
            kept_runs.restore(taken.kept, run.directory)
        for name in (BROKEN, FINISHED, persistence.ADOPTED):
            (run.dir / name).unlink(missing_ok=True)
        state.share(SharedRun(run, taken.lock))
    assert state.shared is not None
    return {"run": state.shared.run.id, "session": state.shared.run.session}
