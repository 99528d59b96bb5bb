"""The handler of INT, TERM and HUP: it ends the session, and only counts while the teardown runs."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# The same Ctrl-C often arrives twice within milliseconds (from the terminal and through a parent).
_SAME_SIGNAL = 1.0


class Interrupted(KeyboardInterrupt):
    """A signal ended the session. A KeyboardInterrupt, so that no `except Exception` catches it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signal.Signals(signum).name}")
        self.signum = signum


class SignalGuard:
    """The handler, installed before the first object is created on a host, until the session has ended.

    `stop(text)` ends the session after the current test, in case the exception of the handler is caught by
    other code. `report(text)` writes a line to the terminal from a signal handler. `give_up(signum)` must not
    return: the third Ctrl-C calls it.
    """

    def __init__(
        self, *, stop: Callable[[str], None], report: Callable[[str], None], give_up: Callable[[int], None]
    ) -> None:
        self._stop = stop
        self._report = report
        self._give_up = give_up
        self._previous: dict[int, Any] = {}
        self._first_at = 0.0
        self.received: list[int] = []
        self.counting = False  # the session is ending: signals no longer interrupt anything
        self._divert: Callable[[int], None] | None = None

    @property
    def first(self) -> int | None:
        """The signal that ended the session."""
        return self.received[0] if self.received else None

    @property
    def installed(self) -> bool:
        return bool(self._previous)

    def install(self) -> None:
        """Handle the signals that are not ignored (nohup ignores HUP). Does nothing when it is installed, and
        outside the main thread."""
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for signum in ENDING:
            if signal.getsignal(signum) is signal.SIG_IGN:
                continue
            self._previous[signum] = signal.signal(signum, self._handle)

    def remove(self) -> None:
        """Restore the earlier handlers; `received` keeps the signals of the meantime."""
        for signum, handler in self._previous.items():
            if signal.getsignal(signum) == self._handle:
                signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._previous.clear()

    def stop_interrupting(self) -> None:
        """The session ends by itself from now on: signals are counted, and interrupt nothing."""
        self.counting = True

    @contextlib.contextmanager
    def diverted(self, deliver: Callable[[int], None]) -> Iterator[None]:
        """In the body, pass all signals to `deliver`, in their order; only the first is in `received`."""
        self._divert = deliver
        try:
            yield
        finally:
            self._divert = None

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self._divert is not None:
            if not self.received:
                self._first_at = time.monotonic()
                self.received.append(signum)
            self._divert(signum)
            return
        self.received.append(signum)
        name = signal.Signals(signum).name
        if self.received.count(signal.SIGINT) >= 3 and signum == signal.SIGINT:
            self._give_up(signum)
        if self.counting:
            remaining = 3 - self.received.count(signal.SIGINT)
            self._report(f"{name}: the teardown continues; {remaining} more Ctrl-C would abort it")
            return
        now = time.monotonic()
        if len(self.received) > 1 and now - self._first_at < _SAME_SIGNAL:
            return
        self._first_at = now
        self._stop(f"{name} received")
        raise Interrupted(signum)


@contextlib.contextmanager
def limit(seconds: float, what: str) -> Iterator[None]:
    """Raise CommandTimeout inside the body when it takes longer than `seconds` (nominal).

    SIGALRM interrupts any wait of the body; so the limit works in the main thread only, and is ignored in
    others. An earlier alarm is restored, less the time that has passed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    from pytest_nestedpve.pve.deadline import scaled
    from pytest_nestedpve.pve.errors import CommandTimeout

    maximum = scaled(seconds)

    def expire(_signum: int, _frame: FrameType | None) -> None:
        raise CommandTimeout(f"{what} did not end within its limit of {maximum:g} s")

    handler = signal.signal(signal.SIGALRM, expire)
    started = time.monotonic()
    # Then once a second: other code may have caught the first exception.
    before, every = signal.setitimer(signal.ITIMER_REAL, maximum, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if before:
            remaining = max(0.01, before - (time.monotonic() - started))
            signal.setitimer(signal.ITIMER_REAL, remaining, every)


def write_now(fd: int, text: str) -> None:
    """Write a line without any buffer, as a signal handler must."""
    with contextlib.suppress(OSError):
        os.write(fd, f"\n{text}\n".encode(errors="replace"))
