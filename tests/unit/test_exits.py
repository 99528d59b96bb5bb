"""The exit status: green only if something was verified, 4 only if preflight alone is to blame."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_nestedpve.session import exit_status
from pytest_nestedpve.session.exit_status import Tally


def report(
    nodeid: str, outcome: str, *, when: str = "call", uses: bool = True, cause: str | None = None
) -> Any:
    found = pytest.TestReport(nodeid, ("f", 0, "n"), {}, outcome, None, when)  # type: ignore[arg-type]
    if uses:
        setattr(found, exit_status.USES, True)
    if cause is not None:
        setattr(found, exit_status.CAUSE, cause)
    return found


def tally(*reports: Any, **fields: Any) -> Tally:
    found = Tally(**fields)
    for each in reports:
        found.add(each)
    return found


@pytest.mark.parametrize(
    ("found", "status", "expected"),
    [
        (tally(report("a", "passed")), 0, 0),
        (tally(report("a", "skipped", when="setup")), 0, 1),
        (tally(report("a", "skipped", when="setup"), report("b", "passed")), 0, 0),
        (tally(report("a", "passed", uses=False)), 0, 0),
        (tally(report("a", "failed", cause="preflight")), 1, 4),
        (tally(report("a", "failed", cause="preflight"), report("b", "failed")), 1, 1),
        (tally(report("a", "failed", cause="provision")), 1, 1),
        (tally(report("a", "failed", cause="preflight"), left=True), 1, 1),
        (tally(report("a", "passed"), left=True), 0, 1),
        (tally(left=True), 5, 1),
        (tally(report("a", "failed", cause=exit_status.CAUSE_NO_HOST)), 1, 4),
        (tally(report("a", "passed"), signum=15), 2, 143),
        (tally(left=True, signum=2), 2, 130),
        (tally(), 5, 5),
        (tally(report("a", "failed", cause="preflight")), 2, 2),
    ],
)
def test_the_status_says_what_happened(found: Tally, status: int, expected: int) -> None:
    assert found.status(status, executes=True) == expected
    assert (found.reason is not None) == (expected != status and found.signum is None)


def test_a_session_that_is_not_meant_to_run_tests_may_pass_none() -> None:
    assert tally(report("a", "skipped", when="setup")).status(0, executes=False) == 0


def test_a_stop_after_the_failure_of_preflight_is_that_failure() -> None:
    found = tally(report("a", "failed", cause="preflight"))
    assert found.status(2, executes=True, stopped=True) == 4
    found = tally(report("a", "failed", cause="provision"))
    assert found.status(2, executes=True, stopped=True) == 2


def test_hooks_that_raised_are_not_green() -> None:
    for status, expected in ((0, 1), (5, 1), (1, 1), (2, 2)):
        found = tally(report("a", "passed"), hooks=["x raised"])
        assert found.status(status, executes=True) == expected
