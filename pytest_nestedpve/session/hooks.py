"""What a pytest session does with its environment, hook by hook; registered when a session begins."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import Any

import pytest

from pytest_nestedpve.config.settings import Settings, SettingsError, load
from pytest_nestedpve.session import exit_status
from pytest_nestedpve.session.exit_status import NO_HOST, NoHostFailure, PhaseFailure
from pytest_nestedpve.session.session import KEY, USER, NestedSession, remember

FIXTURE = "nested_pve_run"
#: What an xdist worker hands to the controller at its end.
SAID = "nestedpve_said"


def begin(session: pytest.Session) -> None:
    """Read the settings and register the hooks below. Raises pytest.UsageError before anything is touched."""
    config = session.config
    option = config.option
    looks_only = any(
        getattr(option, name, False) for name in ("collectonly", "showfixtures", "show_fixtures_per_test")
    )
    acts = option.nested_destroy_only or option.nested_doctor or option.nested_exec is not None
    acts = acts or option.nested_make_template
    if looks_only and not acts:
        settings = Settings()
    else:
        try:
            settings = load(config)
            if settings != Settings(run_dir=settings.run_dir):  # something was asked for
                from pytest_nestedpve.config import conflicts

                conflicts.check(settings, config)
        except SettingsError as e:
            raise pytest.UsageError(f"nested-pve: {e}") from e
        from pytest_nestedpve.pve.deadline import set_scale

        set_scale(settings.timeout_scale)
    nested = NestedSession(config, settings, _end)
    config.stash[KEY] = nested
    remember(session)
    if settings.env_file is not None:
        from pytest_nestedpve.session.modes.env_file import EnvFileHooks

        config.pluginmanager.register(EnvFileHooks(nested, settings.env_file), "nestedpve-env-file")
    config.pluginmanager.register(SessionHooks(nested, session), "nestedpve-session")
    config.pluginmanager.register(LastHooks(nested), "nestedpve-last")
    config.add_cleanup(nested.close)
    if getattr(option, "htmlpath", None) and nested.host_is_named():
        nested.register_report()  # pytest-html asks for its columns now
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        nested.family = worker.get("nestedpve_session")
        nested.told = worker.get("nestedpve_shared")
        if nested.told is not None:
            nested.run_id = str(nested.told["run"])


def of(config: pytest.Config) -> NestedSession:
    """The session's environment."""
    return config.stash[KEY]


def collect_steps(collector: pytest.Module) -> list[pytest.Item]:
    """The phases as items of the file that holds the sentinel."""
    from pytest_nestedpve.environment.phases import PhaseListError
    from pytest_nestedpve.session import steps

    nested = of(collector.config)
    nested.has_steps = True
    try:
        return steps.expand(collector, nested.phases)
    except PhaseListError as e:
        raise collector.CollectError(f"nested-pve: {e}") from e


def adopt_worker(node: Any) -> None:
    """Give an xdist worker what the runs of this session have in common, for the controller's sweep."""
    from pytest_nestedpve.session.xdist import workers

    nested = of(node.config)
    if nested.family is None:
        import secrets

        nested.family = secrets.token_hex(8)
    if nested.host_is_named():
        nested.take_signals()
        nested.register_report()
    node.workerinput["nestedpve_session"] = nested.family
    node.workerinput[workers.DIST] = node.config.option.dist
    if nested.settings.scope == "run" and nested.host_is_named():
        node.workerinput["nestedpve_shared"] = workers.share(nested)


def _end(nested: NestedSession) -> None:
    from pytest_nestedpve.session import end

    end.finish(nested)


def uses(item: pytest.Item) -> bool:
    """Whether the test uses a fixture of this plugin, directly or through others."""
    return FIXTURE in getattr(item, "fixturenames", ()) or item.stash.get(USER, False)


