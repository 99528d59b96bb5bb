"""The phase runner: phases in their order, each once, the first cause kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.phase_record import PhaseRecord, digest

if TYPE_CHECKING:
    from pytest_nestedpve.environment.attached import Attachment
    from pytest_nestedpve.environment.environment import Environment

from pytest_nestedpve.environment.phases import (
    ATTACHED,
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
    """What the runner needs of the audit log."""

    def write(self, event: str, /, **fields: Any) -> Any: ...


def _unheard(_phase: Phase) -> None:
    return None


def _no_bound(_phase: Phase) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@dataclass
class PhaseRunner:
    """Does the phases of one environment, each at most once; broken for good by the first failure.

    `status[name]` is "done" (its action ran), "proved" (its probe said yes), "attached" (taken as it is) or
    "failed";
    `done_by[name]` says on whose behalf; `seconds[name]` how long it took.
    `bound(phase)` is entered around each phase and may interrupt it when its time is up.
    `passthrough` are exceptions that end the session and are not a failure of the phase.
    `record` is what is known of the phases from earlier sessions on: one whose inputs have changed since is
    done again, one whose inputs have not is proved by its probe alone, unless `redo` is on and it was chosen.
    `skip` names phases that are taken as done, unasked. `acting` is told before a phase's action begins.
    `attachment`: the nested PVE is one that exists, and phases mean what that says.
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
    acting: Callable[[Phase], None] = _unheard
    attachment: Attachment | None = None
    status: dict[str, str] = field(default_factory=dict)
    done_by: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    broken: Broken | None = None
    current: str | None = None
    _causes: dict[str, Broken] = field(default_factory=dict, repr=False)
    acted: bool = False  # something other than preflight began to act: there may be something to tear down

    def __post_init__(self) -> None:
        self.phases = check(self.phases)
        self._by_name = {phase.name: phase for phase in self.phases}

    def phase(self, name: str) -> Phase:
        """The phase of that name; raises KeyError."""
        return self._by_name[name]

    def prepare(self, name: str, *, by: str = "") -> None:
        """Everything that `name` needs, probed first and done where the probe says no."""
        for need in needed_before(self.phases, name):
            self._settle(self._by_name[need], by=by, wanted=name, probe=True)

    def ensure(self, name: str, *, by: str = "") -> None:
        """`prepare`, then the phase itself, probed first. Raises PhaseBroken."""
        self.prepare(name, by=by)
        self._settle(self._by_name[name], by=by, wanted=name, probe=True)

    def execute(self, name: str, *, by: str = "") -> None:
        """`prepare`, then the phase's action unless this runner has settled it. Raises PhaseBroken."""
        self.prepare(name, by=by)
        self._settle(self._by_name[name], by=by, wanted=name, probe=False)

    def complete(self) -> bool:
        """Whether the last phase is settled, and all that it needs."""
        if not self.phases:
            return False
        last = self.phases[-1].name
        names = (*needed_before(self.phases, last), last)
        return all(self.status.get(name) in SETTLED for name in names)

    def cause(self, name: str) -> Broken | None:
        """Why the phase failed itself; None if it did not."""
        return self._causes.get(name)

    def learn(self, broken: Broken) -> None:
        """A phase failed elsewhere, in a process that shares this environment."""
        self._causes[broken.phase] = broken
        self.status[broken.phase] = "failed"
        self.broken = self.broken or broken

    def progress(self, text: str) -> None:
        """Tell the listeners what the current phase is at."""
        for listener in self.listeners:
            listener.progress(text)

    def _settle(self, phase: Phase, *, by: str, wanted: str, probe: bool) -> None:
        if self.status.get(phase.name) in SETTLED:
            return
        self._refuse_if_broken(phase, wanted)
        self.current = phase.name
        for listener in self.listeners:
            listener.phase_started(phase)
        self.audit.write("phase_start", phase=phase.name, title=phase.title)
        started = time.monotonic()
        cause: str | None = None
        status = "failed"
        facts: Facts = {}
        try:
            with self.bound(phase):
                status, facts = self._run(phase, probe)
        except self.passthrough as end:
            cause = self._break(phase, f"interrupted: {end}")
            raise
        except Exception as error:
            expected = isinstance(error, PveError)
            cause = self._break(phase, str(error) if expected else f"{type(error).__name__}: {error}")
            raise PhaseBroken(self._causes[phase.name], wanted=wanted, expected=expected) from error
        except BaseException as end:
            cause = self._break(phase, f"interrupted: {str(end) or type(end).__name__}")
            raise
        finally:
            took = time.monotonic() - started
            self.current = None
            self.status[phase.name] = status
            self.seconds[phase.name] = took
            self.done_by[phase.name] = by
            self.audit.write(
                "phase_end",
                phase=phase.name,
                status=status,
                ms=round(took * 1000, 1),
                cause=cause,
                facts=facts,
            )
            ended = PhaseEnded(phase, status, took, facts, cause)
            for listener in self.listeners:
                listener.phase_finished(ended)

    def _run(self, phase: Phase, probe: bool) -> tuple[str, Facts]:
        facts = self.environment.facts
        if phase.name in self.skip:
            facts[phase.name] = {**facts.get(phase.name, {}), "did": "taken as done, as --nested-skip says"}
            return "proved", dict(facts[phase.name])
        attached = self.attachment
        if attached is not None and attached.takes(phase.name):
            facts[phase.name] = dict(attached.taken(self.environment, phase.name))
            return ATTACHED, dict(facts[phase.name])
        guarded = attached is not None and attached.guards(phase.name)
        chosen = attached is not None and phase.name in attached.chosen
        now = self._digest(phase) if phase.probe is not None else None
        before = self.record.digests.get(phase.name)
        may_prove = probe or (before is not None and not self.redo)
        may_prove = may_prove or (guarded and not (chosen and self.redo))
        if phase.probe is not None and may_prove and before in (None, now):
            found = phase.probe(self.environment)
            if found is not None:
                facts[phase.name] = dict(found)
                self._did(phase, now)
                return "proved", dict(found)
        if attached is not None and guarded:
            attached.allow(
                phase.name, self.environment.missing.get(phase.name), probed=phase.probe is not None
            )
        if phase.name != "preflight":
            self.acted = True
        if phase.probe is not None:
            self.record.doubt([phase.name])
            self.record.begun = phase.name
            self.acting(phase)
        done = dict(phase.do(self.environment) or {})
        facts[phase.name] = done
        self._did(phase, now)
        return "done", done

    def _digest(self, phase: Phase) -> str:
        inputs = phase.inputs(self.environment) if phase.inputs is not None else None
        needed = phase.depends if phase.depends is not None else needed_before(self.phases, phase.name)
        digests = self.record.digests
        return digest(phase.name, inputs, {name: digests[name] for name in needed if name in digests})

    def _did(self, phase: Phase, now: str | None) -> None:
        if now is not None:
            self.record.digests[phase.name] = now
            self.record.begun = None

    def _refuse_if_broken(self, phase: Phase, wanted: str) -> None:
        failed = self._failed_need(phase)
        if failed is not None:
            raise PhaseBroken(self._causes[failed.name], wanted=wanted)

    def _failed_need(self, phase: Phase) -> Phase | None:
        for name in (*needed_before(self.phases, phase.name), phase.name):
            if self.status.get(name) == "failed":
                return self._by_name[name]
        return None

    def _break(self, phase: Phase, cause: str) -> str:
        self._causes[phase.name] = Broken(phase.name, cause)
        if self.broken is None:
            self.broken = self._causes[phase.name]
        return cause
