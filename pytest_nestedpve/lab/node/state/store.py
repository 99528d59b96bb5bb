"""The state of a node, or of all nodes of a cluster: one SQLite file, a transaction per change.

Documents (guests, storages, users, …) are JSON by key; data queried by more than a key has columns. Changes
happen inside `change()`; readers see committed data.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
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
    """A connection to the state, which threads share; opened at first use, and again after `close`."""

    def __init__(self) -> None:
        self._file = paths.database()
        self._connection: sqlite3.Connection | None = None
        self._depth = 0
        self._lock = threading.RLock()

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = self._connect(self._file)
        return self._connection

    @staticmethod
    def _connect(file: Path) -> sqlite3.Connection:
        # Nodes of a cluster boot at the same moment: one creates the file, the others wait for it.
        with holding(file.with_name(".config.db.lock")) if not file.exists() else contextlib.nullcontext():
            new = not file.exists()
            db = sqlite3.connect(file, timeout=30, isolation_level=None, check_same_thread=False)
            # A node in this process belongs to a test: its state need not survive a crash of the machine.
            db.execute(f"PRAGMA synchronous={'OFF' if paths.in_process() else 'NORMAL'}")
            if new:
                file.chmod(0o600)
                db.execute("PRAGMA journal_mode=WAL")
            if new or not db.execute("SELECT 1 FROM sqlite_master WHERE name='task'").fetchone():
                db.executescript(TABLES)
        return db

    def close(self) -> None:
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    @contextlib.contextmanager
    def change(self) -> Iterator[Store]:
        """A transaction; nested ones join the outer one. An error rolls it back. Other threads wait."""
        with self._lock:
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
        rows = self.rows("SELECT body FROM document WHERE kind=? AND id=?", kind, str(key))
        return json.loads(rows[0][0]) if rows else None

    def all(self, kind: str) -> dict[str, dict[str, Any]]:
        rows = self.rows("SELECT id, body FROM document WHERE kind=? ORDER BY id", kind)
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
        with self._lock:
            return self._db.execute(sql, values).fetchall()

    def run(self, sql: str, *values: Any) -> int:
        """Run a changing statement; the number of changed rows."""
        with self.change():
            return self._db.execute(sql, values).rowcount

    # -- pools and their members

    def pool_of(self, vmid: int) -> str | None:
        rows = self.rows("SELECT pool FROM member WHERE vmid=?", vmid)
        return rows[0][0] if rows else None

    def members(self, pool: str) -> list[int]:
        return [row[0] for row in self.rows("SELECT vmid FROM member WHERE pool=? ORDER BY vmid", pool)]


MOST_OPEN = 16
_open: dict[tuple[int, str], Store] = {}
_inherited: list[Store] = []  # the parent process's, inherited by a fork: not to be closed here
_opening = threading.Lock()


def release() -> None:
    """Close this process's connections, before a fork."""
    with _opening:
        for opened in _open.values():
            opened.close()
        _open.clear()


def store() -> Store:
    """The store of this process, opened at first use. Nothing of SQLite may cross a fork: `release` first."""
    key = (os.getpid(), str(paths.database()))
    with _opening:
        if key not in _open:
            if len(_open) >= MOST_OPEN:
                _open.pop(next(iter(_open))).close()
            _open[key] = Store()
        return _open[key]


def _forked() -> None:
    global _opening
    _inherited.extend(_open.values())
    _open.clear()
    _opening = threading.Lock()


os.register_at_fork(after_in_child=_forked)
