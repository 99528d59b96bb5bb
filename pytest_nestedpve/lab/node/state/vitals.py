"""How this node is: its memory, its load, its uptime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import guests, members, reported, tasks


def memory() -> dict[str, int]:
    """/proc/meminfo in bytes.

    The nodes of a cluster are one machine: what tells them apart is the memory that their running guests may
    take, which is not free there.
    """
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        found[key] = int(rest.split()[0]) * 1024
    if members.several():
        taken = sum(guests.memory(guest.conf) for guest in guests.every() if guests.running(guest.vmid)) << 20
        for key in ("MemAvailable", "MemFree"):
            found[key] = max(0, found[key] - taken)
    return found


def uptime() -> int:
    """Seconds since the node's own init started."""
    try:
        ticks = tasks.process_start(1) or 0
        machine = float(Path("/proc/uptime").read_text().split()[0])
        return max(0, int(machine - ticks / os.sysconf("SC_CLK_TCK")))
    except (OSError, ValueError):
        return 0


def row() -> dict[str, Any]:
    """What stands of the node in the lists of nodes."""
    known, disk = memory(), os.statvfs("/")
    return {
        "cpu": round(os.getloadavg()[0] / (os.cpu_count() or 1), 4),
        "maxcpu": os.cpu_count() or 1,
        "maxmem": known["MemTotal"],
        "mem": known["MemTotal"] - known["MemAvailable"],
        "maxdisk": disk.f_blocks * disk.f_frsize,
        "disk": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        "uptime": uptime(),
    } | reported.of("node")
