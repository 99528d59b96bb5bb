"""The runner of phases: each once, in order, broken by the first cause."""

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


def does(done: list[str], name: str, facts: Mapping[str, Any] | None = None) -> Callable[[Any], Any]:
    def do(_environment: Any) -> Mapping[str, Any] | None:
        done.append(name)
        return facts

    return do


def fails(text: str) -> Callable[[Any], Any]:
    def do(_environment: Any) -> None:
        raise PveError(text)

    return do


def test_a_phase_is_done_after_what_it_needs_and_only_once() -> None:
    done: list[str] = []
    r = runner(*(Phase(n, n, does(done, n)) for n in ("a", "b", "c")))
    r.execute("b", by="x")
    r.execute("b", by="y")
    r.ensure("c", by="y")
    assert done == ["a", "b", "c"]
    assert r.done_by == {"a": "x", "b": "x", "c": "y"}


def test_a_prerequisite_is_proved_by_its_probe_and_the_chosen_phase_executed() -> None:
    done: list[str] = []
    r = runner(
        Phase("a", "a", does(done, "a"), probe=lambda _: {"found": 1}),
        Phase("b", "b", does(done, "b"), probe=lambda _: {"found": 2}),
    )
    r.execute("b")
    assert done == ["b"]
    assert r.status == {"a": "proved", "b": "done"}
    assert r.environment.facts["a"] == {"found": 1}


def test_the_first_cause_is_what_later_users_get_and_nothing_is_done_again() -> None:
    done: list[str] = []
    r = runner(
        Phase("a", "a", fails("no space")), Phase("b", "b", does(done, "b")), Phase("c", "c", does(done, "c"))
    )
    with pytest.raises(PhaseBroken, match="no space"):
        r.execute("a")
    for _ in range(2):
        with pytest.raises(PhaseBroken, match="c needs a, which failed: no space"):
            r.ensure("c")
    assert done == []
    assert r.broken is not None
    assert r.broken.phase == "a"


def test_what_does_not_need_the_failed_phase_still_runs() -> None:
    done: list[str] = []
    r = runner(
        Phase("a", "a", fails("x")),
        Phase("b", "b", does(done, "b"), needs=()),
        Phase("c", "c", does(done, "c"), needs=("b",)),
    )
    with pytest.raises(PhaseBroken):
        r.execute("a")
    r.execute("c")
    assert done == ["b", "c"]


def test_an_interrupted_phase_breaks_the_run() -> None:
    def stop(_environment: Any) -> None:
        raise KeyboardInterrupt

    r = runner(Phase("a", "a", stop))
    with pytest.raises(KeyboardInterrupt):
        r.execute("a")
    with pytest.raises(PhaseBroken, match="interrupted"):
        r.execute("a")


def test_every_start_has_its_end_in_the_log() -> None:
    r = runner(Phase("a", "a", does([], "a")), Phase("b", "b", fails("x")))
    with pytest.raises(PhaseBroken):
        r.ensure("b")
    assert isinstance(r.audit, Log)
    assert r.audit.lines == [
        ("phase_start", "a", None),
        ("phase_end", "a", "done"),
        ("phase_start", "b", None),
        ("phase_end", "b", "failed"),
    ]


def test_needs_are_followed_to_their_own_needs() -> None:
    phases = (
        Phase("a", "", does([], "")),
        Phase("b", "", does([], ""), needs=("a",)),
        Phase("x", "", does([], ""), needs=()),
        Phase("c", "", does([], ""), needs=("b",)),
        Phase("d", "", does([], "")),
    )
    assert needed_before(phases, "c") == ("a", "b")
    assert needed_before(phases, "d") == ("a", "b", "x", "c")
    with pytest.raises(KeyError):
        needed_before(phases, "nothing")


@pytest.mark.parametrize(
    ("phases", "says"),
    [
        ([Phase("a", "", does([], "")), Phase("a", "", does([], ""))], "two phases"),
        ([Phase("A b", "", does([], ""))], "lower-case"),
        (
            [Phase("a", "", does([], ""), needs=("b",)), Phase("b", "", does([], ""))],
            "not among the phases before",
        ),
    ],
)
def test_a_list_that_cannot_be_run_is_refused(phases: list[Phase], says: str) -> None:
    with pytest.raises(PhaseListError, match=says):
        check(phases)
