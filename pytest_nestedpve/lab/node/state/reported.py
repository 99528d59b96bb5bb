"""What a node reports instead of what it measures: for tests of what depends on it.

/etc/nestedpve-node.json, an object; without that file everything is measured.

    clock_offset_s   seconds that its clock is ahead
    address          the address that its name leads to
    version, memory, cpuinfo, node, cluster
                     objects whose members replace those of an answer: /version, the parts of
                     /nodes/N/status, the node's row in lists of nodes, the cluster's in /cluster/status
    storage          by its id: `total`, `used` and `avail` in bytes
    feature          by a VM's id: the members of its answers, by feature
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from . import paths

_read: dict[Path, tuple[tuple[int, int, int], dict[str, Any]]] = {}


def file() -> Path:
    return paths.at("/etc/nestedpve-node.json")


def everything() -> dict[str, Any]:
    """The file's content, {} without one."""
    place = file()
    try:
        about = os.stat(place)
    except OSError:
        return {}
    version = (about.st_mtime_ns, about.st_size, about.st_ino)
    known = _read.get(place)
    if known is None or known[0] != version:
        known = _read[place] = version, json.loads(place.read_text())
    return known[1]


def of(name: str, key: str | None = None) -> dict[str, Any]:
    """What replaces members of an answer."""
    found: dict[str, Any] = everything().get(name, {})
    return found if key is None else found.get(key, {})


def clock_offset() -> float:
    """Seconds."""
    return float(everything().get("clock_offset_s", 0.0))
