"""The cluster of a host: its nodes, the node of a guest, commands on another node.

Sources: recordings of PVE 9.2, groups cluster and nodedown. Root of each node may log in at every other
node, with keys that the cluster manages; PVE itself forwards calls that way.
"""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_nestedpve.pve.answers import entries, flag, shown, text, whole
from pytest_nestedpve.pve.errors import NodeUnreachable, UnreadableAnswer
from pytest_nestedpve.pve.ssh import remote_file

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.ssh.command import CommandResult

NODE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")
# Messages of ssh itself, for when ssh and not the command ended with exit status 255.
_SSH_FAILED = re.compile(
    r"(?m)^(?:ssh: |Host key verification failed|kex_exchange_identification|No \S+ host key is known|"
    r"Connection (?:closed|reset|timed)|.*Permission denied \()"
)


@dataclass(frozen=True)
class Member:
    """A node of the cluster; `local`: the connected node; `ip`: the address that other nodes use."""

    name: str
    online: bool
    local: bool
    ip: str | None


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster; `name` is None for a stand-alone host, which is its only node."""

    name: str | None
    members: tuple[Member, ...]

    @property
    def several(self) -> bool:
        """Whether a guest may be on another node than the connected node."""
        return len(self.members) > 1

    @property
    def local(self) -> Member:
        return next(member for member in self.members if member.local)

    def member(self, node: str) -> Member | None:
        return next((member for member in self.members if member.name == node), None)


def read_cluster(answer: Any) -> Cluster:
    """The cluster from an answer of /cluster/status. Raises UnreadableAnswer when no node is local."""
    cluster_name, members = None, []
    # A stand-alone host has exactly one entry, type node, local 1 (facts 36).
    for entry in answer if isinstance(answer, list) else ():
        if not isinstance(entry, dict):
            continue
        name = entry.get("name")
        if entry.get("type") == "cluster":
            cluster_name = text(name)
        elif entry.get("type") == "node" and isinstance(name, str) and NODE_NAME.match(name):
            online, local = flag(entry.get("online", 1)), flag(entry.get("local", 0))
            members.append(Member(name, online, local, _address(entry.get("ip"))))
    if not any(member.local for member in members):
        raise UnreadableAnswer(
            f"expected one entry of type node with local=1 and a valid name, found {str(answer)[:300]!r}",
            call="get /cluster/status",
        )
    return Cluster(cluster_name, tuple(members))


def _address(value: Any) -> str | None:
    try:
        return str(ipaddress.ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def node_of(api: Api, vmid: int) -> str | None:
    """The current node of a VM, None if the VM does not exist. Raises PveError.

    /cluster/resources always has the current node, also where the rest of an entry is old (recorded).
    """
    for entry in entries(api.get("/cluster/resources", type="vm"), call="get /cluster/resources"):
        if entry.get("type") == "qemu" and whole(entry.get("vmid")) == vmid:
            node = entry.get("node")
            if not isinstance(node, str) or not NODE_NAME.match(node):
                raise UnreadableAnswer(f"expected the node of VM {vmid}, found {shown(node)}")
            return node
    return None


def nodes_now(api: Api) -> dict[str, str]:
    """The status of each node, by its name: "online", "offline", "unknown". Raises PveError."""
    answer = entries(api.get("/nodes"), call="get /nodes")
    return {str(entry.get("node")): str(entry.get("status") or "unknown") for entry in answer}


class NodeSsh:
    """Commands and files on another node: the connected node's ssh logs in there.

    `ssh` is the connection to the connected node. Network connections (`open_channel`) start at that node.
    """

    def __init__(self, ssh: Any, member: Member) -> None:
        if member.ip is None:
            raise NodeUnreachable(f"expected an address of node {member.name} in /cluster/status, found none")
        self._ssh = ssh
        self._member = member
        self._login = [
            "ssh", "-e", "none", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10",
            "-o", "StrictHostKeyChecking=yes", "-o", f"HostKeyAlias={member.name}",
            "-o", f"UserKnownHostsFile=/etc/pve/nodes/{member.name}/ssh_known_hosts /root/.ssh/known_hosts",
            f"root@{member.ip}",
        ]  # fmt: skip

    @property
    def target(self) -> Any:
        return self._ssh.target

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | BinaryIO | None = None,
        timeout: float = 60.0,
        secret: bool = False,
        logged: bool = True,
    ) -> CommandResult:
        """Like `SshConnection.run`. Raises NodeUnreachable when the login from node to node fails."""
        words = command if isinstance(command, str) else shlex.join(command)
        result: CommandResult = self._ssh.run(
            [*self._login, words], stdin=stdin, timeout=timeout, secret=secret, logged=logged
        )
        if result.rc == 255 and _SSH_FAILED.search(result.stderr):
            message = " / ".join(result.stderr.strip().splitlines()[-2:])[:300]
            raise NodeUnreachable(
                f"no login from node to node, as PVE itself makes them, at {self._member.name} "
                f"({self._member.ip}): {message}; `pvecm updatecerts` on both nodes repairs their keys for "
                "each other"
            )
        return replace(result, command=words)

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        """Write a file on the node, whole or not at all: see `remote_file.write`."""
        remote_file.write(self.run, data, remote, mode)

    def get(self, remote: str, limit: int = remote_file.READ_LIMIT) -> bytes:
        """The content of a file on the node; SshError when it has more than `limit` bytes."""
        return remote_file.read(self.run, remote, limit, self._member.name)

    def pipe(
        self,
        command: str | Sequence[str],
        other: Any,
        other_command: str | Sequence[str],
        timeout: float = 600.0,
    ) -> None:
        """Run `command` on the node and `other_command` at `other`, with the output of the first as input."""
        words = command if isinstance(command, str) else shlex.join(command)
        self._ssh.pipe([*self._login, words], other, other_command, timeout)

    def open_channel(self, host: str, port: int) -> Any:
        return self._ssh.open_channel(host, port)

    def close(self) -> None:
        """Does nothing: the connection belongs to the connected node."""
