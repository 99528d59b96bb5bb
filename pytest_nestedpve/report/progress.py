"""What the current phase is at, live: one updated line on a terminal, plain lines now and then elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.phases import Listener
from pytest_nestedpve.report.timeline import duration

if TYPE_CHECKING:
    import pytest
    from _pytest.terminal import TerminalReporter

    from pytest_nestedpve.environment.phases import Phase, PhaseEnded

FRESH = 1.0
"""Seconds between two updates of the line on a terminal."""
PLAIN = 5.0
"""Seconds between two plain lines, at least; a phase that ends sooner prints none."""
QUIET = 30.0
"""Seconds after which a plain line is printed although nothing new is known."""


class ProgressListener(Listener):
    """A listener of the phases that writes past pytest's capturing; silent in xdist workers and with -q.

    It writes from a thread of its own to a copy of the terminal's descriptor: the capturing is never touched
    from another thread.
    """

    def __init__(self, config: pytest.Config, usual: Mapping[str, float] | None = None) -> None:
        """`usual`: seconds that a phase took in earlier runs, by its name."""
        self._usual = usual or {}
        self._reporter: TerminalReporter | None = config.pluginmanager.getplugin("terminalreporter")
        self._config = config
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._out = -1
        self._live = False
        self._phase: Phase | None = None
        self._text = ""
        self._said = ""
        self._began = self._printed = 0.0
        self._written = False
        if self._reporter is not None and config.get_verbosity() >= 0:
            self._open()

    def _open(self) -> None:
        import sys

        manager = self._config.pluginmanager.getplugin("capturemanager")
        with (
            manager.global_and_fixture_disabled() if manager else contextlib.nullcontext(),
            # Only where the reporter writes to a real file; in-process runs of pytest write elsewhere.
            contextlib.suppress(OSError, ValueError, AttributeError),
        ):
            self._out = os.dup(sys.stdout.fileno())
        if self._out >= 0:
            self._live = os.isatty(self._out) and os.environ.get("TERM", "") not in ("", "dumb")
            self._config.add_cleanup(self.close)

    # -- what the runner tells ------------------------------------------------------------------

    def phase_started(self, phase: Phase) -> None:
        """Begin to show `phase`."""
        if self._out < 0:
            return
        with self._lock:
            self._phase, self._text, self._said = phase, "", ""
            self._began = self._printed = time.monotonic()
            self._written = False
        self._stop.clear()
        self._thread = threading.Thread(target=self._tick, name="nested-pve-progress", daemon=True)
        self._thread.start()

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Stop to show it, and put pytest's line back as it was."""
        del ended
        if self._out < 0:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        with self._lock:
            self._phase = None
            if self._written:
                # In verbose mode pytest goes on behind the name of the test, so it has to be there again.
                prefix = getattr(self._reporter, "currentfspath", None)
                self._write(("\r\x1b[K" if self._live else "") + (prefix if isinstance(prefix, str) else ""))
                self._written = False

    def progress(self, text: str) -> None:
        """`text` says what the phase is at."""
        with self._lock:
            self._text = " ".join(text.split())

    def close(self) -> None:
        """Give the descriptor back."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._out >= 0:
            os.close(self._out)
            self._out = -1

    # -- the line ------------------------------------------------------------------------------

    def _tick(self) -> None:
        while not self._stop.wait(FRESH):
            with self._lock:
                if self._phase is None:
                    continue
                if self._live:
                    self._show_live()
                else:
                    self._show_plain()

    def _show_live(self) -> None:
        width = shutil.get_terminal_size().columns
        self._write(("\r\x1b[K" if self._written else "\n") + clip(self._line(), width - 1))
        self._written = True

    def _show_plain(self) -> None:
        now = time.monotonic()
        since = now - self._printed
        if since < PLAIN or (self._text == self._said and since < QUIET):
            return
        self._write(("" if self._written else "\n") + self._line() + "\n")
        self._printed, self._said, self._written = now, self._text, True

    def _line(self) -> str:
        assert self._phase is not None
        phase = self._phase
        usual = self._usual.get(phase.name, phase.usual)
        return progress_line(phase.name, time.monotonic() - self._began, usual, self._text)

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        # A terminal that is gone must not fail the phase.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._out, data) :]


def progress_line(phase: str, elapsed: float, usual: float | None, text: str) -> str:
    """`  ensure_pve 35 s of about 1 min 30 s: TASK install proxmox-ve`."""
    expected = f" of about {duration(usual)}" if usual else ""
    printable = "".join(each if each.isprintable() else "?" for each in text)
    return f"  {phase} {duration(round(elapsed))}{expected}" + (f": {printable}" if printable else "")


def clip(text: str, width: int) -> str:
    """At most `width` characters of `text`, marked where something is missing."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
