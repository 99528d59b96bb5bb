"""Hooks of pytest for the nested PVE, in the order in which pytest calls them.

`begin` registers two plugins: SessionHooks run before the hooks of other plugins, LastHooks after them.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from pytest_nestedpve.config.settings import Settings, SettingsError, load
from pytest_nestedpve.session import exit_status
from pytest_nestedpve.session.exit_status import NO_HOST, NoHostFailure, PhaseFailure
from pytest_nestedpve.session.session import KEY, NestedSession
from pytest_nestedpve.session.state import USER

FIXTURE = "nested_pve_run"
#: The key in `workeroutput`, from an xdist worker to the controller.
WORKER_LINES = "nestedpve_lines"


# -- called by plugin.py -----------------------------------------------------------------------------------


def begin(session: pytest.Session) -> None:
    """Read the settings and register the hooks below. Raises pytest.UsageError for invalid settings."""
    config = session.config
    nested = config.stash[KEY] = NestedSession(session, _settings(config))
    if nested.settings.env_file is not None:
        from pytest_nestedpve.session.modes.env_file import EnvFileHooks

        config.pluginmanager.register(EnvFileHooks(nested, nested.settings.env_file), "nestedpve-env-file")
    config.pluginmanager.register(SessionHooks(nested, session), "nestedpve-session")
    config.pluginmanager.register(LastHooks(nested), "nestedpve-last")
    config.add_cleanup(nested.close)
    if getattr(config.option, "htmlpath", None) and nested.host_is_configured():
        nested.register_report()  # pytest-html reads the columns before the first test
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        nested.state.join(worker.get("nestedpve_session"), worker.get("nestedpve_shared"))


def _settings(config: pytest.Config) -> Settings:
    option = config.option
    lists_only = any(
        getattr(option, name, False) for name in ("collectonly", "showfixtures", "show_fixtures_per_test")
    )
    has_mode = option.nested_destroy_only or option.nested_doctor or option.nested_exec is not None
    has_mode = has_mode or option.nested_make_template
    if lists_only and not has_mode:
        return Settings()
    try:
        settings = load(config)
        if settings != Settings(run_dir=settings.run_dir):  # something is configured
            from pytest_nestedpve.config import conflicts
            from pytest_nestedpve.pve.deadline import set_scale

            conflicts.check(settings, config)
            set_scale(settings.timeout_scale)
    except SettingsError as e:
        raise pytest.UsageError(f"nested-pve: {e}") from e
    return settings


def of(config: pytest.Config) -> NestedSession:
    """The session of this process, after `begin`."""
    return config.stash[KEY]


def collect_steps(collector: pytest.Module) -> list[pytest.Item]:
    """The phases as items of the file that imports the sentinel."""
    from pytest_nestedpve.environment.phases import PhaseListError
    from pytest_nestedpve.session import steps

    state = of(collector.config).state
    state.steps_collected()
    try:
        return steps.expand(collector, state.phases)
    except PhaseListError as e:
        raise collector.CollectError(f"nested-pve: {e}") from e


def configure_worker(node: Any) -> None:
    """As xdist's controller: give a worker the name of the session, and the shared run if there is one."""
    from pytest_nestedpve.session.xdist import workers

    nested = of(node.config)
    family = nested.state.start_family()
    if nested.host_is_configured():
        nested.handle_signals()
        nested.register_report()
    node.workerinput["nestedpve_session"] = family
    node.workerinput[workers.DIST] = node.config.option.dist
    if nested.settings.scope == "run" and nested.host_is_configured():
        node.workerinput["nestedpve_shared"] = workers.share(nested.state)


def uses(item: pytest.Item) -> bool:
    """Whether the test uses a fixture of this plugin, directly or through others."""
    return FIXTURE in getattr(item, "fixturenames", ()) or item.stash.get(USER, False)


# -- registered by `begin` ---------------------------------------------------------------------------------


