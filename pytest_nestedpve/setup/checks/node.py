"""Which node of a cluster the nested VM goes to: of those that can have it the one with most free memory.

A node can if the same checks that are made of the chosen one find nothing missing there. Of equals the one
that the connection ends on is taken, then the first by name: the same answers give the same choice.
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
    from pytest_nestedpve.setup.checks.context import Seen

GIB = 1024**3
# What decides whether a node can; cheap ones first. `basics.virtualisation` logs in to it.
_TRIALS = (
    capacity.cores, storage.storage, network_checks.bridge, host.virtualisation, storage.snippets,
    images.template, images.image, storage.space,
)  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """The node, why it was taken, and of each other one why not, in the order that they were looked at."""

    node: str
    reason: str
    passed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "; ".join([self.reason, *(f"{node}: {why}" for node, why in self.passed)])


@dataclass(frozen=True)
class _Node:
    name: str
    online: bool
    free: int | None  # bytes

    @property
    def room(self) -> str:
        return "its memory is not known" if self.free is None else f"{self.free / GIB:.1f} GiB of memory free"


def node(seen: Seen) -> Iterator[Finding]:
    """Which node the VM goes to; the checks that follow are about that one."""
    entry = seen.host
    if not entry.cluster.several:
        seen.choose(f"the node that {seen.settings.host or entry.name} ends on", node=entry.node)
        yield fine("node", entry.node)
        return
    found = place(seen)
    if found.node != entry.node:
        seen.go_to(found.node)
    seen.choose(str(found), node=found.node)
    if not found.reason:
        yield Finding(
            "node", f"a node of the cluster {entry.cluster.name} that can have the nested PVE",
            "; ".join(f"{name}: {why}" for name, why in found.passed),
            f"What is missing on {entry.node} follows.",
        )  # fmt: skip
        return
    yield fine("node", f"{found.node} of the cluster {entry.cluster.name}: {found}")
    if found.node != entry.node and not _same_network(seen):
        yield Finding(
            "way to the nested PVE",
            f"{entry.node}, through whose SSH server every login goes, to reach the network of "
            f"{seen.settings.bridge or 'the bridge'} on {found.node}",
            f"no address of {entry.node} in a network of {found.node}'s bridges",
            f"It works if there is a route; else log in at {found.node} (--pve-host), or give {entry.node} "
            "an address there.", level=WARNING,
        )  # fmt: skip


def place(seen: Seen) -> Placement:
    """Look at the nodes in their order until one can; `reason` is empty if none can. Raises PveError."""
    entry = seen.host.node
    nodes = _nodes(seen, entry)
    passed: list[tuple[str, str]] = []
    for number, each in enumerate(nodes):
        if not each.online:
            passed.append((each.name, "it is offline"))
            continue
        lacks = _lacks(seen, each.name)
        if lacks:
            passed.append((each.name, lacks))
            continue
        passed += [
            (other.name, f"less, {other.room}" if other.online else "it is offline")
            for other in nodes[number + 1 :]
        ]
        return Placement(
            each.name, f"the most free memory of those that can have it ({each.room})", tuple(passed)
        )
    return Placement(entry, "", tuple(passed))


def _nodes(seen: Seen, entry: str) -> list[_Node]:
    found = []
    for each in entries(seen.host.api.get("/nodes"), call="get /nodes"):
        name = str(each.get("node"))
        if seen.host.cluster.member(name) is None:
            continue
        total, used = whole(each.get("maxmem")), whole(each.get("mem"))
        free = None if total is None or used is None else max(0, total - used)
        found.append(_Node(name, each.get("status") == "online", free))
    return sorted(found, key=lambda each: (not each.online, -(each.free or 0), each.name != entry, each.name))


def _lacks(seen: Seen, name: str) -> str:
    """The first thing that a node lacks; empty if it has all."""
    try:
        trial = seen.elsewhere(name)
        trial.host.run(["true"], timeout=30)
        for check in _TRIALS:
            for finding in check(trial):
                if finding.level == MISSING:
                    return f"{finding.what}: {finding.found}"
    except SshError:
        raise
    except PveError as e:
        return (e.text if isinstance(e, ApiError) else str(e)).split("\n")[0][:300]
    return ""


def _same_network(seen: Seen) -> bool:
    """Whether the node that logins go through has an address in a network of the other one's bridges."""
    there = seen.host
    networks = [network for _, network in _addresses(there.api, there.node)]
    return any(
        address in network for address, _ in _addresses(there.api, there.entry.node) for network in networks
    )


def _addresses(api: Any, name: str) -> list[tuple[Any, Any]]:
    found = []
    for each in entries(api.get(f"/nodes/{name}/network"), call=f"get /nodes/{name}/network"):
        try:
            interface = ipaddress.ip_interface(str(each.get("cidr")))
        except ValueError:
            continue
        found.append((interface.ip, interface.network))
    return found
