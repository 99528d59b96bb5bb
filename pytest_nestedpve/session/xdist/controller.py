"""Behind xdist's workers: the controller finds the runs of its session and tears down what was cut off."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.run.directory import FINISHED
from pytest_nestedpve.session.end import keeps_environment
from pytest_nestedpve.session.xdist.shared_run import FAMILY

if TYPE_CHECKING:
    from pytest_nestedpve.session.session import NestedSession
    from pytest_nestedpve.session.state import SessionState


def runs_of(state: SessionState) -> list[Path]:
    """The directories of the runs that this session's workers made."""
    found = []
    if state.family is not None and state.settings.run_dir.is_dir():
        for path in sorted(state.settings.run_dir.iterdir()):
            with contextlib.suppress(OSError):
                if (path / FAMILY).read_text(encoding="ascii") == state.family:
                    found.append(path)
    return found


def sweep(nested: NestedSession) -> None:
    """As xdist's controller: finish what its workers were cut off from; what is left is recorded."""
    nested.guard.stop_interrupting()
    nested.state.workers_left(_finish_all(nested))
    shared = nested.state.shared
    if shared is not None and shared.lock.held:  # no worker needed it
        shared.lock.release()
    nested.close_hosts()


def _finish_all(nested: NestedSession) -> list[str]:
    """Finish each of those runs; what is left on the host, a line each."""
    left: list[str] = []
    for path in runs_of(nested.state):
        finished = path / FINISHED
        if finished.exists():
            left += [f"run {path.name}: {line}" for line in finished.read_text(encoding="utf-8").splitlines()]
            continue
        try:
            lines = _finish(nested, path)
        except Exception as error:
            lines = [f"unknown, the teardown itself failed: {type(error).__name__}: {error}"]
        left += [f"run {path.name}: {line}" for line in lines]
    return left


def _finish(nested: NestedSession, path: Path) -> list[str]:
    from pytest_nestedpve.environment import persistence
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.report.progress import ProgressListener
    from pytest_nestedpve.run import kept_runs
    from pytest_nestedpve.run.audit_log import AuditLog
    from pytest_nestedpve.run.directory import RunDirectory
    from pytest_nestedpve.run.identity import Run
    from pytest_nestedpve.run.lock import SessionLock
    from pytest_nestedpve.session.project_hooks import ProjectHooks
    from pytest_nestedpve.teardown.teardown import teardown

    # The lock of the run that all workers share is held here all along.
    state = nested.state
    shared = state.shared.run if state.shared is not None and state.shared.run.id == path.name else None
    if state.shared is not None and shared is not None:
        lock = state.shared.lock
    else:
        lock = SessionLock(path.name)
        lock.acquire()
    shown = ProgressListener(nested.config)
    audit = AuditLog(path / "audit.jsonl", path.name)
    run = Run(id=path.name, owner="", client="", session="", dir=path, created=0, expires=0, hard=0)
    environment = Environment(
        settings=nested.settings,
        run=shared or run,
        connect=nested.connect,
        audit=audit,
        progress=_unheard,
        rootdir=nested.config.rootpath,
    )
    try:
        environment.facts = RunDirectory(path).load_state()
        keeps = (
            shared is not None and "provision" in environment.facts and keeps_environment(state, broken=False)
        )
        # One that no worker went on with is as it was left.
        untouched = keeps and not (path / persistence.ADOPTED).exists()
        before = kept_runs.find_kept(path.name) if untouched else None
        if before is None:
            environment.settings = nested.settings.with_profile(_profile(environment.outer))
        if keeps:
            expires = before.expires if before is not None else persistence.keep(environment).expires
            state.environment_kept(expires, path)
            audit.write("teardown", status="kept", expires=expires)
            lines: list[str] = []
        else:
            kept_runs.forget(path.name)
            report = teardown(environment, shown)
            lines = [str(each) for each in report.left]
            hooks = ProjectHooks(state.config, environment, state.tally.add_hook_failure)
            hooks.teardown_finished(report, lines)
        run.directory.write(FINISHED, "".join(f"{line}\n" for line in lines))
        lock.release(remove=not lines)
        return lines
    finally:
        lock.release(remove=False)
        shown.close()
        environment.close()
        audit.close()


def _profile(host: Any) -> dict[str, str]:
    """The host's profile, for `pool_parent`; one that cannot be read was told by preflight."""
    from pytest_nestedpve.config.hosts import host_profile
    from pytest_nestedpve.pve.errors import PveError

    try:
        return host_profile(host)
    except PveError:
        return {}


def _unheard(_text: str) -> None:
    """Phases are not done by a sweep; its teardown is shown."""