class SessionHooks:
    """Hooks that run before those of other plugins."""

    def __init__(self, nested: NestedSession, session: pytest.Session) -> None:
        self.nested = nested
        self.session = session
        self.config = nested.config
        self._reported = False
        self._deselected_steps: str | None = None

    def pytest_report_header(self) -> list[str]:
        from pytest_nestedpve.session import header

        return header.lines(self.nested.state)

    # -- before the tests --------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self, session: pytest.Session) -> bool | None:
        settings = self.nested.settings
        if settings.destroy_only:
            from pytest_nestedpve.session.modes import destroy_only

            destroy_only.collect(session, self.nested)
            return True
        if settings.doctor:
            from pytest_nestedpve.session.modes import doctor

            doctor.collect(session, self.nested)
            return True
        if settings.make_template:
            from pytest_nestedpve.session.modes import make_template

            make_template.collect(session, self.nested)
            return True
        if settings.exec_command is not None:
            from pytest_nestedpve.session.modes import exec

            exec.collect(session, self.nested)
            return True
        return None

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.nested.state.has_steps:
            from pytest_nestedpve.session import steps

            session.items[:] = steps.sort_steps(session.items, self.nested.state.phases, uses)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        nested, option = self.nested, self.config.option
        if option.collectonly or option.setupplan or nested.settings.destroy_only:
            return None
        users = [item for item in session.items if uses(item)]
        nested.state.tests_selected(
            workers=self._environments(users),
            needs_clean_state=any("nested_pve_clean" in getattr(i, "fixturenames", ()) for i in users),
            phases=self._selected_phases(users),
        )
        if nested.settings.dry_run:
            from pytest_nestedpve.session.modes import dry_run

            dry_run.show(nested.state, users)
            return True
        if users and not nested.host_is_configured() and not hasattr(self.config, "workerinput"):
            raise pytest.UsageError(f"nested-pve: {NO_HOST}")
        if users:
            from pytest_nestedpve.session import vm_fixtures

            vm_fixtures.check_fixtures(users)
            self._check_skip()
        return None

    def _environments(self, users: list[pytest.Item]) -> int:
        """How many environments the session can need at once."""
        if not hasattr(self.config, "workerinput"):
            return 1
        from pytest_nestedpve.session.xdist import workers

        return workers.count_environments(self.config, users)

    def _selected_phases(self, users: list[pytest.Item]) -> frozenset[str]:
        """For an attached PVE: the phases whose steps the user selected."""
        if self.nested.settings.attach is None:
            return frozenset()
        from pytest_nestedpve.environment.attached import steps_by_name
        from pytest_nestedpve.session.steps import PREFIX

        names = [item.phase_name for item in users if hasattr(item, "phase_name")]
        return steps_by_name(names, PREFIX, self.config.option.keyword, self.config.args)

    def _check_skip(self) -> None:
        names = [phase.name for phase in self.nested.state.phases]
        for name in self.nested.settings.skip:
            if name not in names:
                raise pytest.UsageError(
                    f"nested-pve: --nested-skip: expected the name of a phase ({', '.join(names)}); "
                    f"found {name!r}"
                )

    # -- each test -----------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        self.nested.state.test_started(item)
        if self.config.option.setuponly:
            return  # no test is called: there are no outcomes to depend on
        if self.nested.state.has_steps and hasattr(item, "phase_name"):
            from pytest_nestedpve.session import step_dependencies

            step_dependencies.before_step(self.nested, item)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self) -> None:
        self.nested.state.stage_started("call")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self) -> None:
        self.nested.state.stage_started("teardown")

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any, request: Any) -> Generator[None, Any, Any]:
        item = self.nested.state.item
        if fixturedef.argname == FIXTURE and item is not None:
            item.stash[USER] = True
        try:
            return (yield)
        except BaseException:
            # Tests that request different phases share the fixture's value, but not its failure.
            if fixturedef.argname == "nested_pve":
                fixturedef.finish(request)
            raise

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        state = self.nested.state
        if uses(item):
            setattr(report, exit_status.USES, True)
        error = call.excinfo.value if call.excinfo is not None else None
        broken = error.broken if isinstance(error, PhaseFailure) else None
        if error is not None and broken is None:
            broken = state.faults.get(error)
        if isinstance(error, NoHostFailure):
            setattr(report, exit_status.CAUSE, exit_status.CAUSE_NO_HOST)
        elif broken is not None:
            setattr(report, exit_status.CAUSE, broken.phase)
            state.phase_reported(broken.phase, item.nodeid)
        if hasattr(item, "phase_name"):
            from pytest_nestedpve.session import step_dependencies

            step_dependencies.after_step(state, item, call, report)
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.nested.state.tally.add(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.nested.state.tally.add_collection_error()

    # -- the end -------------------------------------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self) -> None:
        # The session ends by itself from now on; another signal would only abort the teardown.
        self.nested.guard.stop_interrupting()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> Generator[None, Any, Any]:
        state = self.nested.state
        if state.destroy_job is not None:
            state.destroy_job.write()
        if state.tally.nested:
            from pytest_nestedpve.session import last_failed

            self._deselected_steps = last_failed.deselected_steps(self.config, state.tally)
        result = yield
        if state.tally.nested:
            last_failed.store_skipped_steps(self.config, state.tally)
        session.exitstatus = self._status(session.exitstatus)
        if not self._reported:
            self._report(self.config.pluginmanager.getplugin("terminalreporter"))
        return result

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: Any, exitstatus: int) -> None:
        self._status(exitstatus)
        self._report(terminalreporter)

    def _status(self, status: int | pytest.ExitCode) -> int:
        """The session's exit status in place of pytest's."""
        nested, option, state = self.nested, self.config.option, self.nested.state
        state.tally.record_signal(nested.guard.first)
        executes = not (
            option.collectonly
            or option.setuponly
            or option.setupplan
            or nested.settings.dry_run
            or nested.settings.destroy_only
        )
        # Under xdist the controller's scheduler stops after a failure.
        stoppable = (self.session, self.config.pluginmanager.getplugin("dsession"))
        stopped = any(getattr(plugin, "shouldstop", False) for plugin in stoppable)
        if state.diagnosis is not None and int(status) == exit_status.NOTHING_COLLECTED:
            return state.diagnosis
        final = state.tally.status(int(status), executes=executes, stopped=stopped)
        if final == exit_status.NOTHING_COLLECTED and (
            nested.settings.destroy_only or nested.settings.dry_run
        ):
            return exit_status.OK
        return final

    def _report(self, reporter: Any) -> None:
        """Write the lines about the nested PVE to the terminal, once."""
        if reporter is None:
            return
        self._reported = True
        nested, state = self.nested, self.nested.state
        remarks = state.remarks or state.kept_by_workers or state.kept is not None
        if nested.open_run is not None or state.left_by_workers or remarks:
            from pytest_nestedpve.session import end

            end.report(state, nested.open_run, reporter, nested.finishing_command())
        for line in state.destroy_job.known_symptoms() if state.destroy_job is not None else ():
            reporter.write_line(line)
        for line in state.tally.hooks:
            reporter.write_line(f"nested-pve: {line}", red=True)
        if self._deselected_steps:
            reporter.write_line(f"nested-pve: {self._deselected_steps}", yellow=True)
        if state.tally.reason:
            reporter.write_line(f"nested-pve: {state.tally.reason}", yellow=True)


