"""Dependencies between steps: markers for pytest-dependency, added at run time for steps that have run.

Markers added at collection would name steps that `-k`, `--lf` or xdist deselected here, and skip tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.environment.phases import needed_before
from pytest_nestedpve.session import exit_status, steps

if TYPE_CHECKING:
    from pytest_nestedpve.session.session import NestedSession
    from pytest_nestedpve.session.state import SessionState


def before_step(nested: NestedSession, item: Any) -> None:
    """Mark a step with its dependencies before it runs. Skips it if one of them failed."""
    state = nested.state
    needed = needed_before(state.phases, item.phase_name)
    depends = [name for name in (steps.PREFIX + need for need in needed) if name in state.steps_run]
    # The plugin is "dependency" as an entry point and "pytest_dependency" with -p.
    if any(item.config.pluginmanager.hasplugin(name) for name in ("dependency", "pytest_dependency")):
        item.add_marker(
            pytest.mark.dependency(name=item.name, scope="session", depends=depends), append=False
        )
    cause = nested.open_run.failed_need(item.phase_name) if nested.open_run is not None else None
    if cause is not None and state.first_reports.get(cause.phase) not in (None, item.nodeid):
        first = steps.PREFIX + cause.phase
        raise _skipped(item, first if first in depends else f"the phase {cause.phase}", cause.cause)
    for name in depends:
        if name in state.failed_steps:
            raise _skipped(item, name, state.failed_steps[name])


def after_step(
    state: SessionState, item: Any, call: pytest.CallInfo[None], report: pytest.TestReport
) -> None:
    """Record the outcome of a step, and mark its report for the tally."""
    setattr(report, exit_status.STEP, True)
    error = call.excinfo.value if call.excinfo is not None else None
    if getattr(error, exit_status.FOLLOWS, False):
        setattr(report, exit_status.FOLLOWS, True)
    # A step skipped by a mark of the project counts as not selected: the next test that needs it runs it.
    if report.failed:
        state.step_ran(item.name, f"{type(error).__name__}: {error}")
    elif report.when == "call" and not report.skipped:
        state.step_ran(item.name, None)


def _skipped(item: Any, dependency: str, cause: str) -> BaseException:
    text = f"{item.name} depends on {dependency}, which failed: {_one_line(cause)}"
    # Not a subclass: pytest would print its name before the reason, on each line.
    error = pytest.skip.Exception(text, _use_item_location=True)
    setattr(error, exit_status.FOLLOWS, True)
    return error


def _one_line(text: str) -> str:
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return joined if len(joined) <= 400 else joined[:397] + "…"
