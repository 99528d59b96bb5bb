"""The identity of a run: its id, its owner and client, when it was created."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import os
import re
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings

from pytest_nestedpve.run.directory import RunDirectory, RunDirectoryError

RUN_ID = re.compile(r"[0-9a-f]{12}\Z")
HARD_LIMIT = 24 * 3600
"""Seconds after which a run has expired, also with a valid lease."""


@dataclass(frozen=True)
class Run:
    """A run of one session. Times are epoch seconds; the lease on the host decides (ownership.Lease).

    `owner` is user@host, for people to read, `client` a hash of machine-id and uid, `session` a nonce of this
    process.
    """

    id: str
    owner: str
    client: str
    session: str
    dir: Path
    created: int
    expires: int
    hard: int

    @classmethod
    def create(
        cls, settings: Settings, rootdir: Path, now: float | None = None, *, run_id: str | None = None
    ) -> Run:
        """A new run, with its directory (mode 0700) below `settings.run_dir`. Raises RunDirectoryError.

        `run_id` is a new id that was published before.
        """
        moment = int(time.time() if now is None else now)
        run_id = run_id or secrets.token_hex(6)
        run = cls(
            id=run_id,
            owner=owner(),
            client=client_hash(),
            session=secrets.token_hex(8),
            dir=Path(os.path.normpath(rootdir / settings.run_dir / run_id)),
            created=moment,
            expires=moment + int(settings.lease),
            hard=moment + HARD_LIMIT,
        )
        run.directory.create()
        return run

    @property
    def tag(self) -> str:
        """The tag of the run's VMs, for people."""
        return f"npve-{self.id}"

    @property
    def directory(self) -> RunDirectory:
        return RunDirectory(self.dir)


def owner() -> str:
    """user@host of this process, with characters that are safe in JSON and in tables, at most 80."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return re.sub(r"[^A-Za-z0-9._@-]", "_", f"{user}@{socket.gethostname()}")[:80]


def client_hash() -> str:
    """The same for all sessions of one user on one machine: 16 hex digits of a hash of machine-id and uid."""
    machine = ""
    for name in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        with contextlib.suppress(OSError):
            machine = Path(name).read_text(encoding="ascii", errors="replace").strip()
        if re.fullmatch(r"[0-9a-f]{32}", machine):
            break
    else:
        machine = _own_machine_id()
    return hashlib.sha256(f"nested-pve:{machine}:{os.getuid()}".encode()).hexdigest()[:16]


def state_home() -> Path:
    """The directory of locks and kept runs of all projects: $XDG_STATE_HOME/nested-pve."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "nested-pve"


def _own_machine_id() -> str:
    # Without a machine-id (usually in a container) an own one: no other machine may have the same.
    path = state_home() / "machine-id"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError), path.open("x", encoding="ascii") as file:
            file.write(secrets.token_hex(16))
        return path.read_text(encoding="ascii").strip()
    except OSError as e:
        raise RunDirectoryError(
            f"this machine has no /etc/machine-id, and {path} cannot be written instead: {e}; create either"
        ) from e
