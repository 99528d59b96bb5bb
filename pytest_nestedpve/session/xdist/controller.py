"""The end of an xdist session: the controller finishes the runs that its workers did not finish."""

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
    """The directories of the runs that this session's workers created."""
    directories = []
    if state.family is not None and state.settings.run_dir.is_dir():
        for path in sorted(state.settings.run_dir.iterdir()):
            with contextlib.suppress(OSError):
                if (path / FAMILY).read_text(encoding="ascii") == state.family:
                    directories.append(path)
    return directories


def finish_runs(nested: NestedSession) -> None:
    """As xdist's controller: tear down or keep the workers' unfinished runs, and record leftovers."""
    nested.guard.stop_interrupting()
    nested.state.workers_left(_finish_all(nested))
    shared = nested.state.shared
    if shared is not None and shared.lock.held:  # no worker needed it
        shared.lock.release()
    nested.close_hosts()


def _finish_all(nested: NestedSession) -> list[str]:
    """Finish each unfinished run. Returns a line for each leftover on a host, of finished runs too."""
    leftovers: list[str] = []
    for path in runs_of(nested.state):
        finished = path / FINISHED
        if finished.exists():
            leftovers += [
                f"run {path.name}: {line}" for line in finished.read_text(encoding="utf-8").splitlines()
            ]
            continue
        try:
            lines = _finish(nested, path)
        except Exception as error:
            lines = [f"unknown, the teardown itself failed: {type(error).__name__}: {error}"]
        leftovers += [f"run {path.name}: {line}" for line in lines]
    return leftovers


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

    # The controller has held the lock of the shared run since the start of the session.
    state = nested.state
    shared = state.shared.run if state.shared is not None and state.shared.run.id == path.name else None
    if state.shared is not None and shared is not None:
        lock = state.shared.lock
    else:
        lock = SessionLock(path.name)
        lock.acquire()
    progress = ProgressListener(nested.config)
    audit = AuditLog(path / "audit.jsonl", path.name)
    run = Run(id=path.name, owner="", client="", session="", dir=path, created=0, expires=0, hard=0)
    environment = Environment(
        settings=nested.settings,
        run=shared or run,
        connect=nested.connect,
        audit=audit,
        progress=_ignore_progress,
        rootdir=nested.config.rootpath,
    )
    try:
        environment.facts = RunDirectory(path).load_state()
        keeps = (
            shared is not None and "provision" in environment.facts and keeps_environment(state, broken=False)
        )
        # A kept run that no worker resumed is kept with its old expiry time.
        unused = keeps and not (path / persistence.ADOPTED).exists()
        recorded = kept_runs.find_kept(path.name) if unused else None
        if recorded is None:
            environment.settings = nested.settings.with_profile(_read_profile(environment.outer))
        if keeps:
            expires = recorded.expires if recorded is not None else persistence.keep(environment).expires
            state.environment_kept(expires, path)
            audit.write("teardown", status="kept", expires=expires)
            lines: list[str] = []
        else:
            kept_runs.forget(path.name)
            report = teardown(environment, progress)
            lines = [str(leftover) for leftover in report.left]
            hooks = ProjectHooks(state.config, environment, state.tally.add_hook_failure)
            hooks.teardown_finished(report, lines)
        run.directory.write(FINISHED, "".join(f"{line}\n" for line in lines))
        lock.release(remove=not lines)
        return lines
    finally:
        lock.release(remove=False)
        progress.close()
        environment.close()
        audit.close()


def _read_profile(host: Any) -> dict[str, str]:
    """The host's profile, for `pool_parent`; empty if it cannot be read, which preflight has reported."""
    from pytest_nestedpve.config.hosts import host_profile
    from pytest_nestedpve.pve.errors import PveError

    try:
        return host_profile(host)
    except PveError:
        return {}


def _ignore_progress(_text: str) -> None:
    """Discard the progress of phases: the controller runs none."""