class LastHooks:
    """Hooks that run after those of other plugins: the rest of the set-up for a test that none of them
    skipped, the guard at the end of the session, and the teardown after xdist's workers."""

    def __init__(self, nested: NestedSession) -> None:
        self.nested = nested

    # After pytest's skips (tryfirst), before the test's fixtures (pytest's hook was registered earlier).
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if self.nested.config.option.setuponly or hasattr(item, "phase_name"):
            return
        run = self.nested.open_run
        if "nested_pve" in getattr(item, "fixturenames", ()) and run is not None:
            # The fixture has its value already; this test may request more phases than the tests before.
            run.set_up_for(item)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        lines = getattr(node, "workeroutput", {}).get(WORKER_LINES, {})
        self.nested.state.tally.add_hook_failure(*lines.get("hooks", []))
        self.nested.state.worker_ended(lines.get("remarks", []), lines.get("kept", []))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        nested, state = self.nested, self.nested.state
        nested.finish()
        if nested.open_run is not None and hasattr(nested.config, "workeroutput"):
            from pytest_nestedpve.session.end import kept_lines

            nested.config.workeroutput[WORKER_LINES] = {
                "hooks": state.tally.hooks,
                "remarks": state.remarks,
                "kept": kept_lines(state),
            }
        if state.family is not None and not hasattr(nested.config, "workerinput"):
            from pytest_nestedpve.session.xdist.controller import finish_runs

            finish_runs(nested)
