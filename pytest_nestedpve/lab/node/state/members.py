"""The nodes of the cluster, by corosync.conf; a node without that file is not in a cluster.

A node is online while its cluster file system runs: it holds a lock in the directory that all nodes share.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..machine.alive import held
from . import paths

_NODE = re.compile(r"node \{\s*name: (\S+)\s*nodeid: (\d+)\s*quorum_votes: 1\s*ring0_addr: (\S+)\s*\}")


@dataclass(frozen=True)
class Member:
    """A node of the cluster, its `address` there; a node without a cluster has number 0 and no address."""

    name: str
    number: int
    address: str

    @property
    def local(self) -> bool:
        return self.name == paths.node()

    @property
    def online(self) -> bool:
        if paths.in_process():  # such a node has no process: the file alone decides
            return self.local or lock_file(self.name).exists()
        return self.local or held(lock_file(self.name))


def _text() -> str:
    try:
        return (paths.cluster_dir() / "fs/corosync.conf").read_text()
    except OSError:
        return ""


def cluster() -> str | None:
    """The cluster's name, None without a cluster."""
    match = re.search(r"cluster_name: (\S+)", _text())
    return match[1] if match else None


def every() -> list[Member]:
    """All nodes, this node first."""
    members = [Member(name, int(number), address) for name, number, address in _NODE.findall(_text())]
    return sorted(members, key=lambda member: not member.local) or [Member(paths.node(), 0, "")]


def several() -> bool:
    return len(every()) > 1


def find(name: str) -> Member | None:
    return next((member for member in every() if member.name == name), None)


def lock_file(name: str) -> Path:
    """The lock file that the node's cluster file system holds."""
    return paths.cluster_dir() / "online" / name


def config(name: str, nodes: dict[str, str]) -> str:
    """corosync.conf of a cluster of nodes with these addresses [cluster-007]."""
    listed = "".join(
        f"  node {{\n    name: {node}\n    nodeid: {number}\n    quorum_votes: 1\n    ring0_addr: {address}\n"
        "  }\n\n"
        for number, (node, address) in enumerate(nodes.items(), start=1)
    )
    return (
        "logging {\n  debug: off\n  to_syslog: yes\n}\n\n"
        f"nodelist {{\n{listed.rstrip()}\n}}\n\n"
        "quorum {\n  provider: corosync_votequorum\n}\n\n"
        f"totem {{\n  cluster_name: {name}\n  config_version: {len(nodes)}\n"
        "  interface {\n    linknumber: 0\n  }\n  ip_version: ipv4-6\n  link_mode: passive\n"
        "  secauth: on\n  token_coefficient: 125\n  version: 2\n}\n\n"
    )
