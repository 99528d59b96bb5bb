"""A PVE host: a name, an SSH connection, an API. The outer and the nested host are both of this type."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.calls import CallLog, LoggedApi
from pytest_nestedpve.pve.cluster import NODE_NAME as NODE_NAME
from pytest_nestedpve.pve.cluster import Cluster, NodeSsh, read_cluster
from pytest_nestedpve.pve.errors import NodeUnreachable

if TYPE_CHECKING:
    from pytest_nestedpve.pve.ssh.connection import CommandResult


class SshLike(Protocol):
    """The part of `SshConnection` that hosts and APIs use."""

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        secret: bool = False,
        logged: bool = True,
    ) -> CommandResult: ...

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None: ...

    def get(self, remote: str, limit: int = ...) -> bytes: ...

    def open_channel(self, host: str, port: int) -> Any: ...

    def close(self) -> None: ...


class PveHost:
    """A host with SSH and `pvesh`.

    `ssh_config` is the file that ssh needs to reach it by its name; None: the user's own file.
    `release` is called by `close`, last: it gives back the resource that the host runs on (a lab).
    """

    def __init__(
        self,
        name: str,
        ssh: SshLike,
        api: Api,
        node: str | None = None,
        *,
        ssh_config: Path | None = None,
        release: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.ssh = ssh
        self.api = api
        self.ssh_config = ssh_config
        self._release = release
        self._node = node
        self._cluster: Cluster | None = None
        self._entry: PveHost | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<PveHost {self.name}>"

    @property
    def node(self) -> str:
        """The node that the connection ends on, by its name in PVE; read once.

        Raises UnreadableAnswer when /cluster/status names no local node, and what `api.get` raises.
        """
        if self._node is None:
            self._node = self.cluster.local.name
        return self._node

    @property
    def cluster(self) -> Cluster:
        """The cluster that the host is a member of, or the host alone; read once. Raises as `node` does."""
        with self._lock:
            if self._cluster is None:
                self._cluster = read_cluster(self.api.get("/cluster/status"))
            return self._cluster

    @property
    def entry(self) -> PveHost:
        """The host that the connection ends on: this one, unless `at` returned it."""
        return self if self._entry is None else self._entry

    def at(self, node: str) -> PveHost:
        """The host with another node of its cluster as `node`, and commands and files on that node.

        Raises NodeUnreachable when the cluster has no such node.
        """
        if node == self.node:
            return self
        if node == self.entry.node:
            return self.entry
        member = self.cluster.member(node)
        if member is None:
            nodes = ", ".join(known.name for known in self.cluster.members)
            raise NodeUnreachable(
                f"expected a node of {self.name}'s cluster, found {node!r}; it has: {nodes}"
            )
        other = PveHost(node, NodeSsh(self.entry.ssh, member), self.api, node, ssh_config=self.ssh_config)
        other._cluster, other._entry = self._cluster, self.entry
        return other

    def with_api(self, api: Api, *, entry: PveHost | None = None) -> PveHost:
        """The same host by another API. `close` belongs to the host that was opened, not to this one."""
        other = PveHost(self.name, self.ssh, api, self._node, ssh_config=self.ssh_config)
        other._cluster, other._entry = self._cluster, entry
        return other

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

    def logged(self, log: CallLog) -> PveHost:
        """The same host, its API calls recorded in `log`."""
        if hasattr(self.api, "logged"):
            return self._view("logged", log)
        return self.with_api(LoggedApi(self.api, log), entry=self._entry)

    def within(self, pool: Callable[[], str]) -> PveHost:
        """The same host, changing guests of that pool only, where its API can have PVE enforce that."""
        return self._view("within", pool)

    def unfenced(self) -> PveHost:
        """The same host, changing guests as root: for a VM that is not in the run's pool yet."""
        return self._view("unfenced")

    def free(self) -> PveHost:
        """The same host, with root's rights for everything."""
        return self._view("free")

    def _view(self, name: str, *args: Any) -> PveHost:
        view = getattr(self.api, name, None)
        if view is None:
            return self
        return self.with_api(view(*args), entry=self._entry)

    def close(self) -> None:
        """Delete the API's own token on the host, close the connection, release the lab: in this order.

        A step that raises does not keep the later ones from running; its error is raised at the end.
        """
        release, self._release = self._release, None
        with contextlib.ExitStack() as ending:
            if release is not None:
                ending.callback(release)
            ending.callback(self.ssh.close)
            close_api = getattr(self.api, "close", None)
            if close_api is not None:
                ending.callback(close_api)
