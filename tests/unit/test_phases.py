"""The phase runner: each phase once, in order; the first failure ends the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_nestedpve.environment.phase_runner import PhaseRunner
from pytest_nestedpve.environment.phases import Phase, PhaseBroken, PhaseListError, check, needed_before
from pytest_nestedpve.pve.errors import PveError


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str | None]] = []

    def write(self, event: str, /, **fields: Any) -> None:
        self.lines.append((event, fields["phase"], fields.get("status")))


def runner(*phases: Phase) -> PhaseRunner:
    environment: Any = SimpleNamespace(facts={})
    return PhaseRunner(phases, environment, Log())


def record_call(done: list[str], name: str, facts: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    def do(_environment: Any) -> Mapping[str, Any] | None:
        done.append(name)
        return facts

    return do


def fail_with(text: str) -> Callable[[Any], Any]:
    def do(_environment: Any) -> None:
        raise PveError(text)

    return do


def test_a_phase_is_done_once_and_after_its_needs() -> None:
    done: list[str] = []
    phases = runner(*(Phase(n, n, record_call(done, n)) for n in ("a", "b", "c")))
    phases.execute("b", by="x")
    phases.execute("b", by="y")
    phases.ensure("c", by="y")
    assert done == ["a", "b", "c"]
    assert phases.done_by == {"a": "x", "b": "x", "c": "y"}


def test_a_prerequisite_is_proved_by_its_probe_and_the_requested_phase_executed() -> None:
    done: list[str] = []
    phases = runner(
        Phase("a", "a", record_call(done, "a"), probe=lambda _: {"found": 1}),
        Phase("b", "b", record_call(done, "b"), probe=lambda _: {"found": 2}),
    )
    phases.execute("b")
    assert done == ["b"]
    assert phases.status == {"a": "proved", "b": "done"}
    assert phases.environment.facts["a"] == {"found": 1}


def test_later_requests_report_the_first_cause_and_no_phase_is_repeated() -> None:
    done: list[str] = []
    phases = runner(
        Phase("a", "a", fail_with("no space")),
        Phase("b", "b", record_call(done, "b")),
        Phase("c", "c", record_call(done, "c")),
    )
    with pytest.raises(PhaseBroken, match="no space"):
        phases.execute("a")
    for _ in range(2):
        with pytest.raises(PhaseBroken, match="c needs a, which failed: no space"):
            phases.ensure("c")
    assert done == []
    assert phases.broken is not None
    assert phases.broken.phase == "a"


def test_a_phase_that_does_not_need_the_failed_one_still_runs() -> None:
    done: list[str] = []
    phases = runner(
        Phase("a", "a", fail_with("x")),
        Phase("b", "b", record_call(done, "b"), needs=()),
        Phase("c", "c", record_call(done, "c"), needs=("b",)),
    )
    with pytest.raises(PhaseBroken):
        phases.execute("a")
    phases.execute("c")
    assert done == ["b", "c"]


def test_an_interrupted_phase_breaks_the_run() -> None:
    def stop(_environment: Any) -> None:
        raise KeyboardInterrupt

    phases = runner(Phase("a", "a", stop))
    with pytest.raises(KeyboardInterrupt):
        phases.execute("a")
    with pytest.raises(PhaseBroken, match="interrupted"):
        phases.execute("a")


def test_the_log_has_an_end_for_every_start() -> None:
    phases = runner(Phase("a", "a", record_call([], "a")), Phase("b", "b", fail_with("x")))
    with pytest.raises(PhaseBroken):
        phases.ensure("b")
    assert isinstance(phases.audit, Log)
    assert phases.audit.lines == [
        ("phase_start", "a", None),
        ("phase_end", "a", "done"),
        ("phase_start", "b", None),
        ("phase_end", "b", "failed"),
    ]


def test_needs_are_followed_to_their_own_needs() -> None:
    phases = (
        Phase("a", "", record_call([], "")),
        Phase("b", "", record_call([], ""), needs=("a",)),
        Phase("x", "", record_call([], ""), needs=()),
        Phase("c", "", record_call([], ""), needs=("b",)),
        Phase("d", "", record_call([], "")),
    )
    assert needed_before(phases, "c") == ("a", "b")
    assert needed_before(phases, "d") == ("a", "b", "x", "c")
    with pytest.raises(KeyError):
        needed_before(phases, "nothing")


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([Phase("a", "", record_call([], "")), Phase("a", "", record_call([], ""))], "two phases"),
        ([Phase("A b", "", record_call([], ""))], "lower-case"),
        (
            [Phase("a", "", record_call([], ""), needs=("b",)), Phase("b", "", record_call([], ""))],
            "not among the phases before",
        ),
    ],
)
def test_a_list_that_cannot_be_run_is_refused(phases: list[Phase], message: str) -> None:
    with pytest.raises(PhaseListError, match=message):
        check(phases)
