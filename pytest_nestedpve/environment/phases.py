"""Phases, the named steps of the set-up, and what the runner reports of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_nestedpve.environment.attached import Guard
    from pytest_nestedpve.environment.environment import Environment


DONE, PROVED, ATTACHED, FAILED = "done", "proved", "attached", "failed"
SETTLED = (DONE, PROVED, ATTACHED)
_NAME = re.compile(r"[a-z][a-z0-9_]{0,40}\Z")

Facts = dict[str, Any]


class PhaseListError(ValueError):
    """The list of phases, with the project's changes, cannot be run: a duplicate name, an unknown need."""


@dataclass(frozen=True)
class Phase:
    """A named step of the set-up.

    `do`, its action, may return facts, which become `environment.facts[name]`; a fact `did` is one line
    for the report. `probe` returns the facts of a phase that is done already, else None; without a probe the
    action always runs. Both raise a PveError to fail; any other exception is shown with its traceback.
    `timeout` (seconds) bounds `probe` and `do` together. `needs` names earlier phases that must be done
    first, None means all of them. `usual` (seconds) is the expected duration, shown until there is one of
    an earlier run on the same host. `inputs` returns the values that the phase depends on beside the phases
    before it (texts, numbers, lists, maps): when they change, or those of one of the phases `depends` (None:
    all before it), the phase is done again on a kept environment.
    `outcome` is the status after the action: "attached" for one that only describes what exists. A `guard`
    has the phase probed first, also as a step, and permits its action or not.
    """

    name: str
    title: str
    do: Callable[[Environment], Mapping[str, Any] | None]
    probe: Callable[[Environment], Mapping[str, Any] | None] | None = None
    timeout: float = 600.0
    needs: tuple[str, ...] | None = None
    usual: float | None = None
    inputs: Callable[[Environment], object] | None = None
    depends: tuple[str, ...] | None = None
    outcome: str = DONE
    guard: Guard | None = None


@dataclass(frozen=True)
class Broken:
    """The first failure: the phase, and the text of its error."""

    phase: str
    cause: str


class PhaseBroken(Exception):
    """A phase failed, or needs one that failed earlier; always carries the first cause.

    `expected` is False when the cause was not a PveError: then its traceback is shown.
    """

    def __init__(self, broken: Broken, *, requested: str, expected: bool = True) -> None:
        text = broken.cause
        if broken.phase != requested:
            text = f"{requested} needs {broken.phase}, which failed: {text}"
        super().__init__(text)
        self.broken = broken
        self.requested = requested
        self.expected = expected


@dataclass(frozen=True)
class PhaseEnded:
    """The end of a phase.

    `status` is "done", "proved", "attached" or "failed", `seconds` the duration of probe and action, `facts`
    the facts that the phase recorded, `cause` the text of the error of a failed phase.
    """

    phase: Phase
    status: str
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)
    cause: str | None = None


class Listener:
    """Base of the listeners of a phase runner; does nothing.

    Every method is called in the thread that runs the phase, before the next one begins.
    """

    def phase_started(self, phase: Phase) -> None:
        """`phase` begins: probe and action follow."""

    def phase_finished(self, ended: PhaseEnded) -> None:
        """A phase ended, successfully or not."""

    def progress(self, text: str) -> None:
        """Receive a line about the progress of the current phase."""


def check(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """The phases as a tuple; raises PhaseListError when they cannot be run in this order."""
    names: list[str] = []
    result = tuple(phases)
    for phase in result:
        if not _NAME.match(phase.name):
            raise PhaseListError(
                f"expected a phase name of lower-case letters, digits and _, found {phase.name!r}"
            )
        if phase.name in names:
            raise PhaseListError(f"two phases are named {phase.name!r}; replace the first one in the list")
        for need in phase.needs or ():
            if need not in names:
                raise PhaseListError(
                    f"phase {phase.name!r} needs {need!r}, which is not among the phases before it: "
                    f"{', '.join(names) or 'none'}"
                )
        names.append(phase.name)
    return result


def needed_before(phases: Sequence[Phase], name: str) -> tuple[str, ...]:
    """The names of all phases that must be done before `name`, in order. Raises KeyError."""
    earlier: list[Phase] = []
    for phase in phases:
        if phase.name == name:
            break
        earlier.append(phase)
    else:
        raise KeyError(name)
    if phase.needs is None:
        return tuple(other.name for other in earlier)
    needed = set(phase.needs)
    for other in reversed(earlier):
        if other.name in needed:
            before = other.needs if other.needs is not None else needed_before(phases, other.name)
            needed.update(before)
    return tuple(other.name for other in earlier if other.name in needed)
