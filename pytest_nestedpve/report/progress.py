"""The progress of the current phase: one updated line on a terminal, otherwise a plain line at intervals."""

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

LIVE_INTERVAL = 1.0
"""Seconds between two updates of the line on a terminal."""
PLAIN_INTERVAL = 5.0
"""Least seconds between two plain lines; a phase that ends sooner prints none."""
REPEAT_INTERVAL = 30.0
"""Seconds after which a plain line is printed although its text has not changed."""


class ProgressListener(Listener):
    """Writes the progress of phases, bypassing pytest's capturing; silent in xdist workers and with -q.

    Its thread writes to a copy of the terminal's descriptor: only the main thread uses pytest's capturing.
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
        self._printed_text = ""
        self._began = self._printed_at = 0.0
        self._written = False
        if self._reporter is not None and config.get_verbosity() >= 0:
            self._open()

    def _open(self) -> None:
        import sys

        manager = self._config.pluginmanager.getplugin("capturemanager")
        with (
            manager.global_and_fixture_disabled() if manager else contextlib.nullcontext(),
            # Fails if the reporter does not write to a real file, as in an in-process run of pytest.
            contextlib.suppress(OSError, ValueError, AttributeError),
        ):
            self._out = os.dup(sys.stdout.fileno())
        if self._out >= 0:
            self._live = os.isatty(self._out) and os.environ.get("TERM", "") not in ("", "dumb")
            self._config.add_cleanup(self.close)

    # -- called by the runner of phases -----------------------------------------------------------

    def phase_started(self, phase: Phase) -> None:
        """Show `phase` from now on."""
        if self._out < 0:
            return
        with self._lock:
            self._phase, self._text, self._printed_text = phase, "", ""
            self._began = self._printed_at = time.monotonic()
            self._written = False
        self._stop.clear()
        self._thread = threading.Thread(target=self._refresh, name="nested-pve-progress", daemon=True)
        self._thread.start()

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Stop showing the phase, and restore pytest's line."""
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
                # In verbose mode pytest continues the line of the test's name, so that name is printed again.
                prefix = getattr(self._reporter, "currentfspath", None)
                self._write(("\r\x1b[K" if self._live else "") + (prefix if isinstance(prefix, str) else ""))
                self._written = False

    def progress(self, text: str) -> None:
        """Set the text behind the phase, such as the running task."""
        with self._lock:
            self._text = " ".join(text.split())

    def close(self) -> None:
        """Stop the thread and close the descriptor."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._out >= 0:
            os.close(self._out)
            self._out = -1

    # -- the line ------------------------------------------------------------------------------

    def _refresh(self) -> None:
        while not self._stop.wait(LIVE_INTERVAL):
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
        since = now - self._printed_at
        if since < PLAIN_INTERVAL or (self._text == self._printed_text and since < REPEAT_INTERVAL):
            return
        self._write(("" if self._written else "\n") + self._line() + "\n")
        self._printed_at, self._printed_text, self._written = now, self._text, True

    def _line(self) -> str:
        assert self._phase is not None
        phase = self._phase
        usual = self._usual.get(phase.name, phase.usual)
        return format_progress(phase.name, time.monotonic() - self._began, usual, self._text)

    def _write(self, text: str) -> None:
        data = text.encode("utf-8", "replace")
        # A closed terminal must not fail the phase.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._out, data) :]


def format_progress(phase: str, elapsed: float, usual: float | None, text: str) -> str:
    """`  ensure_pve 35 s of about 1 min 30 s: TASK install proxmox-ve`."""
    expected = f" of about {duration(usual)}" if usual else ""
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return f"  {phase} {duration(round(elapsed))}{expected}" + (f": {printable}" if printable else "")


def clip(text: str, width: int) -> str:
    """At most `width` characters of `text`, with an ellipsis where it is cut."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"