class SessionHooks:
    """The hooks of one session."""

    def __init__(self, nested: NestedSession, session: pytest.Session) -> None:
        self.nested = nested
        self.session = session
        self.config = nested.config
        self._told = False
        self._left_out: str | None = None

    def pytest_report_header(self) -> list[str]:
        from pytest_nestedpve.session import header

        return header.lines(self.nested)

    # -- before the tests --------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        if self.nested.settings.destroy_only:
            from pytest_nestedpve.session.modes import destroy_only

            destroy_only.collect(session, self.nested)
            return True
        if self.nested.settings.doctor:
            from pytest_nestedpve.session.modes import doctor

            doctor.collect(session, self.nested)
            return True
        if self.nested.settings.make_template:
            from pytest_nestedpve.session.modes import make_template

            make_template.collect(session, self.nested)
            return True
        if self.nested.settings.exec_command is not None:
            from pytest_nestedpve.session.modes import exec

            exec.collect(session, self.nested)
            return True
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.nested.has_steps:
            from pytest_nestedpve.session import steps

            session.items[:] = steps.in_order(session.items, self.nested.phases, uses)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        option = self.config.option
        if option.collectonly or option.setupplan or self.nested.settings.destroy_only:
            return None
        chosen = [item for item in session.items if uses(item)]
        if hasattr(self.config, "workerinput"):
            from pytest_nestedpve.session.xdist import workers

            self.nested.workers = workers.at_once(self.config, chosen)
        self.nested.wants_clean = any("nested_pve_clean" in getattr(i, "fixturenames", ()) for i in chosen)
        if self.nested.settings.attach is not None:
            from pytest_nestedpve.environment.attached import chosen_steps
            from pytest_nestedpve.session.steps import PREFIX

            names = [item.phase_name for item in chosen if hasattr(item, "phase_name")]
            self.nested.chosen = chosen_steps(names, PREFIX, option.keyword, self.config.args)
        if self.nested.settings.dry_run:
            from pytest_nestedpve.session.modes import dry_run

            dry_run.show(self.nested, chosen)
            return True
        if chosen and not self.nested.host_is_named() and not hasattr(self.config, "workerinput"):
            raise pytest.UsageError(f"nested-pve: {NO_HOST}")
        if chosen:
            from pytest_nestedpve.session import vm_fixtures

            vm_fixtures.check(chosen)
            self._check_skip()
        return None

    def _check_skip(self) -> None:
        names = [phase.name for phase in self.nested.phases]
        for name in self.nested.settings.skip:
            if name not in names:
                raise pytest.UsageError(
                    f"nested-pve: --nested-skip: expected the name of a phase ({', '.join(names)}); "
                    f"found {name!r}"
                )

    # -- each test ---------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.nested.item, self.nested.stage, self.nested.thread = item, "setup", threading.get_ident()
        if self.config.option.setuponly:
            return  # nothing is called, so nothing can be said of what came before
        if self.nested.has_steps and hasattr(item, "phase_name"):
            from pytest_nestedpve.session import step_dependencies

            step_dependencies.before(self.nested, item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        self.nested.stage = "call"

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        self.nested.stage = "teardown"

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
        if fixturedef.argname == FIXTURE and self.nested.item is not None:
            self.nested.item.stash[USER] = True
        try:
            return (yield)
        except BaseException:
            # Its value is shared by tests that want more or less of it; its failure is not.
            if fixturedef.argname == "nested_pve":
                fixturedef.finish(request)
            raise

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if uses(item):
            setattr(report, exit_status.USES, True)
        error = call.excinfo.value if call.excinfo is not None else None
        broken = error.broken if isinstance(error, PhaseFailure) else None
        if error is not None and broken is None:
            broken = self.nested.faults.get(error)
        if isinstance(error, NoHostFailure):
            setattr(report, exit_status.CAUSE, exit_status.CAUSE_NO_HOST)
        elif broken is not None:
            setattr(report, exit_status.CAUSE, broken.phase)
            self.nested.shown.setdefault(broken.phase, item.nodeid)
        if hasattr(item, "phase_name"):
            from pytest_nestedpve.session import step_dependencies

            step_dependencies.after(self.nested, item, call, report)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.nested.tally.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.nested.tally.failures += 1

    # -- the end -----------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        # From here on the session ends by itself; a further signal would only cut the teardown off.
        self.nested.guard.counting = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        if self.nested.job is not None:
            self.nested.job.write()
        tally = self.nested.tally
        if tally.nested:
            from pytest_nestedpve.session import last_failed

            self._left_out = last_failed.left_out(self.config, tally)
        result = yield
        if tally.nested:
            last_failed.remember(self.config, tally)
        session.exitstatus = self._status(session.exitstatus)
        if not self._told:
            self._tell(self.config.pluginmanager.getplugin("terminalreporter"))
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        self._status(exitstatus)
        self._tell(terminalreporter)

    def _status(self, status: int | pytest.ExitCode) -> int:
        nested, option = self.nested, self.config.option
        nested.tally.signum = nested.guard.first
        executes = not (
            option.collectonly
            or option.setuponly
            or option.setupplan
            or nested.settings.dry_run
            or nested.settings.destroy_only
        )
        # Under xdist what stops for a failure is the controller's scheduler.
        stops = (self.session, self.config.pluginmanager.getplugin("dsession"))
        stopped = any(getattr(each, "shouldstop", False) for each in stops)
        if nested.diagnosis is not None and int(status) == exit_status.NOTHING_COLLECTED:
            return nested.diagnosis
        found = nested.tally.status(int(status), executes=executes, stopped=stopped)
        if found == exit_status.NOTHING_COLLECTED and (
            nested.settings.destroy_only or nested.settings.dry_run
        ):
            return exit_status.OK
        return found

    def _tell(self, reporter: Any) -> None:
        if reporter is None:
            return
        self._told = True
        nested = self.nested
        said = nested.remarks or nested.kept_by_workers or nested.kept_until is not None
        if nested.opened or nested.swept or said:
            from pytest_nestedpve.session import end

            end.tell(nested, reporter)
        for line in nested.job.known() if nested.job is not None else ():
            reporter.write_line(line)
        for line in nested.tally.hooks:
            reporter.write_line(f"nested-pve: {line}", red=True)
        if self._left_out:
            reporter.write_line(f"nested-pve: {self._left_out}", yellow=True)
        if self.nested.tally.reason:
            reporter.write_line(f"nested-pve: {self.nested.tally.reason}", yellow=True)


class LastHooks:
    """What comes after others' part: the rest of the set-up for a test that nobody skipped, and at the end of
    the session the guard, and the sweep behind workers."""

    def __init__(self, nested: NestedSession) -> None:
        self.nested = nested

    # After pytest's own skips (they come first), before the test's fixtures (pytest's hook is an older one).
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.nested.config.option.setuponly or hasattr(item, "phase_name"):
            return
        if "nested_pve" in getattr(item, "fixturenames", ()) and self.nested.opened:
            # The fixture has its value already; this test may want more of it than those before.
            self.nested.ensure_for(item)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        said = getattr(node, "workeroutput", {}).get(SAID, {})
        self.nested.tally.hooks += said.get("hooks", [])
        self.nested.remarks += said.get("remarks", [])
        self.nested.kept_by_workers += said.get("kept", [])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        nested = self.nested
        nested.finish()
        if nested.opened and hasattr(nested.config, "workeroutput"):
            from pytest_nestedpve.session.end import kept_lines

            nested.config.workeroutput[SAID] = {
                "hooks": nested.tally.hooks,
                "remarks": nested.remarks,
                "kept": kept_lines(nested),
            }
        if self.nested.family is not None and not hasattr(self.nested.config, "workerinput"):
            from pytest_nestedpve.session.xdist.controller import sweep

            sweep(self.nested)
