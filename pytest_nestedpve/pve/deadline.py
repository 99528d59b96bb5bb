"""Limits and waits: every limit is scaled in one place, every wait ends.

Convention: limits handed to functions of this package are *nominal* seconds; they are multiplied by
the scale once, where the clock starts (`Deadline`, `scaled`). To hand the rest of a deadline on to a
function that scales by itself, use `Deadline.nominal()`.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SHARE = 0.05
"""Of the time waited so far, what may be lost between an event and its being noticed."""

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
    """The factor in force."""
    return _scale


def scaled(seconds: float) -> float:
    """`seconds` times the factor in force."""
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
        """The seconds left, to be handed to something that scales them itself."""
        return self.remaining() / _scale

    def elapsed(self) -> float:
        """Wall-clock seconds since this was made."""
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
    """Call `check` until it returns something other than None or False, and return that.

    The pause between two calls is a twentieth of the time waited so far, and at least what the call took
    (no more than half of the time is spent asking), but within interval[0] and interval[1] seconds. `wake`,
    when set by another thread, ends the pause at once (it is cleared here). `what` names what was waited
    for, or is a function that also tells what was seen last; it ends up in the CommandTimeout raised when
    the deadline has passed. `check` is called at least once, and once more at the deadline.
    """
    shortest, longest = interval
    nudge = wake if wake is not None else threading.Event()
    began = time.monotonic()
    while True:
        last = deadline.expired
        asked = time.monotonic()
        found = check()
        if found is not None and found is not False:
            return found
        if last:
            from pytest_nestedpve.pve.errors import CommandTimeout

            subject = what if isinstance(what, str) else what()
            raise CommandTimeout(
                f"waited {deadline.elapsed():.1f} s for {subject}: it did not happen within the limit "
                f"of {deadline.limit:g} s"
            )
        now = time.monotonic()
        pause = min(longest, max(shortest, SHARE * (now - began), now - asked))
        if nudge.wait(min(pause, deadline.remaining() or 0.001)):
            nudge.clear()
