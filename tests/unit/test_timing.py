"""Limits are scaled once, and waits end at their deadline."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from pytest_nestedpve.pve import deadline as timing
from pytest_nestedpve.pve.deadline import Deadline, set_scale, wait_until
from pytest_nestedpve.pve.errors import CommandTimeout


@pytest.fixture(autouse=True)
def _scale() -> Iterator[None]:
    before = timing.scale()
    set_scale(1.0)
    yield
    set_scale(before)


def test_the_scale_stretches_a_limit_once() -> None:
    set_scale(4.0)
    deadline = Deadline(10)
    assert deadline.limit == 40
    assert 39 < deadline.remaining() <= 40
    # The nominal value is unscaled: the callee's Deadline scales it.
    assert 9.7 < deadline.nominal() <= 10
    assert Deadline(deadline.nominal()).limit <= 40


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        set_scale(factor)


def test_a_wait_returns_what_the_check_found() -> None:
    values: Iterator[int | None] = iter([None, None, 0])  # 0 is an answer
    assert wait_until(lambda: next(values), deadline=Deadline(5), what="x", interval=(0.001, 0.001)) == 0


def test_a_wait_that_times_out_reports_its_subject_and_the_last_state() -> None:
    seen = "silence"
    began = time.monotonic()
    with pytest.raises(CommandTimeout, match=r"waited 0\.\d s for the agent \(silence\).*limit of 0\.2 s"):
        wait_until(lambda: None, deadline=Deadline(0.2), what=lambda: f"the agent ({seen})")
    assert time.monotonic() - began < 1


def test_the_check_is_repeated_at_the_deadline() -> None:
    calls = 0

    def check() -> bool | None:
        nonlocal calls
        calls += 1
        return True if calls == 2 else None

    assert wait_until(check, deadline=Deadline(0.05), what="x", interval=(10, 10)) is True


def test_another_thread_ends_the_pause() -> None:
    wake = threading.Event()
    ready = threading.Event()

    def other() -> None:
        ready.set()
        wake.set()

    began = time.monotonic()
    thread = threading.Timer(0.05, other)
    thread.start()
    wait_until(lambda: ready.is_set() or None, deadline=Deadline(20), what="x", interval=(15, 15), wake=wake)
    thread.join()
    assert time.monotonic() - began < 5


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that advances only by pauses and by additions to the value of this list."""
    now = [1000.0]

    def wait(_self: threading.Event, timeout: float | None = None) -> bool:
        now[0] += timeout or 0.0
        return False

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(threading.Event, "wait", wait)
    return now


@pytest.mark.parametrize("ready", [0.3, 2.0, 3.0, 17.0, 240.0])
def test_a_change_is_noticed_within_a_twentieth_of_the_wait_and_within_half_a_second(
    clock: list[float], ready: float
) -> None:
    began = clock[0]
    wait_until(lambda: clock[0] - began >= ready, deadline=Deadline(600), what="x")
    late = clock[0] - began - ready
    assert late <= min(0.3, max(0.05, ready / 19))


def test_a_check_that_takes_long_is_repeated_less_often(clock: list[float]) -> None:
    began, checks = clock[0], 0

    def check() -> bool:
        nonlocal checks
        checks += 1
        clock[0] += 1.3
        return clock[0] - began >= 13

    wait_until(check, deadline=Deadline(600), what="x", interval=(0.05, 2.0))
    assert checks <= 6
