"""One environment for all workers of an xdist session (`nested_pve_scope = run`).

The controller names the run, holds its lock, and tears it down after the last worker has left. One worker at
a time runs phases; it first reads from the run's directory the facts of the others, and a phase that failed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.phases import Broken
from pytest_nestedpve.pve import lock_file
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.run import kept_runs, phase_record
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.run.lock import SessionLock

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phase_runner import PhaseRunner

FAMILY = "session"
"""The file in a run's directory that names the xdist session of the run."""
BROKEN = "broken.json"
"""The file in a run's directory that reports a failed phase to the other workers."""
_SETUP_LOCK, _MEMBERS_LOCK = "turn.lock", "members.lock"


@dataclass(frozen=True)
class SharedRun:
    """The controller's run for all workers, and the lock that the controller holds on it."""

    run: Run
    lock: SessionLock


def joined(run: Run, shared: Mapping[str, Any], settings: Settings) -> Run:
    """A worker's copy of the run, with the session named in the lease. Raises PveError.

    `shared`: `run` and `session`, from the controller.
    """
    kept_runs.report_shape(run.directory, settings)
    return replace(run, session=str(shared["session"]))


class Membership:
    """A worker's use of the shared run. `phase_reported` gets a failed phase and its first reporter."""

    def __init__(
        self, env: Environment, runner: PhaseRunner, phase_reported: Callable[[str, str], None]
    ) -> None:
        self._env, self._runner, self._phase_reported = env, runner, phase_reported
        self._dir = env.run.dir
        self._member = lock_file.lock(self._dir / _MEMBERS_LOCK, shared=True)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """Exclude other workers from the set-up: read their state first, publish a failed phase after."""
        limit = sum(phase.timeout for phase in self._runner.phases)
        lock = wait_until(
            lambda: _try_lock(self._dir / _SETUP_LOCK), deadline=Deadline(limit), interval=(0.05, 0.5),
            what="another worker to finish its phases",
        )  # fmt: skip
        try:
            self._read_state()
            yield
        finally:
            self._publish_failure()
            os.close(lock)

    def leave(self) -> bool:
        """Leave the run. True if no other worker is left and no controller exists to tear it down."""
        os.close(self._member)
        if SessionLock.alive(self._env.run.id):
            return False
        last = _try_lock(self._dir / _MEMBERS_LOCK)
        if last is None:
            return False
        os.close(last)
        self._read_state()
        return True

    def _read_state(self) -> None:
        env = self._env
        with contextlib.suppress(OSError):
            record = phase_record.parse((self._dir / phase_record.FILE).read_text(encoding="utf-8"))
            env.record.digests.clear()
            env.record.digests.update(record.digests)
            env.record.begun = record.begun
        before = env.facts.get("provision"), env.facts.get("setup_network")
        env.facts.update(env.run.directory.load_state())
        if before != (env.facts.get("provision"), env.facts.get("setup_network")):
            env.forget_connections()
        env.resumed = "provision" in env.facts
        self._runner.acted = self._runner.acted or env.resumed
        if self._runner.broken is None and (path := self._dir / BROKEN).exists():
            data = json.loads(path.read_text(encoding="utf-8"))
            broken = Broken(str(data["phase"]), str(data["cause"]))
            self._runner.record_failure(broken)
            self._phase_reported(broken.phase, "another worker")

    def _publish_failure(self) -> None:
        broken = self._runner.broken
        if broken is not None and not (self._dir / BROKEN).exists():
            text = json.dumps({"phase": broken.phase, "cause": broken.cause})
            self._env.run.directory.write(BROKEN, text)


def _try_lock(path: Path) -> int | None:
    try:
        return lock_file.lock(path, wait=False)
    except BlockingIOError:
        return None
