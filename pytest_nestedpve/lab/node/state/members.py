"""The nodes of the cluster, by corosync.conf; a node without that file stands alone.

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
    """A node of the cluster. `address` is its own among the nodes; a node that stands alone has number 0."""

    name: str
    number: int
    address: str

    @property
    def local(self) -> bool:
        return self.name == paths.node()

    @property
    def online(self) -> bool:
        if paths.in_process():  # no process is such a node: the file alone decides
            return self.local or lock_file(self.name).exists()
        return self.local or held(lock_file(self.name))


def _text() -> str:
    try:
        return (paths.cluster_dir() / "fs/corosync.conf").read_text()
    except OSError:
        return ""


def cluster() -> str | None:
    """The cluster's name, None for a node that stands alone."""
    found = re.search(r"cluster_name: (\S+)", _text())
    return found[1] if found else None


def every() -> list[Member]:
    """All nodes, this one first."""
    found = [Member(name, int(number), address) for name, number, address in _NODE.findall(_text())]
    return sorted(found, key=lambda each: not each.local) or [Member(paths.node(), 0, "")]


def several() -> bool:
    return len(every()) > 1


def find(name: str) -> Member | None:
    return next((each for each in every() if each.name == name), None)


def lock_file(name: str) -> Path:
    """Held by the node's cluster file system."""
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
