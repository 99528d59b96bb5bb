"""An open run: its environment, phases run for tests, the clean state, the result of the teardown."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.environment import persistence
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.phase_runner import PhaseRunner
from pytest_nestedpve.environment.phases import PhaseBroken, needed_before
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.report import properties
from pytest_nestedpve.report.failure import FailureListener
from pytest_nestedpve.report.hooks import ReportListener
from pytest_nestedpve.report.progress import ProgressListener
from pytest_nestedpve.report.usual_times import usual_times
from pytest_nestedpve.run import kept_runs, old_runs
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.directory import FINISHED
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.run.signals import limit
from pytest_nestedpve.session import pytest_compat
from pytest_nestedpve.session.exit_status import PhaseFailure
from pytest_nestedpve.session.project_hooks import ProjectHooks
from pytest_nestedpve.session.state import USER, SessionState
from pytest_nestedpve.session.xdist.shared_run import FAMILY, Membership, joined

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.phases import Broken, Phase
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.setup.clean_state import CleanState
    from pytest_nestedpve.teardown.teardown import TeardownReport


class OpenRun:
    """The run of this process; tests get it as `nested_pve_run`.

    `membership` is this worker's part in a run that all workers share, None for a run of its own;
    `lock` is held as long as this process owns the run.
    """

    def __init__(
        self,
        state: SessionState,
        environment: Environment,
        runner: PhaseRunner,
        *,
        lock: SessionLock | None,
        membership: Membership | None,
        progress: ProgressListener,
    ) -> None:
        self.state = state
        self._environment = environment
        self._runner = runner
        self.lock = lock
        self.membership = membership
        self.progress = progress  # shows set-up and teardown on the terminal
        self._nested_pve: NestedPve | None = None
        self._set_up_for: pytest.Item | None = None  # the latest test for which the set-up was completed
        self._clean_state: CleanState | None = None
        self._clean_for = ""  # the node id that shares the present clean state
        self.ended = False
        self.teardown_report: TeardownReport | None = None
        self.teardown_error: str | None = None

    @property
    def environment(self) -> Environment:
        """What the phases work on: settings, facts, hosts, audit log."""
        return self._environment

    @property
    def runner(self) -> PhaseRunner:
        """The phases with their status."""
        return self._runner

    # -- set-up ----------------------------------------------------------------------------------------

    def nested_pve(self) -> NestedPve:
        """The value of the fixture nested_pve: set up as far as the current test requests."""
        from pytest_nestedpve.session.nested_pve import NestedPve

        self.set_up_for(self.state.item)
        if self._nested_pve is None:
            self._nested_pve = NestedPve(self.environment, self._before_use)
        return self._nested_pve

    def set_up_for(self, item: pytest.Item | None) -> None:
        """Run the phases that `item` requests; None: all phases. Raises PhaseFailure, Failed, UsageError."""
        self._set_up_for = item or self.state.item

        name = self.state.last_phase(pytest_compat.requested_phase(item))
        if name is not None:
            self._run_phases(lambda by: self.runner.ensure(name, by=by))
        unknown = self.membership is None and self._clean_state is None
        if self.state.needs_clean_state and unknown and self.runner.complete():
            # Now, before a test changes anything.
            try:
                self._known_clean_state()
            except PveError as e:
                raise Failed(f"nested_pve_clean: {e}", pytrace=False) from e

    def _before_use(self) -> None:
        """The current test uses the fixture's value; pytest may not know, after `request.getfixturevalue`."""
        state = self.state
        # Other threads, and fixtures that outlive their test, use the environment as it is.
        idle = state.stage == "teardown" or self.ended or threading.get_ident() != state.thread
        if state.item is not None and state.item is not self._set_up_for and not idle:
            state.item.stash[USER] = True
            self.set_up_for(state.item)

    def prepare_step(self, item: Any) -> Callable[[], None]:
        """Run the phases before that of the step `item`; the result runs the phase itself."""
        name: str = item.phase_name
        runner = self.runner
        before = runner.status.get(name)
        done_by = runner.done_by.get(name, "")
        self._run_phases(lambda by: runner.prepare(name, by=by))

        def run_step() -> None:
            self._run_phases(lambda by: runner.execute(name, by=by))
            item.user_properties += [
                (properties.PROPERTY_PHASE, name),
                (properties.PROPERTY_STATUS, runner.status[name]),
                (properties.PROPERTY_SECONDS, round(runner.seconds[name], 3)),
            ]
            if before is not None:
                item.user_properties.append((properties.PROPERTY_DONE_BY, done_by))
            if name in self.state.settings.skip:
                # Neither run nor probed: a step that passes was one of both.
                raise pytest.skip.Exception("taken as done (--nested-skip)", _use_item_location=True)

        return run_step

    def _run_phases(self, run: Callable[[str], None]) -> None:
        """Call `run` with the current test's node id: without its limit of time, one worker at a time.

        Raises PhaseFailure; an error that is no PveError is raised as it is, with its traceback.
        """
        by = self.state.item.nodeid if self.state.item is not None else ""
        turn = self.membership.turn() if self.membership is not None else contextlib.nullcontext()
        try:
            with self.state.unlimited(), turn:
                run(by)
        except PhaseBroken as error:
            if error.expected or error.__cause__ is None:
                raise PhaseFailure(error) from None
            # A fault in the code of a phase: its own traceback explains it best.
            self.state.phase_raised(error.__cause__, error.broken)
            raise error.__cause__ from None

    def failed_need(self, phase_name: str) -> Broken | None:
        """The cause, when a phase that `phase_name` needs has failed."""
        if self.runner.broken is None:
            return None
        causes = map(self.runner.cause, needed_before(self.state.phases, phase_name))
        return next((cause for cause in causes if cause is not None), None)

    # -- the clean state -------------------------------------------------------------------------------

    def restore_clean_state(self, item: pytest.Item) -> None:
        """Restore the state after set-up for `item`, unless it shares that with the test before.

        Raises Failed when the workers share the run, and for a PveError; UsageError for an unknown scope.
        """
        if self.membership is not None:
            raise Failed(
                "nested_pve_clean: the workers share one environment (nested_pve_scope = run), and a "
                "rollback for one would undo the work of the others; expected the scope worker",
                pytrace=False,
            )
        self.set_up_for(None)  # completely, whatever the test requests: a rollback undoes later phases
        key = pytest_compat.clean_scope(item)
        # Always for a test that shares with no other: it may be a rerun.
        if key == self._clean_for and key != item.nodeid:
            return
        self._clean_for = ""
        try:
            with self.state.unlimited():
                clean = self._known_clean_state()
                clean.restore()
        except PveError as e:
            raise Failed(f"nested_pve_clean: {e}", pytrace=False) from e
        self._clean_for = key
        item.user_properties.append(("nested_pve_clean", clean.result))

    def _known_clean_state(self) -> CleanState:
        """The clean state; the first call records the present one."""
        from pytest_nestedpve.setup.clean_state import CleanState

        if self._clean_state is None:
            self._clean_state = CleanState(self.environment)
            setup = [phase.name for phase in self.state.phases if phase.probe is not None]
            fresh = any(self.runner.status.get(name) == "done" for name in setup)
            self._clean_state.record(fresh=fresh)
        return self._clean_state

    # -- the end ---------------------------------------------------------------------------------------

    def mark_ended(self) -> None:
        """The teardown begins: no phase runs for a test any more."""
        self.ended = True

    def record_teardown(self, report: TeardownReport) -> None:
        """The teardown's report."""
        self.teardown_report = report

    def record_teardown_error(self, error: BaseException) -> None:
        """The teardown raised. Its error's notes are leftovers, unless there is a report."""
        from pytest_nestedpve.teardown.teardown import TeardownReport

        self.teardown_error = f"{type(error).__name__}: {error}"
        if self.teardown_report is None:
            self.teardown_report = TeardownReport(left=tuple(getattr(error, "__notes__", ())))

    def take_over(self) -> None:
        """As the last worker, after the controller exited: become the owner of the shared run."""
        self.lock = SessionLock(self.state.run_id)
        with contextlib.suppress(Exception):
            self.lock.acquire()


