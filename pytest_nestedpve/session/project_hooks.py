"""Calls of the project's hooks. One that raises is reported, and stops neither phase nor teardown."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.environment.phases import Listener
from pytest_nestedpve.run.signals import limit

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Phase, PhaseEnded
    from pytest_nestedpve.teardown.teardown import TeardownReport

#: Seconds for the hook after a teardown; those of a phase have the phase's own limit.
AFTER_TEARDOWN = 60.0


@dataclass(frozen=True)
class ProjectHooks(Listener):
    """Calls the hooks for one run. `report_failure` gets a line for each call that raised."""

    config: pytest.Config
    environment: Environment
    report_failure: Callable[[str], None]

    def phase_started(self, phase: Phase) -> None:
        """A phase begins: it is not probed yet."""
        hook = self.config.hook.pytest_nestedpve_phase_started
        self._call(hook, phase.timeout, phase.name, lambda: {"phase": phase})

    def phase_finished(self, ended: PhaseEnded) -> None:
        """A phase ended, done or failed."""
        hook = self.config.hook.pytest_nestedpve_phase_finished
        self._call(
            hook,
            ended.phase.timeout,
            ended.phase.name,
            lambda: {
                "phase": ended.phase,
                "status": ended.status,
                "seconds": ended.seconds,
                "facts": copy.deepcopy(dict(ended.facts)),
                "cause": None if ended.cause is None else self._mask(ended.cause),
            },
        )

    def teardown_finished(self, report: TeardownReport | None, left: list[str]) -> None:
        """The teardown is over; `report` is None if it had nothing to do. Never raises."""
        from pytest_nestedpve.teardown.teardown import TeardownReport

        masked = TeardownReport(
            destroyed=report.destroyed if report is not None else (),
            left=tuple(self._mask(line) for line in left),
            kept=report.kept if report is not None else (),
        )
        hook = self.config.hook.pytest_nestedpve_teardown_finished
        try:
            self._call(hook, AFTER_TEARDOWN, "after the teardown", lambda: {"report": masked})
        except BaseException as error:
            self._note(hook.name, "after the teardown", error)

    def _call(self, hook: Any, seconds: float, moment: str, arguments: Callable[[], dict[str, Any]]) -> None:
        if not hook.get_hookimpls():
            return
        try:
            with limit(seconds, f"the hook {hook.name}"):
                hook(environment=self.environment, **arguments())
        except (KeyboardInterrupt, pytest.exit.Exception):
            raise  # they end the session
        except BaseException as error:  # pytest.fail and pytest.skip included
            self._note(hook.name, moment, error)

    def _note(self, name: str, moment: str, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f", at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        line = self._mask(f"{name} ({moment}) raised {text[:400]}{place}")
        self.report_failure(line)
        self.environment.audit.write("hook", status="failed", cause=line)

    def _mask(self, text: str) -> str:
        return self.environment.audit.masker.mask(text)
