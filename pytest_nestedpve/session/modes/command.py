"""A command of the user on the user's terminal, as a shell would run it: a process group of its own, in the
foreground where there is one, and the first to get a signal."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pytest_nestedpve.pve.deadline import Deadline, scaled

TO_END = 60.0
"""Seconds (nominal) that the command has to end after a signal; then it is killed."""
REST = 5.0
"""Seconds (nominal) that what it left running in its group has to end after a TERM."""
_BLOWS = 3  # as many signals kill it at once


class Command:
    """`/bin/sh -c TEXT`, once. `deliver` may be called from a signal handler of the main thread."""

    def __init__(self, text: str, *, folder: Path, environ: Mapping[str, str]) -> None:
        self.text = text
        self._folder = folder
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: list[int] = []
        self._pending: int | None = None  # came before there was a group to send it to

    def run(self) -> int:
        """Run it to its end. The exit status as a shell tells it: 128 + n for the signal n that ended it.

        Raises OSError when it cannot be started.
        """
        try:
            with _terminal() as terminal:
                if self._signals:
                    return 128 + self._signals[0]
                process = self._process = subprocess.Popen(
                    ["/bin/sh", "-c", self.text],
                    cwd=self._folder,
                    env=dict(self._environ),
                    # Who is in the background of a terminal cannot read from it.
                    stdin=subprocess.DEVNULL if terminal is None and os.isatty(0) else None,
                    process_group=0,
                )
                try:
                    if terminal is not None:
                        _to_front(terminal, process.pid)
                    if self._pending is not None:
                        self._send(self._pending)
                    status = self._wait(process)
                finally:
                    self._end_rest(process)
            return 128 - status if status < 0 else status
        finally:
            for end in self._wake:
                os.close(end)

    def deliver(self, signum: int) -> None:
        """Pass a signal on to the whole group; the third one kills it."""
        self._signals.append(signum)
        self._send(signal.SIGKILL if len(self._signals) >= _BLOWS else signum)
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"!")

    def _send(self, signum: int) -> None:
        process = self._process
        if process is None:
            self._pending = signum
        elif process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
                os.killpg(process.pid, signal.SIGCONT)

    def _wait(self, process: subprocess.Popen[bytes]) -> int:
        ended = os.pidfd_open(process.pid)
        limit: Deadline | None = None
        try:
            watched = select.poll()
            for fd in (ended, self._wake[0]):
                watched.register(fd, select.POLLIN)
            while True:
                if self._signals and limit is None:
                    limit = Deadline(TO_END)
                if limit is not None and limit.expired:
                    self._send(signal.SIGKILL)
                ready = {fd for fd, _ in watched.poll(None if limit is None else 100)}
                if ended in ready:
                    return process.wait()
                if self._wake[0] in ready:
                    os.read(self._wake[0], 100)
        finally:
            os.close(ended)

    @staticmethod
    def _end_rest(process: subprocess.Popen[bytes]) -> None:
        """Nothing of the group goes on working on an environment that is being taken down."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
            except (ProcessLookupError, PermissionError):
                break
            process.poll()
            _until(lambda: not _alive(process.pid), scaled(REST))
        process.wait()


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _until(done: Callable[[], bool], seconds: float) -> None:
    pause, last = threading.Event(), time.monotonic() + seconds
    while not done() and time.monotonic() < last:
        pause.wait(0.02)


@contextlib.contextmanager
def _terminal() -> Iterator[int | None]:
    """The terminal of standard input, if this process is in its foreground; at the end it is again."""
    try:
        front = os.tcgetpgrp(0)
    except OSError:
        yield None
        return
    if front != os.getpgrp():
        yield None
        return
    attributes = termios.tcgetattr(0)
    try:
        # No Ctrl-Z: nobody could bring the command back, and the lease of its environment would lapse.
        keys = [*attributes[6]]
        keys[termios.VSUSP] = b"\0"
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, [*attributes[:6], keys])
        yield 0
    finally:
        # From the background this would stop the process otherwise.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, front)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, attributes)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _to_front(terminal: int, group: int) -> None:
    with contextlib.suppress(OSError):
        os.tcsetpgrp(terminal, group)
    # It may have read from the terminal, and been stopped for it, before that.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)
