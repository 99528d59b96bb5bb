"""PVE's tasks: waiting for their end and reading their status, the only proof that a change took effect."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pytest_nestedpve.pve.answers import UPID, entries, mapping, shown
from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import PveError, TaskFailed, UnreadableAnswer

_LONGEST = 1000
_WARNINGS = re.compile(r"WARNINGS: \d+")


@dataclass(frozen=True)
class Upid:
    """A parsed task id. `starttime` is in epoch seconds of the host's clock."""

    text: str
    node: str
    pid: int
    starttime: int
    type: str
    id: str
    user: str


@dataclass(frozen=True)
class TaskResult:
    """The end of a task that succeeded; `warnings`: there are warnings in its log."""

    upid: str
    node: str
    exitstatus: str
    warnings: bool


def parse_upid(text: Any) -> Upid:
    """Parse a UPID; raises UnreadableAnswer for any other value."""
    match = UPID.fullmatch(text) if isinstance(text, str) and len(text) < _LONGEST else None
    if match is None:
        raise UnreadableAnswer(f"expected the id of a task (UPID:…), found {shown(text)}")
    return Upid(
        match.string,
        match["node"],
        int(match["pid"], 16),
        int(match["starttime"], 16),
        match["type"],
        match["id"],
        match["user"],
    )


def wait_task(
    api: Api, upid: str, *, timeout: float, interval: tuple[float, float] = (0.05, 0.3)
) -> TaskResult:
    """Wait for a task's end, at most `timeout` seconds (nominal), polling at a growing interval (seconds).

    "OK" and "WARNINGS: n" are success, any other status is not (PVE 9.2 reports "unexpected status" for a
    worker that was killed). Raises TaskFailed with the end of its log and the typed reason as its cause,
    CommandTimeout, UnreadableAnswer and the errors of the API.
    """
    task = parse_upid(upid)
    path = f"/nodes/{task.node}/tasks/{upid}"
    last_seen = "nothing"

    def ended() -> str | None:
        nonlocal last_seen
        answer = mapping(api.get(f"{path}/status"), call=f"get {path}/status")
        status, exitstatus = answer.get("status"), answer.get("exitstatus")
        last_seen = f"status {status!r}, exitstatus {exitstatus!r}"
        if status == "running" or not isinstance(exitstatus, str) or not exitstatus.strip():
            return None
        return exitstatus.strip()

    exitstatus = wait_until(
        ended,
        deadline=Deadline(timeout),
        what=lambda: f"the end of task {upid} (last seen: {last_seen})",
        interval=interval,
    )
    warnings = _WARNINGS.fullmatch(exitstatus) is not None
    if exitstatus != "OK" and not warnings:
        try:
            log = task_log(api, upid)
        except PveError as error:
            log = (f"(its log could not be read: {error})",)
        failed = TaskFailed(upid, exitstatus, log)
        raise failed from failed.reason
    return TaskResult(upid, task.node, exitstatus, warnings)


def task_log(api: Api, upid: str, limit: int = 500) -> tuple[str, ...]:
    """The first lines of a task's log, at most `limit`; "no content" is no line."""
    task = parse_upid(upid)
    path = f"/nodes/{task.node}/tasks/{upid}/log"
    lines = (line.get("t") for line in entries(api.get(path, limit=limit), call=f"get {path}"))
    return tuple(line for line in lines if isinstance(line, str) and line != "no content")
