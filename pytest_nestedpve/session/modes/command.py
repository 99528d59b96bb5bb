"""A user's command on the user's terminal, run as a shell would: in its own process group, in the foreground
of the terminal if pytest is, and the first to receive a signal."""

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

COMMAND_EXIT = 60.0
"""Seconds (nominal) for the command to exit after a signal; then it is killed."""
GROUP_EXIT = 5.0
"""Seconds (nominal) for processes left in the command's group to exit after a SIGTERM."""
_KILL_AT = 3  # the number of the signal that kills the command at once


class Command:
    """One run of `/bin/sh -c TEXT`. `deliver` may be called from a signal handler of the main thread."""

    def __init__(self, text: str, *, folder: Path, environ: Mapping[str, str]) -> None:
        self.text = text
        self._folder = folder
        self._environ = environ
        self._process: subprocess.Popen[bytes] | None = None
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._signals: list[int] = []
        self._pending: int | None = None  # received before the process group existed

    def run(self) -> int:
        """Run the command until it exits. Returns its exit status, 128 + n after the signal n.

        Raises OSError if it cannot be started.
        """
        try:
            with _terminal() as terminal:
                if self._signals:
                    return 128 + self._signals[0]
                process = self._process = subprocess.Popen(
                    ["/bin/sh", "-c", self.text],
                    cwd=self._folder,
                    env=dict(self._environ),
                    # A background process of a terminal cannot read from it.
                    stdin=subprocess.DEVNULL if terminal is None and os.isatty(0) else None,
                    process_group=0,
                )
                try:
                    if terminal is not None:
                        _move_to_foreground(terminal, process.pid)
                    if self._pending is not None:
                        self._send(self._pending)
                    status = self._wait(process)
                finally:
                    self._end_group(process)
            return 128 - status if status < 0 else status
        finally:
            for end in self._wake:
                os.close(end)

    def deliver(self, signum: int) -> None:
        """Send a signal to the whole process group; the third signal is sent as SIGKILL."""
        self._signals.append(signum)
        self._send(signal.SIGKILL if len(self._signals) >= _KILL_AT else signum)
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
                    limit = Deadline(COMMAND_EXIT)
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
    def _end_group(process: subprocess.Popen[bytes]) -> None:
        """End the remaining processes of the group: the environment is destroyed next."""
        for signum in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, signum)
            except (ProcessLookupError, PermissionError):
                break
            process.poll()
            _wait_until(lambda: not _is_alive(process.pid), scaled(GROUP_EXIT))
        process.wait()


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _wait_until(done: Callable[[], bool], seconds: float) -> None:
    pause, last = threading.Event(), time.monotonic() + seconds
    while not done() and time.monotonic() < last:
        pause.wait(0.02)


@contextlib.contextmanager
def _terminal() -> Iterator[int | None]:
    """Yield the terminal of standard input if this process is in its foreground, else None."""
    try:
        foreground = os.tcgetpgrp(0)
    except OSError:
        yield None
        return
    if foreground != os.getpgrp():
        yield None
        return
    attributes = termios.tcgetattr(0)
    try:
        # No Ctrl-Z: nothing could continue the command, and the lease of its environment would expire.
        keys = [*attributes[6]]
        keys[termios.VSUSP] = b"\0"
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSANOW, [*attributes[:6], keys])
        yield 0
    finally:
        # In the background, tcsetpgrp and tcsetattr would stop this process with SIGTTOU.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
        with contextlib.suppress(OSError):
            os.tcsetpgrp(0, foreground)
        with contextlib.suppress(termios.error):
            termios.tcsetattr(0, termios.TCSADRAIN, attributes)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _move_to_foreground(terminal: int, group: int) -> None:
    with contextlib.suppress(OSError):
        os.tcsetpgrp(terminal, group)
    # The command may have been stopped by SIGTTIN: it read from the terminal while in the background.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGCONT)
