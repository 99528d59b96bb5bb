"""The task engine: a worker process per task, a UPID, a log file, an exit status.

A worker is forked and detached: it outlives its caller (recordings disconnect-*). In a command on the node
(`sync`) the caller relays the worker's output and waits; behind pveproxy the caller gets the UPID at once.
On a node in this process a task runs inside the call that starts it, unless a fault rule delays it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import faults
from ..api.errors import BadParameters, PveFailure
from . import clock, output, paths, worker
from .store import release, store
from .worker import Worker


@dataclass(frozen=True)
class Upid:
    """The parts of a UPID; `user` may be a token's full id."""

    text: str
    node: str
    pid: int
    pstart: int
    starttime: int
    type: str
    id: str
    user: str


@dataclass(frozen=True)
class Started:
    """A started task. `status` is its exit status if the caller waited ("OK" or the error)."""

    upid: str
    status: str | None = None
    error: str | None = None  # the error message with its line breaks
    warnings: int = 0


class Interrupted(BaseException):
    """The worker got SIGTERM or SIGINT: "received interrupt"."""


def parse(text: str) -> Upid:
    match = re.fullmatch(
        r"UPID:([a-zA-Z0-9]([a-zA-Z0-9\-]*[a-zA-Z0-9])?):([0-9A-Fa-f]{8}):([0-9A-Fa-f]{8,9}):([0-9A-Fa-f]{8}):"
        r"([^:\s]+):([^:\s]*):([^:\s]+):",
        text,
    )
    if match is None:
        raise BadParameters({"upid": "unable to parse worker upid"}, rc=255)
    g = match.groups()
    return Upid(text, g[0], int(g[2], 16), int(g[3], 16), int(g[4], 16), g[5], g[6], g[7])


def log_file(upid: str) -> Path:
    start = parse(upid).starttime
    return paths.at(f"/var/log/pve/tasks/{start & 0xF:X}") / upid


def start(kind: str, ident: str, user: str, work: Callable[[], Any], *, sync: bool) -> Started:
    """Run `work` as a task. With `sync` copy its output to stdout and wait for its end."""
    rule = faults.on_task(kind, ident)
    if rule is not None:
        work = _faulty(rule, int(ident) if ident.isdigit() else None, work)
    if paths.in_process() and (rule is None or rule.do not in ("delay", "hang")):
        started = _run_here(kind, ident, user, work, sync)
    else:
        started = _run_forked(kind, ident, user, work, sync)
    if rule is not None:
        faults.after(rule)
    return started


def _faulty(rule: faults.Rule, vmid: int | None, work: Callable[[], Any]) -> Callable[[], Any]:
    def faulty() -> Any:
        if rule.do == "hang":
            threading.Event().wait()
        faults.before(rule, vmid)
        return work()

    return faulty


def _run_here(kind: str, ident: str, user: str, work: Callable[[], Any], sync: bool) -> Started:
    node, now = paths.node(), int(clock.now())
    with store().change() as db:
        number = db.rows("SELECT COALESCE(MAX(rowid), 0) FROM task")[0][0] + 0x1001
        upid = f"UPID:{node}:{number:08X}:{number << 4:08X}:{now:08X}:{kind}:{ident}:{user}:"
        # No process start time: the task ends with the call (see `_with_end`, `stop`).
        db.run(_INSERT, upid, node, os.getpid(), 0, now, kind, ident, user)
    file = log_file(upid)
    file.parent.mkdir(parents=True, exist_ok=True)
    out, err = (output.out(), output.err()) if sync else (None, None)
    running = Worker(upid, kind)
    token = worker.current.set(running)
    try:
        with file.open("w") as log:
            with output.streams(_Copy(log, out), _Copy(log, err)):
                status = _status_of(work, log, running)
            line = _end(upid, status, log, sync)
    finally:
        worker.current.reset(token)
    return Started(upid, *((line, None if _is_success(status) else status, running.warnings) if sync else ()))


