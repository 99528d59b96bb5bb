"""A PVE host: a name, an SSH connection, an API. The outer and the nested one are the same thing."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.errors import UnreadableAnswer

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh import CommandResult

NODE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")


class SshLike(Protocol):
    """What is needed of an SSH connection; `SshConnection` is the real one."""

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        secret: bool = False,
    ) -> CommandResult: ...

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None: ...

    def get(self, remote: str, limit: int = ...) -> bytes: ...

    def open_channel(self, host: str, port: int) -> Any: ...

    def close(self) -> None: ...


class PveHost:
    """Anything reachable over SSH that answers `pvesh`.

    `ssh_config` is the file that ssh needs to reach it by its name; None: the user's own will do.
    """

    ssh_config: Path | None = None

    def __init__(self, name: str, ssh: SshLike, api: Api, node: str | None = None) -> None:
        self.name = name
        self.ssh = ssh
        self.api = api
        self._node = node
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<PveHost {self.name}>"

    @property
    def node(self) -> str:
        """The node that the connection ends on, by PVE's own name for it; asked once.

        Raises UnreadableAnswer when /cluster/status names no local node, and what `api.get` raises.
        """
        with self._lock:
            if self._node is None:
                self._node = _local_node(self.api.get("/cluster/status"))
            return self._node

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        secret: bool = False,
    ) -> CommandResult:
        """`ssh.run`: a list is an argv, a string is shell text; `timeout` in seconds."""
        return self.ssh.run(command, stdin=stdin, timeout=timeout, secret=secret)

    def within(self, pool: Callable[[], str]) -> PveHost:
        """The same host, acting on guests inside of that pool only, where its API can have PVE see to it."""
        narrower = getattr(self.api, "within", None)
        if narrower is None:
            return self
        host = PveHost(self.name, self.ssh, narrower(pool), self._node)
        host.ssh_config = self.ssh_config
        return host

    def close(self) -> None:
        """Give up what the API made for itself on the host, then the connection."""
        ending = getattr(self.api, "close", None)
        if ending is not None:
            ending()
        self.ssh.close()


def _local_node(answer: Any) -> str:
    # A stand-alone host has exactly one entry, type node, local 1 (facts 36).
    for entry in answer if isinstance(answer, list) else ():
        if not isinstance(entry, dict) or entry.get("type") != "node":
            continue
        if str(entry.get("local")) in ("1", "True"):
            name = entry.get("name")
            if isinstance(name, str) and NODE_NAME.match(name):
                return name
    raise UnreadableAnswer(
        f"expected one entry of type node with local=1 and a valid name, found {str(answer)[:300]!r}",
        call="get /cluster/status",
    )
