"""The cluster that a host is a member of, if it is: its nodes, where a guest is, commands on another node.

Sources: recordings of PVE 9.2, groups cluster and nodedown. Root of each node may log in at every other one;
PVE itself hands calls on that way. The keys by which the nodes know each other are the cluster's own.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pytest_nestedpve.pve.answers import entries, flag, shown, text, whole
from pytest_nestedpve.pve.errors import NodeUnreachable, UnreadableAnswer

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.ssh.connection import CommandResult

NODE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\Z")
# What ssh itself says when it, and not the command, ends with 255.
_SSH_FAILED = re.compile(
    r"(?m)^(?:ssh: |Host key verification failed|kex_exchange_identification|No \S+ host key is known|"
    r"Connection (?:closed|reset|timed)|.*Permission denied \()"
)


@dataclass(frozen=True)
class Member:
    """A node of the cluster; `local`: the one that was asked; `ip`: its address among the nodes."""

    name: str
    online: bool
    local: bool
    ip: str | None


@dataclass(frozen=True)
class Cluster:
    """The nodes; `name` is None for a host that stands alone, which has only itself."""

    name: str | None
    members: tuple[Member, ...]

    @property
    def several(self) -> bool:
        """Whether a guest may be on another node than the one that was asked."""
        return len(self.members) > 1

    @property
    def local(self) -> Member:
        return next(each for each in self.members if each.local)

    def member(self, node: str) -> Member | None:
        return next((each for each in self.members if each.name == node), None)


def read_cluster(answer: Any) -> Cluster:
    """The cluster from /cluster/status. Raises UnreadableAnswer when it names no local node."""
    name, members = None, []
    # A stand-alone host has exactly one entry, type node, local 1 (facts 36).
    for entry in answer if isinstance(answer, list) else ():
        if not isinstance(entry, dict):
            continue
        called = entry.get("name")
        if entry.get("type") == "cluster":
            name = text(called)
        elif entry.get("type") == "node" and isinstance(called, str) and NODE_NAME.match(called):
            online, local = flag(entry.get("online", 1)), flag(entry.get("local", 0))
            members.append(Member(called, online, local, _address(entry.get("ip"))))
    if not any(each.local for each in members):
        raise UnreadableAnswer(
            f"expected one entry of type node with local=1 and a valid name, found {str(answer)[:300]!r}",
            call="get /cluster/status",
        )
    return Cluster(name, tuple(members))


def _address(value: Any) -> str | None:
    try:
        return str(ipaddress.ip_address(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def node_of(api: Api, vmid: int) -> str | None:
    """The node that a VM is on now, None if there is no such VM. Raises PveError.

    The place is live in /cluster/resources, whatever the age of the rest of an entry (recorded).
    """
    for entry in entries(api.get("/cluster/resources", type="vm"), call="get /cluster/resources"):
        if entry.get("type") == "qemu" and whole(entry.get("vmid")) == vmid:
            node = entry.get("node")
            if not isinstance(node, str) or not NODE_NAME.match(node):
                raise UnreadableAnswer(f"expected the node of VM {vmid}, found {shown(node)}")
            return node
    return None


def nodes_now(api: Api) -> dict[str, str]:
    """The nodes and what the cluster says of each: "online", "offline", "unknown". Raises PveError."""
    found = entries(api.get("/nodes"), call="get /nodes")
    return {str(each.get("node")): str(each.get("status") or "unknown") for each in found}


class NodeSsh:
    """Commands and files on another node, through the connection at the first one and that one's own ssh.

    A network connection still begins at the first node: `open_channel` is that one's.
    """

    def __init__(self, ssh: Any, member: Member) -> None:
        if member.ip is None:
            raise NodeUnreachable(f"the cluster says no address of its node {member.name}")
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
        stdin: bytes | None = None,
        timeout: float = 60.0,
        secret: bool = False,
    ) -> CommandResult:
        """As of any connection; raises NodeUnreachable when the nodes' own ssh fails."""
        words = command if isinstance(command, str) else shlex.join(command)
        result: CommandResult = self._ssh.run(
            [*self._login, words], stdin=stdin, timeout=timeout, secret=secret
        )
        self._reached(result)
        return replace(result, command=words)

    def _reached(self, result: CommandResult) -> None:
        if result.rc == 255 and _SSH_FAILED.search(result.stderr):
            said = " / ".join(result.stderr.strip().splitlines()[-2:])[:300]
            raise NodeUnreachable(
                f"no login from node to node, as PVE itself makes them, at {self._member.name} "
                f"({self._member.ip}): {said}; `pvecm updatecerts` on both mends what they know of each other"
            )

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        """Write a file there: whole or not at all."""
        folder, slash, name = remote.rpartition("/")
        partial = shlex.quote(f"{folder}{slash}.{name[:120]}.{secrets.token_hex(6)}.part")
        script = (
            f"umask 077; trap {shlex.quote('rm -f -- ' + partial)} EXIT; cat >{partial} && "
            f"chmod {mode:o} -- {partial} && mv -fT -- {partial} {shlex.quote(remote)}"
        )
        command = shlex.join(["sh", "-c", script])
        if isinstance(data, bytes):
            self.run(command, stdin=data).check()
            return
        # Too large for memory: by way of the first node's disk.
        halfway = f"/var/tmp/.nestedpve-{secrets.token_hex(8)}"
        self._ssh.put(data, halfway)
        way = f"{shlex.join([*self._login, command])} <{halfway}; rc=$?; rm -f -- {halfway}; exit $rc"
        result: CommandResult = self._ssh.run(["sh", "-c", way], timeout=3600)
        self._reached(result)
        result.check()

    def get(self, remote: str, limit: int = 1 << 20) -> bytes:
        """The first `limit` bytes of a file there."""
        return self.run(["head", "-c", str(limit), "--", remote]).check().stdout_bytes

    def pipe(
        self,
        command: str | Sequence[str],
        other: Any,
        other_command: str | Sequence[str],
        timeout: float = 600.0,
    ) -> None:
        """Run `command` there and `other_command` at `other`, the output of the one into the other."""
        words = command if isinstance(command, str) else shlex.join(command)
        self._ssh.pipe([*self._login, words], other, other_command, timeout)

    def open_channel(self, host: str, port: int) -> Any:
        return self._ssh.open_channel(host, port)

    def close(self) -> None:
        """The connection belongs to the first node."""
