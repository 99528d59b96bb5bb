"""This node's memory, load and uptime."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from . import guests, members, reported, tasks


def memory() -> dict[str, int]:
    """/proc/meminfo in bytes.

    The nodes of a cluster share one machine: the configured memory of a node's running guests counts as used
    there.
    """
    amounts = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        amounts[key] = int(rest.split()[0]) * 1024
    if members.several():
        used = sum(guests.memory(guest.conf) for guest in guests.every() if guests.running(guest.vmid)) << 20
        for key in ("MemAvailable", "MemFree"):
            amounts[key] = max(0, amounts[key] - used)
    return amounts


def uptime() -> int:
    """Seconds since the node's own init started."""
    try:
        ticks = tasks.process_start(1) or 0
        machine = float(Path("/proc/uptime").read_text().split()[0])
        return max(0, int(machine - ticks / os.sysconf("SC_CLK_TCK")))
    except (OSError, ValueError):
        return 0


def row() -> dict[str, Any]:
    """The node's measured values in the lists of nodes."""
    amounts, disk = memory(), os.statvfs("/")
    return {
        "cpu": round(os.getloadavg()[0] / (os.cpu_count() or 1), 4),
        "maxcpu": os.cpu_count() or 1,
        "maxmem": amounts["MemTotal"],
        "mem": amounts["MemTotal"] - amounts["MemAvailable"],
        "maxdisk": disk.f_blocks * disk.f_frsize,
        "disk": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        "uptime": uptime(),
    } | reported.of("node")
