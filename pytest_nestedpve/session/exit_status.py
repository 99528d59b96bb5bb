"""Failures of tests that the environment causes, and the exit status: no success that verified nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from _pytest.outcomes import Failed

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.environment.phases import PhaseBroken

OK, FAILED, INTERRUPTED, USAGE, NOTHING_COLLECTED = 0, 1, 2, 4, 5

#: Attributes that a report carries (they cross from an xdist worker to the controller).
USES = "nestedpve_uses"
CAUSE = "nestedpve_cause"
STEP = "nestedpve_step"
#: On the report of a step that was skipped because an earlier one failed.
FOLLOWS = "nestedpve_follows"
#: The cause when a test needs a host and none is configured.
CAUSE_NO_HOST = "no host"

NO_HOST = (
    "no outer PVE host was named, and a test needs one. Either name one (`pytest --pve-host HOST`, where "
    "`ssh HOST` reaches a Proxmox VE host as root; or `nested_pve_host = HOST` in pytest.ini), or use the "
    "embedded lab on this machine (`pytest --pve-host lab`)"
)


class NoHostFailure(Failed):
    """A test needs the outer host, and none is configured; shown without a traceback."""

    __module__ = "builtins"  # as pytest's own: the summary's lines are short

    def __init__(self) -> None:
        super().__init__(NO_HOST, False)


class PhaseFailure(Failed):
    """A phase that the test needs has failed; shown with the first cause and without a traceback."""

    __module__ = "builtins"

    def __init__(self, error: PhaseBroken) -> None:
        super().__init__(
            f"{error.requested}: {error}" if error.broken.phase == error.requested else str(error), False
        )
        self.broken = error.broken


@dataclass
class Tally:
    """Outcomes of the session so far; the exit status follows from them."""

    nested: set[str] = field(default_factory=set)
    passed: set[str] = field(default_factory=set)
    steps_run: set[str] = field(default_factory=set)
    steps_skipped: set[str] = field(default_factory=set)  # because an earlier one failed
    failures: int = 0
    preflight_failures: int = 0
    usage: str | None = None
    hooks: list[str] = field(default_factory=list)  # a line for each hook of the project that raised
    left: bool = False  # there are leftovers on the host
    left_reason: str = "the teardown left something behind"
    signum: int | None = None
    command: int | None = None  # the exit status of --nested-exec's command
    reason: str | None = None

    def add(self, report: pytest.TestReport) -> None:
        """Count one report of a test."""
        if getattr(report, USES, False):
            self.nested.add(report.nodeid)
            if report.when == "call" and report.passed:
                self.passed.add(report.nodeid)
        if getattr(report, FOLLOWS, False):
            self.steps_skipped.add(report.nodeid)
        elif getattr(report, STEP, False) and (report.when == "call" or report.failed):
            self.steps_run.add(report.nodeid)
        if report.failed:
            self.failures += 1
            cause = getattr(report, CAUSE, None)
            if cause == "preflight":
                self.preflight_failures += 1
            elif cause == CAUSE_NO_HOST:
                self.usage = "a test needs an outer PVE host, and none was named"

    def add_collection_error(self) -> None:
        """Count a file that cannot be collected."""
        self.failures += 1

    def add_hook_failure(self, *lines: str) -> None:
        """Count hooks of the project that raised, a line each."""
        self.hooks += lines

    def record_leftovers(self, exist: bool, reason: str | None = None) -> None:
        """The teardown is over; `reason` replaces the default reason for the exit status."""
        self.left = self.left or exist
        self.left_reason = reason or self.left_reason

    def record_command(self, status: int) -> None:
        """The command of --nested-exec ended with `status`."""
        self.command = status

    def record_signal(self, signum: int | None) -> None:
        """The signal that ended the session; None: no signal did."""
        self.signum = signum

    def status(self, status: int, *, executes: bool, stopped: bool = False) -> int:
        """The exit status in place of pytest's own `status`; sets `reason` where it differs.

        `executes` is False for sessions that are to run no tests, such as a dry run. `stopped` is True when
        `--sw`, or `-x` under xdist, ended the session after a failure: pytest reports that as interrupted.
        """
        self.reason = None
        if self.signum is not None:
            self.reason = None
            return 128 + self.signum
        if self.usage is not None:
            self.reason = self.usage
            return USAGE
        if self.command:
            return self.command
        if self.left and status in (OK, NOTHING_COLLECTED):
            self.reason = self.left_reason
            return FAILED
        if self.hooks and status in (OK, NOTHING_COLLECTED):
            self.reason = "a hook of the project raised"
            return FAILED
        failed = status == FAILED or (status == INTERRUPTED and stopped)
        if failed and self.failures and self.failures == self.preflight_failures and not self.left:
            self.reason = "preflight is the only failure: the host or the settings are not usable"
            return USAGE
        if status == OK and executes and self.nested and not self.passed:
            several = f"{len(self.nested)} tests that use the nested PVE were selected and none passed"
            one = "the only selected test that uses the nested PVE did not pass"
            self.reason = f"{several if len(self.nested) > 1 else one}: nothing was verified"
            return FAILED
        return status
