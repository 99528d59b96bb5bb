"""The end of a session's environment: torn down, or kept; what is left is told."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.run import rerun_commands
from pytest_nestedpve.run.directory import FINISHED

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.session.session import NestedSession
    from pytest_nestedpve.teardown.teardown import TeardownReport


def finish(nested: NestedSession) -> None:
    """Tear down or keep; never raises."""
    from pytest_nestedpve.session import pytest_compat

    runner, environment = nested.runner, nested.environment
    assert runner is not None
    assert environment is not None
    try:
        with pytest_compat.timer_stopped(nested.config, nested.item, "over"):
            failed = _tests_failed(nested)
            if failed:
                runner.audit.write("tests", status="failed")
            if nested.membership is not None and not nested.membership.leave():
                _leave_to_others(nested)
                return
            if failed:
                from pytest_nestedpve.report import failure

                failure.after_tests(environment)
            if _keeps(nested):
                _keep(nested)
            elif runner.acted:
                _tear_down(nested)
            else:
                runner.audit.write("teardown", status="clean", cause="nothing was made on the host")
    except BaseException as error:
        nested.teardown_error = f"{type(error).__name__}: {error}"
        nested.teardown_report = nested.teardown_report or _undone(error)
        with contextlib.suppress(Exception):
            runner.audit.write("leak", status="unknown", cause=nested.teardown_error)
    _conclude(nested, environment)


def _undone(error: BaseException) -> TeardownReport:
    """What a teardown that failed knows to be left all the same: its error's notes."""
    from pytest_nestedpve.teardown.teardown import TeardownReport

    return TeardownReport(left=tuple(getattr(error, "__notes__", ())))


def _leave_to_others(nested: NestedSession) -> None:
    """The environment is that of workers or of a controller that still live."""
    assert nested.environment is not None
    nested.remarks += nested.environment.remarks
    with contextlib.suppress(Exception):
        nested.environment.close()
    nested.close_hosts()


def _conclude(nested: NestedSession, environment: Environment) -> None:
    """What comes after the teardown, whatever came of it: told, written down, given back."""
    lines = left(nested)
    if lines and nested.kept_until is None:
        from pytest_nestedpve.report import failure

        failure.after_teardown(environment, lines, collect=nested.guard.first is None)
    nested.remarks += environment.remarks
    nested.tally.left = nested.tally.left or bool(lines)
    with contextlib.suppress(Exception):
        environment.run.directory.write(FINISHED, "".join(f"{_flat(each)}\n" for each in lines))
    if nested.settings.context_file is not None and not lines and nested.kept_until is None:
        from pytest_nestedpve.config import legacy_context

        with contextlib.suppress(Exception):
            legacy_context.forget(nested.settings.context_file, environment.facts)
    if nested.kept_until is None:
        from pytest_nestedpve.session.project_hooks import Announcer

        announcer = Announcer(nested.config, environment, nested.tally.hooks)
        announcer.teardown_finished(nested.teardown_report, lines)
    if nested.membership is not None:
        # The controller is dead; what it held is free, and its file is for whoever finishes the job.
        from pytest_nestedpve.run.lock import SessionLock

        nested.lock = SessionLock(nested.run_id)
        with contextlib.suppress(Exception):
            nested.lock.acquire()
    if nested.lock is not None:
        nested.lock.release(remove=not lines)
    with contextlib.suppress(Exception):
        environment.close()
    nested.close_hosts()


def _tests_failed(nested: NestedSession) -> bool:
    """Whether tests failed on an environment that was whole, and no signal presses."""
    assert nested.runner is not None
    whole = nested.runner.broken is None and nested.runner.acted
    return whole and bool(nested.tally.failures) and nested.guard.first is None


def _keeps(nested: NestedSession) -> bool:
    """Whether the environment outlives this session."""
    assert nested.runner is not None
    whole = nested.runner.status.get("provision") in ("done", "proved") or _untouched(nested)
    return whole and wants_kept(nested, nested.runner.broken is not None)


def _untouched(nested: NestedSession) -> bool:
    """Whether a kept environment was not gone on with, because something broke before that."""
    assert nested.environment is not None
    env = nested.environment
    return env.resumed and "provision" in env.facts and env.record.begun != "provision"


def wants_kept(nested: NestedSession, broken: bool) -> bool:
    """Whether an environment with a whole VM is to be kept, by what was asked for and what happened."""
    if nested.settings.keep == "on-failure":
        return (broken or bool(nested.tally.failures)) and nested.guard.first is None
    return nested.settings.keep == "always"


def _keep(nested: NestedSession) -> None:
    from pytest_nestedpve.environment import persistence
    from pytest_nestedpve.run import kept_runs

    env = nested.environment
    assert env is not None
    before = kept_runs.recorded(env.run.id)
    if env.resumed and not env.has_lease and before is not None:
        expires = before.expires  # its lease never was this session's
    else:
        expires = persistence.keep(env).expires
    nested.kept_until, nested.kept_dir = expires, env.run.dir
    env.audit.write("teardown", status="kept", expires=expires)


def _tear_down(nested: NestedSession) -> None:
    from pytest_nestedpve.run import kept_runs
    from pytest_nestedpve.teardown.teardown import teardown

    assert nested.environment is not None
    kept_runs.forget(nested.environment.run.id)
    nested.teardown_report = teardown(nested.environment, nested.watcher)
    if nested.environment.resumed:
        nested.remarks.append(f"run {nested.run_id} had been kept; torn down, as {_why_not_kept(nested)}")


def _why_not_kept(nested: NestedSession) -> str:
    assert nested.runner is not None
    if nested.settings.keep == "no":
        return "--nested-keep was not given"
    if wants_kept(nested, nested.runner.broken is not None):
        return "its VM is not what it was"
    return "a signal came" if nested.guard.first is not None else "nothing failed"


def left(nested: NestedSession) -> list[str]:
    """What the teardown left on the host, a line each; empty when it is clean."""
    lines = [str(each) for each in getattr(nested.teardown_report, "left", ())]
    lines += nested.swept
    if nested.teardown_error is not None:
        lines.append(f"unknown, the teardown itself failed: {nested.teardown_error}")
    return lines


def tell(nested: NestedSession, reporter: Any) -> None:
    """What the end of the terminal's output says of the environment."""
    for line in nested.remarks:
        reporter.write_line(f"nested-pve: {line}")
    for line in (*nested.kept_by_workers, *kept_lines(nested)):
        reporter.write_line(line)
    lines = left(nested)
    if lines:
        reporter.write_sep("=", "nested-pve: the teardown left something behind", red=True)
        for line in lines:
            reporter.write_line(line)
        reporter.write_line(f"this goes on with it: {nested.finishing_command()}")


def kept_lines(nested: NestedSession) -> list[str]:
    """How to log in to a kept environment, go on with it, and destroy it; empty when none was kept."""
    import datetime
    import shlex

    if nested.kept_until is None:
        return []
    assert nested.kept_dir is not None
    until = datetime.datetime.fromtimestamp(nested.kept_until).astimezone()
    ssh_config = shlex.quote(str(nested.kept_dir / "ssh_config"))
    return [
        f"nested-pve: run {nested.run_id} is kept until {until:%Y-%m-%d %H:%M}; then the next session on "
        "its host destroys it",
        f"  log in:  ssh -F {ssh_config} nested",
        f"  go on:   {rerun_commands.again(nested.settings)} --nested-keep",
        f"  destroy: {rerun_commands.finishing(nested.settings, nested.run_id)}",
    ]


def _flat(text: str) -> str:
    return " ".join(text.split())
