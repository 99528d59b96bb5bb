"""State of the pytest session in this process: selected tests, current test, steps, final lines.

session.py begins and ends the session; the session, the open run and the hooks share this data.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.session.exit_status import Tally

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.phases import Broken, Phase
    from pytest_nestedpve.run.signals import SignalGuard
    from pytest_nestedpve.session.xdist.shared_run import SharedRun

#: In an item's stash: it uses the environment, perhaps only by `request.getfixturevalue`.
USER = pytest.StashKey[bool]()


@dataclass(frozen=True)
class KeptEnvironment:
    """The environment that this session keeps: `until` in seconds, by the clock of the outer host."""

    until: int
    directory: Path


class SessionState:
    """State of one process's pytest session. Only the methods of this class assign its attributes."""

    def __init__(self, config: pytest.Config, settings: Settings, guard: SignalGuard) -> None:
        self.config = config
        self.settings = settings
        self.guard = guard
        self.tally = Tally()
        self.run_id = os.urandom(6).hex()
        self._phases: tuple[Phase, ...] | None = None
        # xdist
        self.family: str | None = None  # the same in all processes of one xdist session
        self.joined: Mapping[str, Any] | None = None  # as a worker: the shared run, from the controller
        self.shared: SharedRun | None = None  # as the controller: the run that all workers share
        self.workers = 1  # how many environments this session can need at once
        # the selected tests
        self.has_steps = False  # a test file imports pytest_nestedpve.steps
        self.needs_clean_state = False  # a selected test uses nested_pve_clean
        self.selected_phases: frozenset[str] = frozenset()  # phases whose steps -k or an id selected
        # the current test
        self.item: pytest.Item | None = None
        self.stage = "setup"  # or call, or teardown
        self.thread = threading.get_ident()  # the thread that runs the tests
        # outcomes
        self.first_reports: dict[str, str] = {}  # failed phase: the first test that reported it
        self.faults: dict[BaseException, Broken] = {}  # errors in the code of a phase
        self.steps_run: list[str] = []  # run in this process, by the names that pytest-dependency uses
        self.failed_steps: dict[str, str] = {}  # failed ones of them: the cause
        # results of modes that run no tests
        self.destroy_job: Any = None  # plan of --nested-destroy-only
        self.diagnosis: int | None = None  # exit status of --nested-doctor
        # the end
        self.remarks: list[str] = []
        self.kept: KeptEnvironment | None = None
        self.kept_by_workers: list[str] = []
        self.left_by_workers: list[str] = []

    # -- the start of the session ------------------------------------------------------------------

    def start_family(self) -> str:
        """As the controller: give the processes of this xdist session a common name, once."""
        if self.family is None:
            self.family = os.urandom(8).hex()
        return self.family

    def join(self, family: str | None, shared: Mapping[str, Any] | None) -> None:
        """As a worker: take part in the controller's session, and in its shared run if there is one."""
        self.family, self.joined = family, shared
        if shared is not None:
            self.run_id = str(shared["run"])

    def share(self, shared: SharedRun) -> None:
        """As the controller: have all workers use one run."""
        self.shared, self.run_id = shared, shared.run.id

    def use_settings(self, settings: Settings) -> None:
        """Replace the settings. Has no effect on a run that is open."""
        self.settings = settings

    def resume(self, run_id: str) -> None:
        """Open the kept run `run_id` in place of a new run."""
        self.run_id = run_id

    # -- phases and selected tests -------------------------------------------------------------------

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The phases after the hook pytest_nestedpve_phases. Raises PhaseListError."""
        if self._phases is None:
            from pytest_nestedpve import setup as packaged
            from pytest_nestedpve.environment.phases import check

            own = self.settings.attach is None
            phases = packaged.default_phases() if own else packaged.attached_phases()
            self.config.hook.pytest_nestedpve_phases(phases=phases, config=self.config)
            self._phases = check(phases)
        return self._phases

    def permitted_phases(self) -> tuple[Phase, ...]:
        """The phases, those of an attached PVE restricted to the permitted changes. Raises PhaseListError."""
        if self.settings.attach is None:
            return self.phases
        from pytest_nestedpve.setup.attached_phases import permitted

        several = hasattr(self.config, "workerinput")
        return permitted(self.phases, self.settings.attach, self.selected_steps(), several=several)

    def selected_steps(self) -> frozenset[str]:
        """The phases whose steps were selected by name; none in a worker: workers share that PVE."""
        return frozenset() if hasattr(self.config, "workerinput") else self.selected_phases

    def last_phase(self, upto: str | None) -> str | None:
        """The last phase's name: `upto`, or the last of all. Raises pytest.UsageError for an unknown name."""
        names = [phase.name for phase in self.phases]
        if upto is None:
            return names[-1] if names else None
        if upto not in names:
            raise pytest.UsageError(
                f"nested_pve(upto={upto!r}): expected the name of a phase: {', '.join(names)}"
            )
        return upto

    def steps_collected(self) -> None:
        """A test file imports the sentinel pytest_nestedpve.steps."""
        self.has_steps = True

    def tests_selected(self, *, workers: int, needs_clean_state: bool, phases: frozenset[str]) -> None:
        """The selection is final. `phases`: see `selected_phases`."""
        self.workers, self.needs_clean_state, self.selected_phases = workers, needs_clean_state, phases

    # -- each test -------------------------------------------------------------------------------------

    def test_started(self, item: pytest.Item) -> None:
        """pytest begins the set-up of `item`."""
        self.item, self.stage, self.thread = item, "setup", threading.get_ident()

    def stage_started(self, stage: str) -> None:
        """pytest begins the call or the teardown of the current test."""
        self.stage = stage

    def unlimited(self) -> contextlib.AbstractContextManager[None]:
        """Hold pytest-timeout's limit of the current test."""
        from pytest_nestedpve.session import pytest_compat

        return pytest_compat.timer_stopped(self.config, self.item, self.stage)

    def phase_reported(self, phase: str, nodeid: str) -> None:
        """A test reports the failure of `phase`; the first one is remembered."""
        self.first_reports.setdefault(phase, nodeid)

    def phase_raised(self, error: BaseException, broken: Broken) -> None:
        """The code of a phase raised an error that is no PveError."""
        self.faults[error] = broken

    def step_ran(self, name: str, cause: str | None) -> None:
        """A step ran. `cause`: of its failure; None if it passed, also as a rerun."""
        if name not in self.steps_run:
            self.steps_run.append(name)
        if cause is not None:
            self.failed_steps[name] = cause
        else:
            self.failed_steps.pop(name, None)

    # -- results ---------------------------------------------------------------------------------------

    def destroy_planned(self, job: Any) -> None:
        """The plan of --nested-destroy-only is complete."""
        self.destroy_job = job

    def diagnosed(self, status: int) -> None:
        """--nested-doctor ended with `status`."""
        self.diagnosis = status

    def remark(self, *lines: str) -> None:
        """Have lines reported at the end of the session."""
        self.remarks += lines

    def remark_once(self, *lines: str) -> None:
        """Have lines reported at the end of the session, without lines that are remarks already."""
        self.remarks += [line for line in lines if line not in self.remarks]

    def take_remarks(self) -> list[str]:
        """Return and clear the remarks, for a caller that reports them itself."""
        remarks, self.remarks = self.remarks, []
        return remarks

    def environment_kept(self, until: int, directory: Path) -> None:
        """The environment outlives the session."""
        self.kept = KeptEnvironment(until, directory)

    def worker_ended(self, remarks: list[str], kept: list[str]) -> None:
        """As the controller: a worker's lines for the end of the session."""
        self.remarks += remarks
        self.kept_by_workers += kept

    def workers_left(self, lines: list[str]) -> None:
        """As the controller: leftovers of the workers' runs, a line each."""
        self.left_by_workers = lines
        self.tally.record_leftovers(bool(lines))
