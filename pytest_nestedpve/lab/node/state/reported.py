"""Configured answers of a node in place of measured values, for tests.

/etc/nestedpve-node.json, an object; without that file everything is measured.

    clock_offset_s   seconds that the node's clock is ahead
    address          the address that the node's name resolves to
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
    path = file()
    try:
        about = os.stat(path)
    except OSError:
        return {}
    version = (about.st_mtime_ns, about.st_size, about.st_ino)
    cached = _read.get(path)
    if cached is None or cached[0] != version:
        cached = _read[path] = version, json.loads(path.read_text())
    return cached[1]


def of(name: str, key: str | None = None) -> dict[str, Any]:
    """The configured members of an answer, {} without any."""
    members: dict[str, Any] = everything().get(name, {})
    return members if key is None else members.get(key, {})


def clock_offset() -> float:
    """Seconds that the node's clock is ahead."""
    return float(everything().get("clock_offset_s", 0.0))
