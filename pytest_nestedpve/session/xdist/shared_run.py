"""One environment for all workers of an xdist session (`nested_pve_scope = run`).

The controller names the run, holds its lock and takes it down when the last worker is out. Workers take turns
at the set-up: each first learns from the run's directory what the others did, and that one of them failed.
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
"""The file in a run's directory that tells the other workers what failed."""
_TURN, _MEMBERS = "turn.lock", "members.lock"


@dataclass(frozen=True)
class SharedRun:
    """The controller's run for all workers, and the lock that the controller holds on it."""

    run: Run
    lock: SessionLock


def joined(run: Run, shared: Mapping[str, Any], settings: Settings) -> Run:
    """The run as a worker has it: with the session that the lease names. Raises PveError.

    `shared`: `run` and `session`, from the controller.
    """
    kept_runs.report_shape(run.directory, settings)
    return replace(run, session=str(shared["session"]))


class Membership:
    """A worker's part in the shared run. `phase_reported` gets a failed phase and its first reporter."""

    def __init__(
        self, env: Environment, runner: PhaseRunner, phase_reported: Callable[[str, str], None]
    ) -> None:
        self._env, self._runner, self._phase_reported = env, runner, phase_reported
        self._dir = env.run.dir
        self._member = lock_file.lock(self._dir / _MEMBERS, shared=True)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While no other worker sets up: know first what they did, tell them afterwards what failed."""
        most = sum(phase.timeout for phase in self._runner.phases)
        lock = wait_until(
            lambda: _try_lock(self._dir / _TURN), deadline=Deadline(most), interval=(0.05, 0.5),
            what="another worker to end its part of the set-up",
        )  # fmt: skip
        try:
            self._learn()
            yield
        finally:
            self._tell()
            os.close(lock)

    def leave(self) -> bool:
        """This worker is out; whether it is the last one, and no controller is there to take the run down."""
        os.close(self._member)
        if SessionLock.alive(self._env.run.id):
            return False
        last = _try_lock(self._dir / _MEMBERS)
        if last is None:
            return False
        os.close(last)
        self._learn()
        return True

    def _learn(self) -> None:
        env = self._env
        with contextlib.suppress(OSError):
            said = phase_record.parse((self._dir / phase_record.FILE).read_text(encoding="utf-8"))
            env.record.digests.clear()
            env.record.digests.update(said.digests)
            env.record.begun = said.begun
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

    def _tell(self) -> None:
        broken = self._runner.broken
        if broken is not None and not (self._dir / BROKEN).exists():
            text = json.dumps({"phase": broken.phase, "cause": broken.cause})
            self._env.run.directory.write(BROKEN, text)


def _try_lock(path: Path) -> int | None:
    try:
        return lock_file.lock(path, wait=False)
    except BlockingIOError:
        return None
