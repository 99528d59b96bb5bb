"""One process's environment: opened at first use, torn down once however the session ends."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.run.signals import SignalGuard, limit, write_now
from pytest_nestedpve.session import exit_status
from pytest_nestedpve.session.exit_status import NO_HOST, NoHostFailure, PhaseFailure

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.attached import Attachment
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phase_runner import PhaseRunner
    from pytest_nestedpve.environment.phases import Broken, Phase
    from pytest_nestedpve.pve.calls import CallLog
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.report.progress import ProgressListener
    from pytest_nestedpve.run.identity import Run
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.session.xdist.shared_run import Membership
    from pytest_nestedpve.setup.clean_state import CleanState

KEY = pytest.StashKey["NestedSession"]()
#: Of a test that uses the environment, also one that asked for it by `request.getfixturevalue`.
USER = pytest.StashKey[bool]()

#: The file in a run's directory that says which xdist session it belongs to.
FAMILY = "session"


class NestedSession:
    """Owner of the environment, its runner and its teardown, for one pytest process."""

    def __init__(
        self, config: pytest.Config, settings: Settings, end: Callable[[NestedSession], None]
    ) -> None:
        """`end` tears down or keeps what there is, and never raises; called once, by `finish`."""
        self.config = config
        self._end = end
        self.settings = settings
        self.tally = exit_status.Tally()
        self.run_id = os.urandom(6).hex()
        self.item: pytest.Item | None = None
        self.environment: Environment | None = None
        self.runner: PhaseRunner | None = None
        self.has_steps = False  # a test file holds the sentinel
        self.shown: dict[str, str] = {}  # phase that failed: the test that reported it first
        self.faults: dict[BaseException, Broken] = {}
        self.ran: list[str] = []  # names of the steps that ran here, as pytest-dependency knows them
        self.lost: dict[str, str] = {}  # those of them that failed: why
        self.watcher: ProgressListener | None = None  # shows what is done, set-up and teardown
        self.teardown_report: Any = None
        self.teardown_error: str | None = None
        self.job: Any = None  # of --nested-destroy-only
        self.workers = 1  # how many environments this session can need at once
        self.diagnosis: int | None = None  # exit status of --nested-doctor
        self.swept: list[str] = []  # what xdist's workers left
        self.remarks: list[str] = []  # lines for the end of the session
        self.kept_by_workers: list[str] = []  # further ones, as they are
        self.kept_until: int | None = None  # by the clock of the outer host
        self.kept_dir: Path | None = None
        self.wants_clean = False  # some test that was chosen uses nested_pve_clean
        self.clean: CleanState | None = None
        self.clean_for = ""
        self.chosen: frozenset[str] = frozenset()  # phases whose steps were chosen by -k or by id
        self._hosts: list[PveHost] = []  # open; closed by close_hosts alone
        self._phases: tuple[Phase, ...] | None = None
        self._offered: NestedPve | None = None
        self.finished = False
        self.stage = "setup"  # of the current test: setup, call or teardown
        self.thread = threading.get_ident()  # that runs the tests
        self.ready_for: pytest.Item | None = None  # the test for which the set-up was completed last
        self._stderr = 2
        self.lock: Any = None
        self.told: dict[str, Any] | None = None  # of the run that xdist's workers share, as a worker
        self.shared: Run | None = None  # the same, as the controller
        self.membership: Membership | None = None
        self.family: str | None = None  # what the workers of one xdist session have in common
        self.guard = SignalGuard(stop=self._stop, say=self._say, give_up=self._give_up)

    # -- the list of phases ---------------------------------------------------------------------

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases, as the hooks left them. Raises PhaseListError."""
        if self._phases is None:
            from pytest_nestedpve import setup as packaged
            from pytest_nestedpve.environment.phases import check

            phases = list(packaged.default_phases())
            self.config.hook.pytest_nestedpve_phases(phases=phases, config=self.config)
            self._phases = check(phases)
        return self._phases

    def target(self, upto: str | None) -> str | None:
        """The last phase that is wanted; None for none. Raises pytest.UsageError for a name that is none."""
        names = [phase.name for phase in self.phases]
        if upto is None:
            return names[-1] if names else None
        if upto not in names:
            raise pytest.UsageError(
                f"nested_pve(upto={upto!r}): expected the name of a phase: {', '.join(names)}"
            )
        return upto

    # -- the host ------------------------------------------------------------------------------

    def host_is_named(self) -> bool:
        """Whether a host can be had: by a setting, or by a hook of the project."""
        hooks = self.config.hook.pytest_nestedpve_host.get_hookimpls()
        return self.settings.host is not None or len(hooks) > 1

    def connect(self) -> PveHost:
        """Open the outer host; `close_hosts` closes it. Raises PveError."""
        from pytest_nestedpve.pve.errors import PveError

        host = self.config.hook.pytest_nestedpve_host(config=self.config, settings=self.settings)
        if host is None:
            raise PveError(NO_HOST)
        self._hosts.append(host)
        return self._hosts[-1]

    def remark(self, *lines: str) -> None:
        """Have lines reported at the end of the session; a line that is there already is not repeated."""
        self.remarks += [line for line in lines if line not in self.remarks]

    def command_log(self) -> CallLog | None:
        """Where commands on the outer host are recorded; None if there is no run."""
        return self.environment.audit.calls() if self.environment is not None else None

    # -- set-up --------------------------------------------------------------------------------

    @property
    def opened(self) -> bool:
        return self.runner is not None

    def open(self) -> None:
        """Make the run on this side: directory, keys, audit log. Nothing is made on the host yet."""
        from pytest_nestedpve.environment.phases import Broken, PhaseBroken, PhaseListError
        from pytest_nestedpve.pve.errors import PveError

        if self.finished:
            raise PhaseFailure(
                PhaseBroken(Broken("teardown", "the environment is torn down already"), wanted="")
            )
        if self.opened:
            return
        if not self.host_is_named():
            raise NoHostFailure
        self.take_signals()
        try:
            with self.unlimited():  # keys and imports are no part of the test's time, either
                self._open()
        except (PveError, PhaseListError) as e:
            raise Failed(f"nested-pve: {e}", pytrace=False) from e

    def _open(self) -> None:
        from pytest_nestedpve.environment import persistence
        from pytest_nestedpve.environment.environment import Environment
        from pytest_nestedpve.environment.phase_runner import PhaseRunner
        from pytest_nestedpve.run import kept_runs, old_runs
        from pytest_nestedpve.run.audit_log import AuditLog
        from pytest_nestedpve.run.directory import FINISHED
        from pytest_nestedpve.run.identity import Run
        from pytest_nestedpve.session.xdist.shared_run import Membership, joined

        phases = self.phases
        kept = None
        if self.told is None:
            taken = kept_runs.take_lock(self.settings, self.config.rootpath, self.run_id)
            kept, self.lock = taken.kept, taken.lock
            self.run_id = kept.run if kept is not None else self.run_id
            self.remarks += taken.remarks
        run = Run.create(self.settings, self.config.rootpath, run_id=self.run_id)
        if self.told is not None:
            run = joined(run, self.told, self.settings)
        old_runs.prune(run.dir.parent, own=run.id)
        if self.family is not None:
            run.directory.write(FAMILY, self.family)
        audit = AuditLog(run.directory.audit, run.id)
        if self.told is None:
            audit.write("session", status="resumed" if kept is not None else "new")
        runner: PhaseRunner
        environment = Environment(
            settings=self.settings,
            run=run,
            connect=self.connect,
            audit=audit,
            progress=lambda text: runner.progress(text),
            rootdir=self.config.rootpath,
        )
        if self.told is None:
            environment.workers = self.workers
        if kept is not None:
            (run.dir / FINISHED).unlink(missing_ok=True)
            kept_runs.restore(kept, run.directory)
            persistence.load(environment)
            environment.resumed = True
        attachment = self.attachment()
        environment.chosen = attachment.chosen if attachment is not None else frozenset()
        keeper = persistence.StateKeeper(environment)
        runner = PhaseRunner(
            phases,
            environment,
            audit,
            bound=self._bound,
            passthrough=(pytest.exit.Exception,),
            record=environment.record,
            redo=self.settings.redo,
            skip=frozenset(self.settings.skip),
            acting=keeper.acting,
            acted=kept is not None,
            attachment=attachment,
        )
        runner.listeners.append(keeper)
        self.environment, self.runner = environment, runner
        if self.told is not None:
            self.membership = Membership(environment, runner, self.shown)
        self._add_listeners(runner)

    def attachment(self) -> Attachment | None:
        """How phases are treated where the nested PVE is one that exists."""
        if self.settings.attach is None:
            return None
        from pytest_nestedpve.environment.attached import Attachment
        from pytest_nestedpve.setup.attached import taken

        several = hasattr(self.config, "workerinput")
        chosen = frozenset() if several else self.chosen
        return Attachment(self.settings.attach, chosen, taken, several)

    def _bound(self, phase: Phase) -> contextlib.AbstractContextManager[None]:
        """The phase's own limit, or what is left of the limit of the whole set-up."""
        what, seconds = f"the phase {phase.name}", phase.timeout
        if self.settings.timeout is not None and self.runner is not None:
            left = max(0.01, self.settings.timeout - sum(self.runner.seconds.values()))
            if left < seconds:
                what, seconds = f"the set-up, at {phase.name} (nested_pve_timeout)", left
        return limit(seconds, what)

    def _turn(self) -> contextlib.AbstractContextManager[None]:
        """Alone at the set-up, where workers share the environment."""
        return self.membership.turn() if self.membership is not None else contextlib.nullcontext()

    def take_signals(self) -> None:
        """Have INT, TERM and HUP end the session from now on."""
        if not self.guard.installed:
            from pytest_nestedpve.session import pytest_compat

            with pytest_compat.uncaptured(self.config):
                self._stderr = os.dup(2)
            self.guard.install()

    def _add_listeners(self, runner: PhaseRunner) -> None:
        from pytest_nestedpve.report.failure import FailureListener
        from pytest_nestedpve.report.hooks import ReportListener
        from pytest_nestedpve.report.progress import ProgressListener
        from pytest_nestedpve.report.usual_times import usual_times
        from pytest_nestedpve.session.project_hooks import Announcer

        assert self.environment is not None
        self.register_report()
        runner.listeners.append(FailureListener(self.environment))  # the report shows what this finds
        runner.listeners.append(ReportListener(self.environment.run.dir))
        # By its setting: the host is first spoken to in preflight, which tells what is wrong with it.
        if self.settings.keep != "no":
            from pytest_nestedpve.setup.snapshots import SnapshotKeeper

            runner.listeners.append(SnapshotKeeper(self.environment, runner.complete))
        usual = usual_times(self.environment.run.dir.parent, self.settings.host or "")
        self.watcher = ProgressListener(self.config, usual)
        runner.listeners.append(self.watcher)
        runner.listeners.append(Announcer(self.config, self.environment, self.tally.hooks))

    def register_report(self) -> None:
        """Have the report's hooks take part in this session."""
        from pytest_nestedpve.report.hooks import SessionReport
        from pytest_nestedpve.run import rerun_commands

        if self.config.pluginmanager.hasplugin("nestedpve-report"):
            return
        report = SessionReport(
            self.config,
            self._run_directory,
            mask=self._mask,
            finishing_command=self.finishing_command,
            again=lambda: rerun_commands.again(self.settings),
        )
        self.config.pluginmanager.register(report, "nestedpve-report")

    def _run_directory(self) -> Path | None:
        return self.environment.run.dir if self.environment is not None else None

    def _mask(self, text: str) -> str:
        return self.environment.audit.masker.mask(text) if self.environment is not None else text

    def settle(self, work: Callable[[PhaseRunner, str], None]) -> None:
        """Run phases on behalf of the current test, outside pytest-timeout's limit for it.

        Raises PhaseFailure; an error that is not a PveError is raised as it is, with its traceback.
        """
        from pytest_nestedpve.environment.phases import PhaseBroken

        assert self.runner is not None
        by = self.item.nodeid if self.item is not None else ""
        try:
            with self.unlimited(), self._turn():
                work(self.runner, by)
        except PhaseBroken as error:
            if error.expected or error.__cause__ is None:
                raise PhaseFailure(error) from None
            # A fault in the code of a phase: its own traceback says most.
            self.faults[error.__cause__] = error.broken
            raise error.__cause__ from None

    def step(self, item: Any) -> Callable[[], None]:
        """Do what the step `item` needs; return what does the step itself."""
        name: str = item.phase_name
        assert self.runner is not None
        before = self.runner.status.get(name)
        by = self.runner.done_by.get(name, "")
        self.settle(lambda runner, who: runner.prepare(name, by=who))

        def call() -> None:
            self.settle(lambda runner, who: runner.execute(name, by=who))
            note = [
                (properties.PROPERTY_PHASE, name),
                (properties.PROPERTY_STATUS, runner.status[name]),
                (properties.PROPERTY_SECONDS, round(runner.seconds[name], 3)),
            ]
            if before is not None:
                note.append((properties.PROPERTY_DONE_BY, by))
            item.user_properties.extend(note)
            if name in self.settings.skip:
                # Neither done nor asked for: a step that passes was one of both.
                raise pytest.skip.Exception("taken as done, as --nested-skip says", _use_item_location=True)

        from pytest_nestedpve.report import properties

        runner = self.runner
        return call

    def ensure_for(self, item: pytest.Item | None) -> None:
        """Set up as far as the test wants it."""
        from pytest_nestedpve.pve.errors import PveError
        from pytest_nestedpve.session.pytest_compat import wanted

        self.ready_for = item or self.item

        name = self.target(wanted(item))
        if name is not None:
            self.settle(lambda runner, who: runner.ensure(name, by=who))
        complete = self.runner is not None and self.runner.complete()
        if self.wants_clean and complete and self.membership is None and self.clean is None:
            # Now, before any test has it.
            try:
                self._clean_state()
            except PveError as e:
                raise Failed(f"nested_pve_clean: {e}", pytrace=False) from e

    def demand(self) -> None:
        """The current test uses the fixture's value: unknown if it asked by `request.getfixturevalue`."""
        item = self.item
        # What goes on beside the tests, or after them, wants no more than there is.
        idle = self.stage == "teardown" or self.finished or threading.get_ident() != self.thread
        if item is not None and item is not self.ready_for and not idle:
            item.stash[USER] = True
            self.ensure_for(item)

    def give_clean(self, item: pytest.Item) -> None:
        """Have the state after set-up again, unless the current test shares it with one before."""
        from pytest_nestedpve.pve.errors import PveError
        from pytest_nestedpve.session.pytest_compat import clean_scope

        assert self.environment is not None
        if self.membership is not None:
            raise Failed(
                "nested_pve_clean: the workers share one environment (nested_pve_scope = run), which a "
                "rollback would take from under the others; expected the scope worker",
                pytrace=False,
            )
        self.ensure_for(None)  # completely, whatever else the test says: what is not in it a rollback undoes
        key = clean_scope(item)
        # A test that has one by itself is given it each time: it may be a rerun.
        if key == self.clean_for and key != item.nodeid:
            return
        self.clean_for = ""
        try:
            with self.unlimited():
                self._clean_state().give()
        except PveError as e:
            raise Failed(f"nested_pve_clean: {e}", pytrace=False) from e
        self.clean_for = key
        item.user_properties.append(("nested_pve_clean", self._clean_state().gave))

    def _clean_state(self) -> CleanState:
        """The clean state; at the first call it is as the environment is now."""
        from pytest_nestedpve.setup.clean_state import CleanState

        assert self.environment is not None
        assert self.runner is not None
        if self.clean is None:
            self.clean = CleanState(self.environment)
            setup = [phase.name for phase in self.phases if phase.probe is not None]
            self.clean.remember(fresh=any(self.runner.status.get(name) == "done" for name in setup))
        return self.clean

    def nested_pve(self) -> NestedPve:
        """The value of the fixture: set up as far as the current test wants it."""
        from pytest_nestedpve.session.nested_pve import NestedPve

        assert self.environment is not None
        self.ensure_for(self.item)
        if self._offered is None:
            self._offered = NestedPve(self.environment, self.demand)
        return self._offered

    def unlimited(self) -> contextlib.AbstractContextManager[None]:
        """Without pytest-timeout's limit for the current test."""
        from pytest_nestedpve.session import pytest_compat

        return pytest_compat.timer_stopped(self.config, self.item, self.stage)

    def failed_need(self, phase_name: str) -> Broken | None:
        """The cause, when a phase that `phase_name` needs has failed."""
        from pytest_nestedpve.environment.phases import needed_before

        runner = self.runner
        if runner is None or runner.broken is None:
            return None
        for need in needed_before(self.phases, phase_name):
            cause = runner.cause(need)
            if cause is not None:
                return cause
        return None

    # -- teardown ------------------------------------------------------------------------------

    def finish(self) -> None:
        """Tear down or keep, once; never raises. What is left is in `teardown_report` or `teardown_error`."""
        self.guard.counting = True
        if self.finished or self.environment is None:
            return
        self.finished = True
        self._end(self)

    def finishing_command(self) -> str:
        """The command that finishes a teardown that did not."""
        from pytest_nestedpve.run import rerun_commands

        run = self.environment.run.id if self.environment is not None else None
        return rerun_commands.finishing(self.settings, run)

    def close_hosts(self) -> None:
        """Close what `connect` opened, the latest first: connections, tokens, the lab's lease."""
        while self._hosts:
            with contextlib.suppress(Exception):
                self._hosts.pop().close()

    # -- signals -------------------------------------------------------------------------------

    def _stop(self, text: str) -> None:
        session = self.config.stash.get(_SESSION, None)
        if session is not None:
            session.shouldstop = text

    def _say(self, text: str) -> None:
        write_now(self._stderr, text)

    def _give_up(self, signum: int) -> None:
        text = f"giving up on the teardown; this finishes it:\n    {self.finishing_command()}"
        write_now(self._stderr, text)
        os._exit(128 + signum)

    def close(self) -> None:
        """The last thing of a session: signals as before, the lines' descriptor closed."""
        self.finish()
        self.close_hosts()  # a clean-up has a host and no environment
        if self.environment is not None:
            self.environment.audit.close()
        self.guard.remove()
        if self._stderr != 2:
            os.close(self._stderr)
            self._stderr = 2


_SESSION = pytest.StashKey[pytest.Session]()


def remember(session: pytest.Session) -> None:
    """Keep the pytest session where a signal handler finds it."""
    session.config.stash[_SESSION] = session
