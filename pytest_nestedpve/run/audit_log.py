"""The audit log of a run: one JSON object per line, masked; reports and the proof of killed tasks read it."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_nestedpve.pve.calls import Call, CallLog
from pytest_nestedpve.run.masking import Masker

_UPID = "UPID:"
LONGEST = 2000
"""Characters of a command in the log."""


class AuditLog:
    """Appends lines `{ts,run,event,phase,…}` to a 0600 file. Thread-safe.

    Events: phase_start, phase_end, call, task, playbook, teardown, leak; other events are allowed.
    A line without a phase gets the phase in progress. Values that are not JSON become text; None is left out.
    """

    def __init__(self, path: Path, run: str, *, masker: Masker | None = None) -> None:
        self.path = path
        self.run = run
        self.masker = masker if masker is not None else Masker()
        self._lock = threading.Lock()
        self._open: list[str] = []
        self._tasks: set[str] = set()
        self.cut_off: float | None = None
        """When (time.monotonic) a creating call was last cut off: the host may still execute it."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")
        if not _ends_with_newline(path):
            self._file.write("\n")  # its writer was killed while it wrote a line

    def write(self, event: str, /, **fields: Any) -> None:
        """Append one line. Raises OSError when it cannot be written."""
        with self._lock:
            phase = fields.pop("phase", None)
            if event == "phase_start" and phase:
                self._open.append(str(phase))
            phase = phase or (self._open[-1] if self._open else None)
            if event == "phase_end" and phase in self._open:
                self._open.remove(str(phase))
            entry = {"ts": round(time.time(), 3), "run": self.run, "event": event, "phase": phase, **fields}
            fields = {key: value for key, value in entry.items() if value is not None}
            line = json.dumps(self.masker.mask_data(fields), ensure_ascii=False)
            if self._file.closed:
                return  # the thread that renews the lease may write after the end of the session
            self._file.write(line + "\n")
            self._file.flush()

    def task(self, upid: str, **fields: Any) -> None:
        """Append a line for a task that this run started, once per task."""
        with self._lock:
            if upid in self._tasks:
                return
            self._tasks.add(upid)
        self.write("task", upid=upid, **fields)

    def calls(self, host: str | None = None) -> CallLog:
        """Where an Api or an SSH connection records its calls; each line names `host`, if that is given."""
        return HostCalls(self, host)

    def close(self) -> None:
        with self._lock:
            self._file.close()


@dataclass(frozen=True)
class HostCalls:
    """The calls to one host as lines of the audit log: a `CallLog`."""

    audit: AuditLog
    host: str | None

    def record(self, call: Call, /) -> None:
        if call.cut_off:
            self.audit.cut_off = time.monotonic()
        self.audit.write(
            "call",
            host=self.host,
            transport=call.transport,
            cmd=call.cmd[:LONGEST],
            rc=call.rc,
            error=call.error,
            ms=call.ms,
        )

    def record_task(self, upid: str, cmd: str, /) -> None:
        self.audit.task(upid, host=self.host, cmd=cmd)

    def hide(self, secret: str, /) -> None:
        self.audit.masker.add(secret)


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def task_ids(path: Path) -> frozenset[str]:
    """The UPIDs of the tasks that the run of this log started; empty without such a log.

    An incomplete line, whose writer was killed, is ignored.
    """
    upids = set()
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.get("event") == "task":
            upid = entry.get("upid")
            if isinstance(upid, str) and upid.startswith(_UPID):
                upids.add(upid)
    return frozenset(upids)
