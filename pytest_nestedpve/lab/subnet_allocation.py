"""A number for each lab, from which follow its networks, link and cgroup: one that nothing here uses yet.

What counts is the kernel's state, not a file: labs of other cache directories (another user's, a chroot's)
are seen too.
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
def _machine_wide() -> Iterator[None]:
    """One allocation at a time on this machine, in any mount namespace: the lock is on the cgroup root."""
    descriptor = os.open(cgroups.root(), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def take() -> Subnets:
    """Take a free number: this process moves into the new lab's cgroup, which keeps the number taken.
    LabError when none of them is free."""
    with _machine_wide():
        used = used_networks()
        for number in range(MAX_LABS):
            subnets = Subnets(number)
            group = cgroups.root() / subnets.cgroup
            if group.exists():
                if cgroups.event(group, "populated"):
                    continue
                cgroups.remove(group)
            if free(subnets, used):
                cgroups.enter(group / "supervisor")
                return subnets
    raise LabError(
        f"none of the lab's {MAX_LABS} address ranges (10.210.N.0/30 with 10.211.N.0/24) is free here; "
        "`nestedpve-lab list` shows running labs, `ip route` what else uses them"
    )


def free(subnets: Subnets, used: list[ipaddress.IPv4Network]) -> bool:
    """Whether none of the lab's networks overlaps one in use."""
    wanted = [ipaddress.IPv4Network(subnets.uplink), ipaddress.IPv4Network(subnets.bridge)]
    return not any(one.overlaps(other) for one in wanted for other in used)


def used_networks() -> list[ipaddress.IPv4Network]:
    """Networks that this machine has routes to, other than the default route and other than large private
    ranges: a route to all of 10.0.0.0/8 (a VPN's) is less specific than a lab's own."""
    shown = programs.run(["ip", "-json", "-4", "route", "show", "table", "all"], what="reading the routes")
    found = []
    for route in json.loads(shown or b"[]"):
        with contextlib.suppress(ValueError, KeyError):
            network = ipaddress.IPv4Network(route["dst"])
            if network.prefixlen > 16:
                found.append(network)
    return found


def own_cgroup() -> Path:
    """The v2 cgroup this process is in."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = cgroups.root() / line[3:].lstrip("/")
            if path.is_dir():
                return path
    return cgroups.root()
