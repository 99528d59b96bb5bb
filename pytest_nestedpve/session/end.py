"""The end of an open run: torn down or kept; and the lines about it at the end of pytest's output."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.run import rerun_commands
from pytest_nestedpve.run.directory import FINISHED

if TYPE_CHECKING:
    from pytest_nestedpve.session.open_run import OpenRun
    from pytest_nestedpve.session.state import SessionState


def finish(run: OpenRun) -> None:
    """Tear the environment down, or keep it. Never raises: an error is recorded as a leftover."""
    from pytest_nestedpve.session import pytest_compat

    state, runner = run.state, run.runner
    try:
        with pytest_compat.timer_stopped(state.config, state.item, "over"):
            failed = _tests_failed(run)
            if failed:
                runner.audit.write("tests", status="failed")
            if run.membership is not None and not run.membership.leave():
                _leave_to_others(run)
                return
            if failed:
                from pytest_nestedpve.report import failure

                failure.examine_tests(run.environment)
            if _is_kept(run):
                _keep(run)
            elif runner.acted:
                _tear_down(run)
            else:
                runner.audit.write("teardown", status="clean", cause="nothing was made on the host")
    except BaseException as error:
        run.record_teardown_error(error)
        with contextlib.suppress(Exception):
            runner.audit.write("leak", status="unknown", cause=run.teardown_error)
    _conclude(run)


# -- keep or tear down -------------------------------------------------------------------------------------


def _tests_failed(run: OpenRun) -> bool:
    """Whether tests failed on a complete environment, in a session that no signal ended."""
    complete = run.runner.broken is None and run.runner.acted
    return complete and bool(run.state.tally.failures) and run.state.guard.first is None


def _is_kept(run: OpenRun) -> bool:
    """Whether the environment outlives this session."""
    has_vm = run.runner.status.get("provision") in ("done", "proved") or _is_untouched(run)
    return has_vm and keeps_environment(run.state, broken=run.runner.broken is not None)


def _is_untouched(run: OpenRun) -> bool:
    """Whether the environment was kept by an earlier session, and a failure came before its first change."""
    env = run.environment
    return env.resumed and "provision" in env.facts and env.record.begun != "provision"


def keeps_environment(state: SessionState, *, broken: bool) -> bool:
    """Whether --nested-keep applies to an environment with a VM; `broken`: a phase failed."""
    if state.settings.keep == "on-failure":
        return (broken or bool(state.tally.failures)) and state.guard.first is None
    return state.settings.keep == "always"


def _keep(run: OpenRun) -> None:
    from pytest_nestedpve.environment import persistence
    from pytest_nestedpve.run import kept_runs

    env = run.environment
    before = kept_runs.find_kept(env.run.id)
    if env.resumed and not env.has_lease and before is not None:
        expires = before.expires  # this session never held its lease
    else:
        expires = persistence.keep(env).expires
    run.state.environment_kept(expires, env.run.dir)
    env.audit.write("teardown", status="kept", expires=expires)


def _tear_down(run: OpenRun) -> None:
    from pytest_nestedpve.run import kept_runs
    from pytest_nestedpve.teardown.teardown import teardown

    env = run.environment
    kept_runs.forget(env.run.id)
    run.record_teardown(teardown(env, run.progress))
    if env.resumed:
        run.state.remark(f"run {env.run.id} had been kept; torn down, as {_reason_not_kept(run)}")


def _reason_not_kept(run: OpenRun) -> str:
    state = run.state
    if state.settings.keep == "no":
        return "--nested-keep was not given"
    if keeps_environment(state, broken=run.runner.broken is not None):
        return "its VM is incomplete"
    return "a signal was received" if state.guard.first is not None else "nothing failed"


# -- after it ----------------------------------------------------------------------------------------------


def _leave_to_others(run: OpenRun) -> None:
    """Other workers, or the controller, still run: the environment is theirs."""
    run.state.remark(*run.environment.remarks)
    with contextlib.suppress(Exception):
        run.environment.close()


def _conclude(run: OpenRun) -> None:
    """Report the result to the project's hooks and in the run's directory; release lock and logins."""
    state, env = run.state, run.environment
    lines = leftovers(state, run)
    if lines and state.kept is None:
        from pytest_nestedpve.report import failure

        failure.examine_teardown(env, lines, collect=state.guard.first is None)
    state.remark(*env.remarks)
    state.tally.record_leftovers(bool(lines))
    with contextlib.suppress(Exception):
        env.run.directory.write(FINISHED, "".join(f"{_one_line(line)}\n" for line in lines))
    if state.settings.context_file is not None and not lines and state.kept is None:
        from pytest_nestedpve.config import legacy_context
        from pytest_nestedpve.environment.persistence import context_vms

        with contextlib.suppress(Exception):
            legacy_context.forget(state.settings.context_file, *context_vms(env.facts))
    if state.kept is None:
        from pytest_nestedpve.session.project_hooks import ProjectHooks

        hooks = ProjectHooks(state.config, env, state.tally.add_hook_failure)
        hooks.teardown_finished(run.teardown_report, lines)
    if run.membership is not None:
        # The controller has exited: its lock is free, and the lock's file is for the next session.
        run.take_over()
    if run.lock is not None:
        run.lock.release(remove=not lines)
    with contextlib.suppress(Exception):
        env.close()


# -- the terminal ------------------------------------------------------------------------------------------


def leftovers(state: SessionState, run: OpenRun | None) -> list[str]:
    """Leftovers of the teardown on the host, a line each."""
    lines: list[str] = []
    if run is not None and run.teardown_report is not None:
        lines += run.teardown_report.left
    lines += state.left_by_workers
    if run is not None and run.teardown_error is not None:
        lines.append(f"unknown, the teardown itself failed: {run.teardown_error}")
    return lines


def report(state: SessionState, run: OpenRun | None, reporter: Any, finishing_command: str) -> None:
    """Write remarks, kept environments and leftovers to the terminal."""
    for line in state.remarks:
        reporter.write_line(f"nested-pve: {line}")
    for line in (*state.kept_by_workers, *kept_lines(state)):
        reporter.write_line(line)
    lines = leftovers(state, run)
    if lines:
        reporter.write_sep("=", "nested-pve: the teardown left something behind", red=True)
        for line in lines:
            reporter.write_line(line)
        reporter.write_line(f"this finishes it: {finishing_command}")


def kept_lines(state: SessionState) -> list[str]:
    """Commands to log in to a kept environment, to resume and to destroy it; empty when none was kept."""
    import datetime
    import shlex

    if state.kept is None:
        return []
    until = datetime.datetime.fromtimestamp(state.kept.until).astimezone()
    ssh_config = shlex.quote(str(state.kept.directory / "ssh_config"))
    return [
        f"nested-pve: run {state.run_id} is kept until {until:%Y-%m-%d %H:%M}; then the next session on "
        "its host destroys it",
        f"  log in:  ssh -F {ssh_config} nested",
        f"  resume:  {rerun_commands.command_to_repeat(state.settings)} --nested-keep",
        f"  destroy: {rerun_commands.command_to_destroy(state.settings, state.run_id)}",
    ]


def _one_line(text: str) -> str:
    return " ".join(text.split())