class _Copy:
    """A stream into a task's log, and into another stream."""

    def __init__(self, log: Any, other: Any) -> None:
        self._streams = [log] if other is None else [log, other]

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


def _run_forked(kind: str, ident: str, user: str, work: Callable[[], Any], sync: bool) -> Started:
    sys.stdout.flush()
    sys.stderr.flush()
    release()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            if os.fork() == 0:
                _run_worker(kind, ident, user, work, write, sync)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        return _follow(pipe, sync)


def _follow(pipe: Any, sync: bool) -> Started:
    """Messages of the worker: one byte of kind, four of length, the text."""
    upid, status, error, warnings = "", None, None, 0
    while True:
        head = _exactly(pipe, 5)
        if not head:
            break
        text = _exactly(pipe, int.from_bytes(head[1:], "big")).decode()
        if head[:1] == b"U":
            upid = text
            if not sync:
                break
        elif head[:1] == b"O":
            output.out().write(text)
            output.out().flush()
        elif head[:1] == b"X":
            output.out().flush()
            output.err().write(text)
        elif head[:1] == b"S":
            status = text
            break  # the last message; a machine's supervisor may keep the pipe open
        elif head[:1] == b"E":
            error = text
        elif head[:1] == b"W":
            warnings = int(text)
    if not upid:
        raise PveFailure("got no worker upid - start worker failed")
    if sync and status is None:
        status = error = "unexpected status"
    return Started(upid, status, error, warnings)


