"""The workers of an xdist session: the number of environments they need at once, and their shared run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.session.state import SessionState

#: Key of `workerinput`: the controller's --dist, which a worker's own options do not contain.
DIST = "nestedpve_dist"


def count_environments(config: pytest.Config, selected: Iterable[pytest.Item]) -> int:
    """The environments needed at once: one per worker, at most one per group that --dist keeps together."""
    workerinput: dict[str, Any] = getattr(config, "workerinput", {})
    count = int(workerinput.get("workercount", 1))
    dist = workerinput.get(DIST, "load")
    if dist == "each":
        return count
    return max(1, min(count, len({_group(item.nodeid, dist) for item in selected})))


def _group(nodeid: str, dist: str) -> str:
    if dist == "loadscope":
        return nodeid.rpartition("::")[0]
    if dist == "loadfile":
        return nodeid.partition("::")[0]
    if dist == "loadgroup":
        return nodeid.rpartition("@")[2]
    return nodeid


def share(state: SessionState) -> dict[str, Any]:
    """As the controller: choose the run, a kept one if one fits. Returns `shared` for the workers."""
    from pytest_nestedpve.environment import persistence
    from pytest_nestedpve.run import kept_runs
    from pytest_nestedpve.run.audit_log import AuditLog
    from pytest_nestedpve.run.directory import FINISHED
    from pytest_nestedpve.run.identity import Run
    from pytest_nestedpve.session.xdist.shared_run import BROKEN, SharedRun

    if state.shared is None:
        locked = kept_runs.take_lock(state.settings, state.config.rootpath, state.run_id, early=True)
        state.remark(*locked.remarks)
        run_id = locked.kept.run if locked.kept is not None else state.run_id
        run = Run.create(state.settings, state.config.rootpath, run_id=run_id)
        audit = AuditLog(run.directory.audit, run.id)
        audit.write("session", status="new" if locked.kept is None else "resumed")
        audit.close()
        if locked.kept is not None:
            kept_runs.restore(locked.kept, run.directory)
        for name in (BROKEN, FINISHED, persistence.ADOPTED):
            (run.dir / name).unlink(missing_ok=True)
        state.share(SharedRun(run, locked.lock))
    assert state.shared is not None
    return {"run": state.shared.run.id, "session": state.shared.run.session}