def create(state: SessionState, connect: Callable[[], PveHost]) -> OpenRun:
    """Open a run on this machine: directory, keys, audit log. Nothing is created on the host yet.

    The run is a new one, a kept one of an earlier session, or the one that the controller shares.
    Raises PveError and PhaseListError.
    """
    settings, rootdir = state.settings, state.config.rootpath
    phases = state.permitted_phases()
    kept: kept_runs.Kept | None = None
    lock: SessionLock | None = None
    if state.joined is None:
        locked = kept_runs.take_lock(settings, rootdir, state.run_id)
        kept, lock = locked.kept, locked.lock
        if kept is not None:
            state.resume(kept.run)
        state.remark(*locked.remarks)
    run = Run.create(settings, rootdir, run_id=state.run_id)
    if state.joined is not None:
        run = joined(run, state.joined, settings)
    old_runs.prune(run.dir.parent, own=run.id)
    if state.family is not None:
        run.directory.write(FAMILY, state.family)
    audit = AuditLog(run.directory.audit, run.id)
    if state.joined is None:
        audit.write("session", status="resumed" if kept is not None else "new")
    runner: PhaseRunner
    environment = Environment(
        settings=settings,
        run=run,
        connect=connect,
        audit=audit,
        progress=lambda text: runner.progress(text),
        rootdir=rootdir,
    )
    if state.joined is None:
        environment.workers = state.workers
    if kept is not None:
        (run.dir / FINISHED).unlink(missing_ok=True)
        kept_runs.restore(kept, run.directory)
        persistence.load(environment)
        environment.resumed = True
    environment.selected = state.selected_steps()
    keeper = persistence.StateKeeper(environment)
    runner = PhaseRunner(
        phases,
        environment,
        audit,
        bound=lambda phase: _limit(phase, settings, runner),
        passthrough=(pytest.exit.Exception,),
        record=environment.record,
        redo=settings.redo,
        skip=frozenset(settings.skip),
        acting=keeper.acting,
        acted=kept is not None,
    )
    runner.listeners.append(keeper)
    membership = None
    if state.joined is not None:
        membership = Membership(environment, runner, state.phase_reported)
    progress = ProgressListener(state.config, usual_times(run.dir.parent, settings.host or ""))
    _add_listeners(state, environment, runner, progress)
    return OpenRun(state, environment, runner, lock=lock, membership=membership, progress=progress)


def _add_listeners(
    state: SessionState, environment: Environment, runner: PhaseRunner, progress: ProgressListener
) -> None:
    runner.listeners.append(FailureListener(environment))  # first: the report shows its results
    runner.listeners.append(ReportListener(environment.run.dir))
    # By its option, not by the host's answers: preflight is the first to connect, and explains a failure.
    if state.settings.keep != "no":
        from pytest_nestedpve.setup.snapshots import SnapshotKeeper

        runner.listeners.append(SnapshotKeeper(environment, runner.complete))
    runner.listeners.append(progress)
    runner.listeners.append(ProjectHooks(state.config, environment, state.tally.add_hook_failure))


def _limit(phase: Phase, settings: Settings, runner: PhaseRunner) -> contextlib.AbstractContextManager[None]:
    """The phase's own limit, or the rest of the limit of the whole set-up if that is shorter."""
    subject, seconds = f"the phase {phase.name}", phase.timeout
    if settings.timeout is not None:
        rest = max(0.01, settings.timeout - sum(runner.seconds.values()))
        if rest < seconds:
            subject, seconds = f"the set-up, at {phase.name} (nested_pve_timeout)", rest
    return limit(seconds, subject)