def _exactly(pipe: Any, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = pipe.read(count - len(data))
        if not piece:
            return b""
        data += piece
    return data


class _Tee:
    """The worker's stdout or stderr: writes to the log, and to the caller while its pipe is open."""

    encoding = "utf-8"
    errors = "replace"

    def __init__(self, log: Any, pipe: int | None, kind: bytes = b"O") -> None:
        self._log = log
        self._pipe = pipe
        self._kind = kind

    def write(self, text: str) -> int:
        self._log.write(text)
        self._log.flush()
        self.send(self._kind, text)
        return len(text)

    def send(self, kind: bytes, text: str) -> None:
        if self._pipe is None:
            return
        data = text.encode()
        try:
            os.write(self._pipe, kind + len(data).to_bytes(4, "big") + data)
        except OSError:
            self._pipe = None

    def flush(self) -> None:
        self._log.flush()

    def isatty(self) -> bool:
        return False


def process_start(pid: int) -> int | None:
    """When process `pid` started, in ticks since boot; None without such a process (or for a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _run_worker(
    kind: str, ident: str, user: str, work: Callable[[], Any], pipe: int, sync: bool
) -> None:  # never returns
    os.setsid()
    # A caller with the UPID may stop the task before its handlers are installed.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    # Close everything inherited from the caller: its connection, its locks.
    os.closerange(3, pipe)
    os.closerange(pipe + 1, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 65536 else 4096)
    now = int(clock.now())
    pid, pstart = os.getpid(), process_start(os.getpid()) or 0
    node = paths.node()
    upid = f"UPID:{node}:{pid:08X}:{pstart:08X}:{now:08X}:{kind}:{ident}:{user}:"
    file = log_file(upid)
    file.parent.mkdir(parents=True, exist_ok=True)
    log = open(file, "w")  # noqa: SIM115 (for the process's life)
    running = Worker(upid, kind)
    worker.current.set(running)
    store().run(_INSERT, upid, node, pid, pstart, now, kind, ident, user)
    tee = _Tee(log, pipe)
    tee.send(b"U", upid)
    errors = _Tee(log, pipe if sync else None, b"X")
    if not sync:
        os.close(pipe)
        tee._pipe = None
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.stdout, sys.stderr = tee, errors

    def interruptible() -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        return work()

    status = "unexpected status"
    try:
        for number in _ENDS:
            signal.signal(number, _interrupt)
        with output.streams(tee, errors):
            status = _status_of(interruptible, log, running)
    finally:
        for number in _ENDS:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(Exception):
            line = _end(upid, status, log, sync)
            if not _is_success(status):
                tee.send(b"E", status)
            elif running.warnings:
                tee.send(b"W", str(running.warnings))
            tee.send(b"S", line)
        os._exit(0)


def _interrupt(*_: Any) -> None:
    raise Interrupted


def _status_of(work: Callable[[], Any], log: Any, running: Worker) -> str:
    """Run the work; the exit status of the task."""
    try:
        work()
    except Interrupted:
        return "received interrupt"
    except PveFailure as e:
        return e.for_cli().rstrip("\n")
    except Exception as e:
        traceback.print_exc(file=log)
        return f"{e.__class__.__name__}: {e}"
    return f"WARNINGS: {running.warnings}" if running.warnings else "OK"


def _is_success(status: str) -> bool:
    return status == "OK" or status.startswith("WARNINGS: ")


def _end(upid: str, status: str, log: Any, sync: bool) -> str:
    """Write the end of the task to log and database; the exit status in one line."""
    line = status.replace("\n", " ").strip()
    if _is_success(status):
        log.write(f"TASK {status}\n")
    else:
        # A command on the node prints its error itself: that line is empty in the log [tasks-012].
        log.write(("\n" if sync else "") + f"TASK ERROR: {line}\n")
    log.flush()
    store().run("UPDATE task SET endtime=?, status=? WHERE upid=?", int(clock.now()), line, upid)
    return line


_ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_INSERT = "INSERT INTO task VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL, NULL)"


# -- reading the list of tasks


@dataclass(frozen=True)
class Task:
    """A row of the list of tasks; `status` and `endtime` None while it runs."""

    upid: str
    node: str
    pid: int
    pstart: int
    starttime: int
    type: str
    id: str
    user: str
    endtime: int | None
    status: str | None

    @property
    def running(self) -> bool:
        return self.endtime is None


def _with_end(task: Task) -> Task:
    """The task; one whose worker ended without a status gets "unexpected status" [ownE-015]."""
    if not task.running or task.node != paths.node() or _alive(task):
        return task
    current = store().rows("SELECT * FROM task WHERE upid=?", task.upid)  # it may have ended just now
    if current and current[0][8] is not None:
        return Task(*current[0])
    ended = dataclasses.replace(task, endtime=int(clock.now()), status="unexpected status")
    store().run(
        "UPDATE task SET endtime=?, status=? WHERE upid=? AND endtime IS NULL",
        *(ended.endtime, ended.status, task.upid),
    )
    return ended


def _alive(task: Task) -> bool:
    started = process_start(task.pid)
    return started == task.pstart or (task.pstart == 0 and started is not None)


def find(upid: str) -> Task | None:
    rows = store().rows("SELECT * FROM task WHERE upid=?", upid)
    return _with_end(Task(*rows[0])) if rows else None


def every(ident: str | None = None) -> list[Task]:
    """This node's tasks, or those of one id, the newest first."""
    return [task for task in everywhere(ident) if task.node == paths.node()]


def everywhere(ident: str | None = None) -> list[Task]:
    """The tasks of all nodes; only this node's are checked for an ended worker."""
    which, values = ("WHERE id=?", [ident]) if ident is not None else ("", [])
    rows = store().rows(f"SELECT * FROM task {which} ORDER BY starttime DESC, rowid DESC", *values)
    return [_with_end(Task(*row)) for row in rows]


def stop(upid: str, *, wait: float = 5.0) -> None:
    """Interrupt the task's worker and wait (at most `wait` seconds) until it has cleaned up."""
    task = find(upid)
    if task is None or not task.running or task.pstart == 0:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(task.pid, signal.SIGTERM)
    end = time.monotonic() + wait
    while time.monotonic() < end and process_start(task.pid) == task.pstart:
        threading.Event().wait(0.05)
    if process_start(task.pid) == task.pstart:
        with contextlib.suppress(ProcessLookupError):
            os.kill(task.pid, signal.SIGKILL)
