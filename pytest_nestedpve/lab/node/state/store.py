"""The state of a node, or of all nodes of a cluster: one SQLite file, a transaction per change.

Documents (guests, storages, users, …) are JSON by key; what is asked by more than its key has columns.
Who changes something does it inside `change()`; everybody else reads what is committed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from typing import Any

from ..machine.alive import holding
from . import paths

TABLES = """
CREATE TABLE IF NOT EXISTS document (kind TEXT, id TEXT, body TEXT NOT NULL, PRIMARY KEY (kind, id));
CREATE TABLE IF NOT EXISTS member (vmid INTEGER PRIMARY KEY, pool TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS acl (path TEXT, kind TEXT, who TEXT, role TEXT, propagate INTEGER NOT NULL,
    PRIMARY KEY (path, kind, who, role));
CREATE TABLE IF NOT EXISTS task (upid TEXT PRIMARY KEY, node TEXT, pid INTEGER, pstart INTEGER,
    starttime INTEGER, type TEXT, id TEXT, user TEXT, endtime INTEGER, status TEXT);
CREATE INDEX IF NOT EXISTS task_by_time ON task (starttime);
"""


class Store:
    """A connection to the state; cheap to open, closed by `close` or with the process."""

    def __init__(self) -> None:
        file = paths.database()
        # Nodes of a cluster boot at the same moment: one makes it, the others find it made.
        with holding(file.with_name(".config.db.lock")) if not file.exists() else contextlib.nullcontext():
            new = not file.exists()
            self._db = sqlite3.connect(file, timeout=30, isolation_level=None)
            if new:
                file.chmod(0o600)
                self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            if new or not self._db.execute("SELECT 1 FROM sqlite_master WHERE name='task'").fetchone():
                self._db.executescript(TABLES)
        self._depth = 0

    def close(self) -> None:
        self._db.close()

    @contextlib.contextmanager
    def change(self) -> Iterator[Store]:
        """A transaction; nested ones join the outer. Errors roll back and go on."""
        if self._depth:
            yield self
            return
        self._db.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield self
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        else:
            self._db.execute("COMMIT")
        finally:
            self._depth -= 1

    def get(self, kind: str, key: str | int) -> dict[str, Any] | None:
        row = self._db.execute("SELECT body FROM document WHERE kind=? AND id=?", (kind, str(key))).fetchone()
        return json.loads(row[0]) if row else None

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        rows = self._db.execute("SELECT id, body FROM document WHERE kind=? ORDER BY id", (kind,))
        return {key: json.loads(body) for key, body in rows}

    def put(self, kind: str, key: str | int, body: dict[str, Any]) -> None:
        with self.change():
            self._db.execute(
                "INSERT OR REPLACE INTO document VALUES (?, ?, ?)", (kind, str(key), json.dumps(body))
            )

    def drop(self, kind: str, key: str | int) -> bool:
        with self.change():
            return (
                self._db.execute("DELETE FROM document WHERE kind=? AND id=?", (kind, str(key))).rowcount > 0
            )

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        return self._db.execute(sql, values).fetchall()

    def run(self, sql: str, *values: Any) -> int:
        """Change by SQL (inside `change()`); how many rows it was."""
        with self.change():
            return self._db.execute(sql, values).rowcount

    # -- pools and their members

    def pool_of(self, vmid: int) -> str | None:
        rows = self.rows("SELECT pool FROM member WHERE vmid=?", vmid)
        return rows[0][0] if rows else None

    def members(self, pool: str) -> list[int]:
        return [row[0] for row in self.rows("SELECT vmid FROM member WHERE pool=? ORDER BY vmid", pool)]


def release() -> None:
    """Close this process's connections, before a fork; the next `store()` opens one anew."""
    for opened in _open.values():
        opened.close()
    _open.clear()


_open: dict[tuple[int, str], Store] = {}


def store() -> Store:
    """The store of this process, opened at first use. Nothing of SQLite may cross a fork: `release` first."""
    key = (os.getpid(), str(paths.database()))
    if key not in _open:
        _open[key] = Store()
    return _open[key]
