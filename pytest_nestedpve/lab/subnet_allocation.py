"""Allocation of a free number to a lab; its networks, link and cgroup are derived from the number.

The kernel's state decides, not a file, so that labs of other cache directories (another user's, a chroot's)
count too.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import json
import os
from collections.abc import Iterator
from pathlib import Path

from . import programs
from .names import MAX_LABS, LabError, Subnets
from .node.machine import cgroups


@contextlib.contextmanager
def _allocation_lock() -> Iterator[None]:
    """Lock allocation on this machine, for all mount namespaces: the lock is on the cgroup root."""
    descriptor = os.open(cgroups.root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def allocate() -> Subnets:
    """Allocate a free number and move this process into its cgroup, which reserves the number. LabError if
    none is free."""
    with _allocation_lock():
        used = routed_networks()
        for number in range(MAX_LABS):
            subnets = Subnets(number)
            group = cgroups.root() / subnets.cgroup
            if group.exists():
                if cgroups.event(group, "populated"):
                    continue
                cgroups.remove(group)
            if is_free(subnets, used):
                cgroups.enter(group / "supervisor")
                return subnets
    raise LabError(
        f"none of the lab's {MAX_LABS} address ranges (10.210.N.0/30 with 10.211.N.0/24) is free; "
        "`nestedpve-lab list` lists running labs, `ip route show table all` other uses"
    )


def is_free(subnets: Subnets, used: list[ipaddress.IPv4Network]) -> bool:
    """Whether none of the lab's networks overlaps one in use."""
    networks = [ipaddress.IPv4Network(subnets.uplink), ipaddress.IPv4Network(subnets.bridge)]
    return not any(network.overlaps(other) for network in networks for other in used)


def routed_networks() -> list[ipaddress.IPv4Network]:
    """Networks that this machine has routes to, except networks of /16 and larger (the default route, a VPN's
    10.0.0.0/8): such routes are less specific than a lab's own."""
    routes = programs.run(["ip", "-json", "-4", "route", "show", "table", "all"], what="reading the routes")
    networks = []
    for route in json.loads(routes or b"[]"):
        with contextlib.suppress(ValueError, KeyError):
            network = ipaddress.IPv4Network(route["dst"])
            if network.prefixlen > 16:
                networks.append(network)
    return networks


def process_cgroup() -> Path:
    """The v2 cgroup of this process."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = cgroups.root() / line[3:].lstrip("/")
            if path.is_dir():
                return path
    return cgroups.root()
