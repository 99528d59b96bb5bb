"""The directories of earlier runs: those that are over go, all but the newest."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from pytest_nestedpve.run import kept_runs
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import RUN_ID
from pytest_nestedpve.run.lock import SessionLock

NEWEST = 20
"""How many runs that are over keep their directories."""

_OLD = ".over-"  # in front of the name of one that is being removed
_TAIL = 1 << 16


def prune(folder: Path, own: str) -> None:
    """Remove the directories of old runs below `folder`; not that of the run `own`. Never raises.

    Only of runs that are over: nothing of them is on their host, by their audit log's last word; they are
    not kept, and no session holds their lock. What else is there may be needed to clean up after it.
    """
    with contextlib.suppress(Exception):
        kept = {each.run for each in kept_runs.all_kept()}
        over = 0
        for path in _newest_first(folder):
            if path.name in kept or path.name == own or not is_over(path):
                continue
            over += 1
            if over > NEWEST:
                # In one step: half a directory would look like one of a run that was killed.
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(_OLD + path.name))
        for path in folder.glob(f"{_OLD}*"):
            shutil.rmtree(path, ignore_errors=True)


def is_over(path: Path) -> bool:
    """Whether the run with that directory has left nothing on its host, and no session works on it."""
    return not SessionLock.alive(path.name) and _torn_down(path / "audit.jsonl")


def note_over(path: Path, host: str) -> None:
    """Have the run's own log, if it is on this machine, say that nothing is left of the run on `host`."""
    log = path / "audit.jsonl"
    with contextlib.suppress(OSError):
        if log.exists():
            audit = AuditLog(log, path.name)
            why = "another session has cleaned up after it"
            audit.write("teardown", phase="destroy", status="clean", host=host, cause=why)
            audit.close()


def _newest_first(folder: Path) -> list[Path]:
    dated = []
    for path in folder.iterdir():
        if RUN_ID.match(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError):
                dated.append(((path / "audit.jsonl").stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _torn_down(log: Path) -> bool:
    for line in _last_lines(log):
        event = line.get("event")
        if event == "teardown" and line.get("vmid") is None and line.get("phase") in (None, "destroy"):
            return line.get("status") == "clean"
        if event in ("session", "phase_start"):
            return False  # gone on with, and cut off
    return False


def _last_lines(log: Path) -> Iterator[dict[str, object]]:
    """The lines of the log's end, the last one first."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found
