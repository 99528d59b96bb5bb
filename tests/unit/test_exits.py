"""The exit status: 0 only if a test passed, 4 only if preflight is the only failure."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_nestedpve.session import exit_status
from pytest_nestedpve.session.exit_status import Tally


def report(
    nodeid: str, outcome: str, *, when: str = "call", uses: bool = True, cause: str | None = None
) -> Any:
    result = pytest.TestReport(nodeid, ("f", 0, "n"), {}, outcome, None, when)  # type: ignore[arg-type]
    if uses:
        setattr(result, exit_status.USES, True)
    if cause is not None:
        setattr(result, exit_status.CAUSE, cause)
    return result


def tally(*reports: Any, **fields: Any) -> Tally:
    totals = Tally(**fields)
    for entry in reports:
        totals.add(entry)
    return totals


@pytest.mark.parametrize(
    ("totals", "status", "expected"),
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
def test_the_status_follows_from_the_reports(totals: Tally, status: int, expected: int) -> None:
    assert totals.status(status, executes=True) == expected
    assert (totals.reason is not None) == (expected != status and totals.signum is None)


def test_a_session_that_is_not_meant_to_run_tests_may_pass_none() -> None:
    assert tally(report("a", "skipped", when="setup")).status(0, executes=False) == 0


def test_a_stop_after_the_failure_of_preflight_is_that_failure() -> None:
    totals = tally(report("a", "failed", cause="preflight"))
    assert totals.status(2, executes=True, stopped=True) == 4
    totals = tally(report("a", "failed", cause="provision"))
    assert totals.status(2, executes=True, stopped=True) == 2


def test_hooks_that_raised_are_not_green() -> None:
    for status, expected in ((0, 1), (5, 1), (1, 1), (2, 2)):
        totals = tally(report("a", "passed"), hooks=["x raised"])
        assert totals.status(status, executes=True) == expected
