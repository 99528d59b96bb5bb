"""The phase runner: runs phases in their order, each once, and keeps the cause of the first failure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.phase_record import PhaseRecord, digest

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

from pytest_nestedpve.environment.phases import (
    DONE,
    FAILED,
    PROVED,
    SETTLED,
    Broken,
    Facts,
    Listener,
    Phase,
    PhaseBroken,
    PhaseEnded,
    check,
    needed_before,
)


class AuditSink(Protocol):
    """The part of the audit log that the runner uses."""

    def write(self, event: str, /, **fields: Any) -> Any: ...


def _ignore(_phase: Phase) -> None:
    return None


def _no_bound(_phase: Phase) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class PhaseRunner:
    """Runs the phases of one environment, each at most once; the first failure ends the run.

    `status[name]` is "done" (its action ran), "proved" (by its probe), "attached" (it describes what exists)
    or "failed"; `done_by[name]` the id of the test it ran for; `seconds[name]` its duration.
    `bound(phase)` is entered around each phase and may interrupt it at its time limit.
    `passthrough` are exceptions that end the session; they are not a failure of the phase.
    `record` has the phases of earlier sessions: one whose inputs have changed since is done again, one with
    the same inputs is proved by its probe alone, unless `redo` is on and its step is executed.
    `skip` names phases that count as done without a probe. `acting` is called before a phase's action.
    """

    phases: tuple[Phase, ...]
    environment: Environment
    audit: AuditSink
    listeners: list[Listener] = field(default_factory=list)
    bound: Callable[[Phase], contextlib.AbstractContextManager[None]] = _no_bound
    passthrough: tuple[type[BaseException], ...] = ()
    record: PhaseRecord = field(default_factory=PhaseRecord)
    redo: bool = False
    skip: frozenset[str] = frozenset()
    acting: Callable[[Phase], None] = _ignore
    status: dict[str, str] = field(default_factory=dict)
    done_by: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    broken: Broken | None = None
    current: str | None = None
    _causes: dict[str, Broken] = field(default_factory=dict, repr=False)
    acted: bool = False  # an action other than preflight began: a teardown may be necessary

    def __post_init__(self) -> None:
        self.phases = check(self.phases)
        self._by_name = {phase.name: phase for phase in self.phases}

    def phase(self, name: str) -> Phase:
        """The phase of that name; raises KeyError."""
        return self._by_name[name]

    def prepare(self, name: str, *, by: str = "") -> None:
        """Settle every phase that `name` needs: by its probe, else by its action."""
        for need in needed_before(self.phases, name):
            self._settle(self._by_name[need], by=by, requested=name, probe=True)

    def ensure(self, name: str, *, by: str = "") -> None:
        """`prepare`, then the phase itself, probed first. Raises PhaseBroken."""
        self.prepare(name, by=by)
        self._settle(self._by_name[name], by=by, requested=name, probe=True)

    def execute(self, name: str, *, by: str = "") -> None:
        """`prepare`, then the phase's action unless this runner has settled it. Raises PhaseBroken."""
        self.prepare(name, by=by)
        self._settle(self._by_name[name], by=by, requested=name, probe=False)

    def complete(self) -> bool:
        """Whether the last phase is settled, and all that it needs."""
        if not self.phases:
            return False
        last = self.phases[-1].name
        names = (*needed_before(self.phases, last), last)
        return all(self.status.get(name) in SETTLED for name in names)

    def cause(self, name: str) -> Broken | None:
        """The failure of the phase `name` itself; None if it did not fail."""
        return self._causes.get(name)

    def record_failure(self, broken: Broken) -> None:
        """Record a failure in another process that shares this environment."""
        self._causes[broken.phase] = broken
        self.status[broken.phase] = FAILED
        self.broken = self.broken or broken

    def progress(self, text: str) -> None:
        """Report the progress of the current phase to the listeners."""
        for listener in self.listeners:
            listener.progress(text)

    def _settle(self, phase: Phase, *, by: str, requested: str, probe: bool) -> None:
        if self.status.get(phase.name) in SETTLED:
            return
        self._check_needs(phase, requested)
        self.current = phase.name
        for listener in self.listeners:
            listener.phase_started(phase)
        self.audit.write("phase_start", phase=phase.name, title=phase.title)
        started = time.monotonic()
        cause: str | None = None
        status = FAILED
        facts: Facts = {}
        try:
            with self.bound(phase):
                status, facts = self._run(phase, probe)
        except self.passthrough as end:
            cause = self._record_cause(phase, f"interrupted: {end}")
            raise
        except Exception as error:
            expected = isinstance(error, PveError)
            cause = self._record_cause(phase, str(error) if expected else f"{type(error).__name__}: {error}")
            raise PhaseBroken(self._causes[phase.name], requested=requested, expected=expected) from error
        except BaseException as end:
            cause = self._record_cause(phase, f"interrupted: {str(end) or type(end).__name__}")
            raise
        finally:
            seconds = time.monotonic() - started
            self.current = None
            self.status[phase.name] = status
            self.seconds[phase.name] = seconds
            self.done_by[phase.name] = by
            self.audit.write(
                "phase_end",
                phase=phase.name,
                status=status,
                ms=round(seconds * 1000, 1),
                cause=cause,
                facts=facts,
            )
            ended = PhaseEnded(phase, status, seconds, facts, cause)
            for listener in self.listeners:
                listener.phase_finished(ended)

    def _run(self, phase: Phase, probe: bool) -> tuple[str, Facts]:
        facts = self.environment.facts
        if phase.name in self.skip:
            facts[phase.name] = {**facts.get(phase.name, {}), "did": "assumed done (--nested-skip)"}
            return PROVED, dict(facts[phase.name])
        guard = phase.guard
        current = self._digest(phase) if phase.probe is not None else None
        recorded = self.record.digests.get(phase.name)
        may_prove = probe or (recorded is not None and not self.redo)
        may_prove = may_prove or (guard is not None and not (guard.selected and self.redo))
        if phase.probe is not None and may_prove and recorded in (None, current):
            proved = phase.probe(self.environment)
            if proved is not None:
                facts[phase.name] = dict(proved)
                self._record_digest(phase, current)
                return PROVED, dict(proved)
        if guard is not None:
            missing = self.environment.missing.get(phase.name)
            guard.check(phase.name, missing, probed=phase.probe is not None)
        if phase.name != "preflight" and phase.outcome == DONE:
            self.acted = True
        if phase.probe is not None:
            self.record.doubt([phase.name])
            self.record.begun = phase.name
            self.acting(phase)
        result = dict(phase.do(self.environment) or {})
        facts[phase.name] = result
        self._record_digest(phase, current)
        return phase.outcome, result

    def _digest(self, phase: Phase) -> str:
        inputs = phase.inputs(self.environment) if phase.inputs is not None else None
        needed = phase.depends if phase.depends is not None else needed_before(self.phases, phase.name)
        digests = self.record.digests
        return digest(phase.name, inputs, {name: digests[name] for name in needed if name in digests})

    def _record_digest(self, phase: Phase, current: str | None) -> None:
        if current is not None:
            self.record.digests[phase.name] = current
            self.record.begun = None

    def _check_needs(self, phase: Phase, requested: str) -> None:
        failed = self._failed_need(phase)
        if failed is not None:
            raise PhaseBroken(self._causes[failed.name], requested=requested)

    def _failed_need(self, phase: Phase) -> Phase | None:
        for name in (*needed_before(self.phases, phase.name), phase.name):
            if self.status.get(name) == FAILED:
                return self._by_name[name]
        return None

    def _record_cause(self, phase: Phase, cause: str) -> str:
        self._causes[phase.name] = Broken(phase.name, cause)
        if self.broken is None:
            self.broken = self._causes[phase.name]
        return cause
