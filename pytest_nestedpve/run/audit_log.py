"""The audit log of a run: one JSON object a line, masked; reports and the zombie proof read it."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pytest_nestedpve.pve.api import Api, Verbs, carried_by, carrier
from pytest_nestedpve.pve.errors import ApiError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.run.masking import Masker

_UPID = "UPID:"
_MAKES = re.compile(r"/(?:pools|qemu|clone)\Z")


class AuditLog:
    """Appends lines `{ts,run,event,phase,…}` to a 0600 file. Thread-safe.

    Events: phase_start, phase_end, call, task, playbook, teardown, leak; further ones are allowed.
    A line without a phase gets the one that is open. Values that are not JSON become text; None is left out.
    """

    def __init__(self, path: Path, run: str, *, masker: Masker | None = None) -> None:
        self.path = path
        self.run = run
        self.masker = masker if masker is not None else Masker()
        self._lock = threading.Lock()
        self._open: list[str] = []
        self._tasks: set[str] = set()
        self.cut_off: float | None = None
        """When (time.monotonic) a call that makes something was last cut off: it may still be at work."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace")
        if not _ends_a_line(path):
            self._file.write("\n")  # its writer was killed in the middle of one

    def write(self, event: str, /, **fields: Any) -> None:
        """Append one line. Raises OSError when the disk does."""
        with self._lock:
            phase = fields.pop("phase", None)
            if event == "phase_start" and phase:
                self._open.append(str(phase))
            phase = phase or (self._open[-1] if self._open else None)
            if event == "phase_end" and phase in self._open:
                self._open.remove(str(phase))
            entry = {"ts": round(time.time(), 3), "run": self.run, "event": event, "phase": phase, **fields}
            kept = {key: value for key, value in entry.items() if value is not None}
            line = json.dumps(self.masker.mask_data(kept), ensure_ascii=False)
            if self._file.closed:
                return  # a renewal thread's last line after the end of the session
            self._file.write(line + "\n")
            self._file.flush()

    def task(self, upid: str, **fields: Any) -> None:
        """Remember a task as started by this run, once."""
        with self._lock:
            if upid in self._tasks:
                return
            self._tasks.add(upid)
        self.write("task", upid=upid, **fields)

    def close(self) -> None:
        with self._lock:
            self._file.close()


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def task_ids(path: Path) -> frozenset[str]:
    """The UPIDs of the tasks that the run of this log started; empty when there is no such log.

    A line that was cut off in the middle (its writer was killed) is passed over.
    """
    found = set()
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
                found.add(upid)
    return frozenset(found)


# Milliseconds of calls that others needed, a token for example: they have lines, and times, of their own.
_beside: ContextVar[float] = ContextVar("nested_pve_beside", default=0.0)


class AuditedApi(Verbs):
    """An Api that writes each call, and each task a call started, into the audit log."""

    def __init__(self, api: Api, audit: AuditLog, host: str) -> None:
        self.wrapped = api
        self.audit = audit
        self.host = host
        listen = getattr(api, "listen", None)
        if listen is not None:
            listen(self._beside, audit.masker.add)

    @property
    def transport(self) -> str:
        """How the host is spoken to, in words."""
        return str(getattr(self.wrapped, "transport", "api"))

    def within(self, pool: Callable[[], str]) -> AuditedApi:
        """See `HostApi.within`."""
        return self._other("within", pool)

    def unfenced(self) -> AuditedApi:
        """See `HostApi.unfenced`."""
        return self._other("unfenced")

    def free(self) -> AuditedApi:
        """See `HostApi.free`."""
        return self._other("free")

    def _other(self, how: str, *args: Any) -> AuditedApi:
        other = getattr(self.wrapped, how, None)
        return self if other is None else AuditedApi(other(*args), self.audit, self.host)

    def close(self) -> None:
        ending = getattr(self.wrapped, "close", None)
        if ending is not None:
            ending()

    def _beside(self, transport: str, cmd: str, rc: int, ms: float) -> None:
        _beside.set(_beside.get() + ms)
        self.audit.write("call", host=self.host, transport=transport, cmd=cmd, rc=rc, ms=ms)

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        started, before = time.monotonic(), _beside.get()
        rc: int | None = 0
        error: str | None = None
        carried_by(None)
        try:
            answer = getattr(self.wrapped, verb)(path, **params)
        except BaseException as e:
            rc = e.rc if isinstance(e, ApiError) and e.rc is not None else 255
            error = str(e) or type(e).__name__
            if verb == "post" and _MAKES.search(path) and not isinstance(e, ApiError):
                self.audit.cut_off = time.monotonic()
            raise
        finally:
            # Only the names of parameters: values may be secrets, and descriptions are long.
            self.audit.write(
                "call",
                host=self.host,
                transport=carrier() or self.transport,
                cmd=" ".join([verb, path, *sorted(params)]),
                rc=rc,
                error=error,
                ms=max(0.0, round((time.monotonic() - started) * 1000 - (_beside.get() - before), 1)),
            )
        if isinstance(answer, str) and answer.startswith(_UPID):
            self.audit.task(answer, host=self.host, cmd=f"{verb} {path}")
        return answer


def in_the_log(command: str) -> bool:
    """Whether a command, as it is shown, stands in the log by what it does: an API call, a new token."""
    return " pvesh " in f" {command[:40]} " or command == "env (arguments with secrets)"


def audited(host: PveHost, audit: AuditLog) -> PveHost:
    """The same host with its calls and tasks written into `audit`; one that is audited already as it is."""
    if isinstance(host.api, AuditedApi):
        return host
    return PveHost(host.name, host.ssh, AuditedApi(host.api, audit, host.name), _known_node(host))


def _known_node(host: PveHost) -> str | None:
    return host._node
