"""The directories of earlier runs: those of ended runs are deleted, except the newest."""

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
"""The number of ended runs whose directories are kept."""

_OLD = ".over-"  # prefix of the name while a directory is deleted
_TAIL = 1 << 16


def prune(folder: Path, own: str) -> None:
    """Delete the directories of old runs below `folder`, except that of the run `own`. Never raises.

    Only of ended runs: without leftovers on the host, by the end of the audit log, not kept, and with a free
    lock. Other directories may be needed to clean up.
    """
    with contextlib.suppress(Exception):
        kept = {record.run for record in kept_runs.list_kept()}
        ended = 0
        for path in _newest_first(folder):
            if path.name in kept or path.name == own or not is_cleaned_up(path):
                continue
            ended += 1
            if ended > NEWEST:
                # First renamed: half a directory would look like that of a killed run.
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(_OLD + path.name))
        for path in folder.glob(f"{_OLD}*"):
            shutil.rmtree(path, ignore_errors=True)


def is_cleaned_up(path: Path) -> bool:
    """Whether the run of this directory has no leftovers on its host, and no session works on the run."""
    return not SessionLock.alive(path.name) and _is_torn_down(path / "audit.jsonl")


def record_cleanup(path: Path, host: str) -> None:
    """Record in the run's own log, if it is on this machine, that the run has no leftovers on `host`."""
    log = path / "audit.jsonl"
    with contextlib.suppress(OSError):
        if log.exists():
            audit = AuditLog(log, path.name)
            cause = "another session has cleaned up after it"
            audit.write("teardown", phase="destroy", status="clean", host=host, cause=cause)
            audit.close()


def _newest_first(folder: Path) -> list[Path]:
    dated = []
    for path in folder.iterdir():
        if RUN_ID.match(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError):
                dated.append(((path / "audit.jsonl").stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]


def _is_torn_down(log: Path) -> bool:
    for line in _last_lines(log):
        event = line.get("event")
        if event == "teardown" and line.get("vmid") is None and line.get("phase") in (None, "destroy"):
            return line.get("status") == "clean"
        if event in ("session", "phase_start"):
            return False  # resumed later, and interrupted
    return False


def _last_lines(log: Path) -> Iterator[dict[str, object]]:
    """The entries at the end of the log, the last one first."""
    with log.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry
