"""Limits and waits: all limits are scaled in one place, all waits end.

Convention: limits passed to functions of this package are *nominal* seconds; they are multiplied by the
scale once, where the clock starts (`Deadline`, `scaled`). To pass the rest of a deadline to a function that
scales it too, use `Deadline.nominal()`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.05
"""The share of the time waited so far that may pass between an event and its detection."""

_scale = 1.0


def set_scale(factor: float) -> None:
    """Multiply every later limit by `factor` (setting `timeout_scale`).

    Raises ValueError unless it is a finite number above 0.
    """
    global _scale
    if not (math.isfinite(factor) and factor > 0):
        raise ValueError(f"timeout scale must be a number above 0, found {factor!r}")
    _scale = factor


def scale() -> float:
    """The current factor."""
    return _scale


def scaled(seconds: float) -> float:
    """`seconds` times the current factor."""
    return seconds * _scale


class Deadline:
    """A moment on the monotonic clock, `seconds` (nominal) from now."""

    def __init__(self, seconds: float) -> None:
        self.limit = scaled(seconds)
        self._start = time.monotonic()

    def remaining(self) -> float:
        """Wall-clock seconds left, never below 0."""
        return max(0.0, self.limit - self.elapsed())

    def nominal(self) -> float:
        """Nominal seconds left, for a function that scales them again."""
        return self.remaining() / _scale

    def elapsed(self) -> float:
        """Wall-clock seconds since the deadline was created."""
        return time.monotonic() - self._start

    @property
    def expired(self) -> bool:
        return self.remaining() <= 0.0


def wait_until(
    check: Callable[[], T | None],
    *,
    deadline: Deadline,
    what: str | Callable[[], str],
    interval: tuple[float, float] = (0.05, 0.3),
    wake: threading.Event | None = None,
) -> T:
    """Poll `check` until it returns a value other than None and False, and return that value.

    The pause between two calls is a twentieth of the time waited so far, and at least the duration of the
    last call (at most half of the time is spent in calls), within interval[0] and interval[1] seconds.
    `wake`, when set by another thread, ends the pause at once (it is cleared here). `what` names the awaited
    event for the message, or is a function that does, with the last state. `check` is called at least once,
    and once more at the deadline. Raises CommandTimeout then.
    """
    shortest, longest = interval
    wake = wake if wake is not None else threading.Event()
    began = time.monotonic()
    while True:
        last = deadline.expired
        call_began = time.monotonic()
        result = check()
        if result is not None and result is not False:
            return result
        if last:
            from pytest_nestedpve.pve.errors import CommandTimeout

            subject = what if isinstance(what, str) else what()
            raise CommandTimeout(
                f"waited {deadline.elapsed():.1f} s for {subject}: it did not happen within the limit "
                f"of {deadline.limit:g} s"
            )
        now = time.monotonic()
        pause = min(longest, max(shortest, SHARE * (now - began), now - call_began))
        if wake.wait(min(pause, deadline.remaining() or 0.001)):
            wake.clear()
