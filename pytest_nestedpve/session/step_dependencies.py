"""Steps that depend on steps: markers for pytest-dependency, made at run time from what ran in this process.

Made any earlier they would name steps that `-k`, `--lf` or an xdist worker left out, and skip for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.environment.phases import needed_before
from pytest_nestedpve.session import exit_status, steps

if TYPE_CHECKING:
    from pytest_nestedpve.session.session import NestedSession


def before(nested: NestedSession, item: Any) -> None:
    """Mark a step that is about to run with what it depends on. Skips it if that failed."""
    needed = needed_before(nested.phases, item.phase_name)
    depends = [name for name in (steps.PREFIX + need for need in needed) if name in nested.ran]
    # It is "dependency" as an entry point and "pytest_dependency" with -p.
    if any(item.config.pluginmanager.hasplugin(name) for name in ("dependency", "pytest_dependency")):
        item.add_marker(
            pytest.mark.dependency(name=item.name, scope="session", depends=depends), append=False
        )
    cause = nested.failed_need(item.phase_name)
    if cause is not None and nested.shown.get(cause.phase) not in (None, item.nodeid):
        first = steps.PREFIX + cause.phase
        raise _skipped(item, first if first in depends else f"the phase {cause.phase}", cause.cause)
    for name in depends:
        if name in nested.lost:
            raise _skipped(item, name, nested.lost[name])


def after(nested: NestedSession, item: Any, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Remember how a step went, and mark its report for the tally."""
    setattr(report, exit_status.STEP, True)
    error = call.excinfo.value if call.excinfo is not None else None
    if getattr(error, exit_status.FOLLOWS, False):
        setattr(report, exit_status.FOLLOWS, True)
    # One that a project's own mark skipped is as good as not selected: what needs its phase does it.
    if not (report.failed or (report.when == "call" and not report.skipped)):
        return
    if item.name not in nested.ran:
        nested.ran.append(item.name)
    if report.failed:
        nested.lost[item.name] = f"{type(error).__name__}: {error}"
    elif report.when == "call":
        nested.lost.pop(item.name, None)  # a rerun


def _skipped(item: Any, what: str, cause: str) -> BaseException:
    text = f"{item.name} depends on {what}, which failed: {_one_line(cause)}"
    # Not a class of its own: its name would stand before the reason, line by line.
    error = pytest.skip.Exception(text, _use_item_location=True)
    setattr(error, exit_status.FOLLOWS, True)
    return error


def _one_line(text: str) -> str:
    joined = "; ".join(line.strip() for line in text.splitlines() if line.strip())
    return joined if len(joined) <= 400 else joined[:397] + "…"
