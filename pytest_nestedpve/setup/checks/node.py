"""Choice of the cluster node for the nested VM: the suitable one with the most free memory.

A node is suitable if the checks that the selected node must pass find nothing missing on it. Among equals the
node of the login comes first, then the order of names: the same answers give the same choice.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import entries, whole
from pytest_nestedpve.pve.errors import ApiError, PveError, SshError
from pytest_nestedpve.setup.checks import capacity, host, images, storage
from pytest_nestedpve.setup.checks import network as network_checks
from pytest_nestedpve.setup.checks.finding import MISSING, WARNING, Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context

GIB = 1024**3
# Checks that a suitable node passes; cheap ones first. `host.virtualisation` logs in to the node.
_REQUIRED = (
    capacity.cores, storage.storage, network_checks.bridge, host.virtualisation, storage.snippets,
    images.template, images.image, storage.space,
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """The selected node with the reason; `rejected`: the others with theirs, in the order of the checks."""

    node: str
    reason: str
    rejected: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.reason, *(f"{node}: {why}" for node, why in self.rejected)])


@dataclass(frozen=True)
class _Node:
    name: str
    online: bool
    free: int | None  # bytes

    @property
    def memory(self) -> str:
        return "free memory unknown" if self.free is None else f"{self.free / GIB:.1f} GiB of memory free"


def node(context: Context) -> Iterator[Finding]:
    """Choose the node for the VM; later checks are about that node."""
    entry = context.host
    if not entry.cluster.several:
        context.choose(f"the node of {context.settings.host or entry.name}", node=entry.node)
        yield fine("node", entry.node)
        return
    placement = choose_node(context)
    if placement.node != entry.node:
        context.go_to(placement.node)
    context.choose(str(placement), node=placement.node)
    if not placement.reason:
        yield Finding(
            "node", f"a node of the cluster {entry.cluster.name} that is suitable for the nested PVE",
            "; ".join(f"{name}: {why}" for name, why in placement.rejected),
            f"The findings for {entry.node} follow.",
        )  # fmt: skip
        return
    yield fine("node", f"{placement.node} of the cluster {entry.cluster.name}: {placement}")
    if placement.node != entry.node and not _same_network(context):
        yield Finding(
            "way to the nested PVE",
            f"{entry.node}, through whose SSH server every login goes, to reach the network of "
            f"{context.settings.bridge or 'the bridge'} on {placement.node}",
            f"no address of {entry.node} in a network of {placement.node}'s bridges",
            f"This works with a route between them; else log in at {placement.node} (--pve-host), or add an "
            f"address in that network to {entry.node}.", level=WARNING,
        )  # fmt: skip


def choose_node(context: Context) -> Placement:
    """Check the nodes in order until one is suitable; `reason` is empty if none is. Raises PveError."""
    entry = context.host.node
    nodes = _nodes(context, entry)
    rejected: list[tuple[str, str]] = []
    for number, node in enumerate(nodes):
        if not node.online:
            rejected.append((node.name, "it is offline"))
            continue
        missing = _first_missing(context, node.name)
        if missing:
            rejected.append((node.name, missing))
            continue
        rejected += [
            (other.name, f"less, {other.memory}" if other.online else "it is offline")
            for other in nodes[number + 1 :]
        ]
        return Placement(
            node.name, f"most free memory of the suitable nodes ({node.memory})", tuple(rejected)
        )
    return Placement(entry, "", tuple(rejected))


def _nodes(context: Context, login: str) -> list[_Node]:
    nodes = []
    for entry in entries(context.host.api.get("/nodes"), call="get /nodes"):
        name = str(entry.get("node"))
        if context.host.cluster.member(name) is None:
            continue
        total, used = whole(entry.get("maxmem")), whole(entry.get("mem"))
        free = None if total is None or used is None else max(0, total - used)
        nodes.append(_Node(name, entry.get("status") == "online", free))
    return sorted(nodes, key=lambda node: (not node.online, -(node.free or 0), node.name != login, node.name))


def _first_missing(context: Context, name: str) -> str:
    """The first finding that makes a node unsuitable; empty if there is none."""
    try:
        trial = context.elsewhere(name)
        trial.host.run(["true"], timeout=30)
        for check in _REQUIRED:
            for finding in check(trial):
                if finding.level == MISSING:
                    return f"{finding.what}: {finding.actual}"
    except SshError:
        raise
    except PveError as e:
        return (e.text if isinstance(e, ApiError) else str(e)).split("\n")[0][:300]
    return ""


def _same_network(context: Context) -> bool:
    """Whether the node of the login has an address in a network of the selected node's bridges."""
    host = context.host
    networks = [network for _, network in _addresses(host.api, host.node)]
    return any(
        address in network for address, _ in _addresses(host.api, host.entry.node) for network in networks
    )


def _addresses(api: Any, name: str) -> list[tuple[Any, Any]]:
    addresses = []
    for entry in entries(api.get(f"/nodes/{name}/network"), call=f"get /nodes/{name}/network"):
        try:
            interface = ipaddress.ip_interface(str(entry.get("cidr")))
        except ValueError:
            continue
        addresses.append((interface.ip, interface.network))
    return addresses
