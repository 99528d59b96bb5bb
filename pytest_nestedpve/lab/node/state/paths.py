"""Paths, name and versions of a node. NESTEDPVE_NODE_ROOT replaces the root directory (for tests), and so
does a `Place`, for the calls of one thread."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

VERSION = "9.2.11"
RELEASE = "9.2"
REPOID = "14a22df35955d97d"
KERNEL = "6.17.2-1-pve"
QEMU = "10.0.13"


@dataclass(frozen=True)
class Place:
    """A node in this process: directory and name. A task runs inside the call that starts it."""

    root: Path
    node: str


_place: ContextVar[Place | None] = ContextVar("nestedpve_place", default=None)


@contextlib.contextmanager
def placed(place: Place) -> Iterator[None]:
    """Run this thread's calls on the node at `place`."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def in_process() -> bool:
    """Whether the call runs on a node in this process, set by `placed`."""
    return _place.get() is not None


def root() -> Path:
    place = _place.get()
    return place.root if place is not None else Path(os.environ.get("NESTEDPVE_NODE_ROOT", "/"))


def at(path: str) -> Path:
    """The path on this machine of an absolute path of the node."""
    return root() / path.lstrip("/")


def shown(path: Path | str) -> str:
    """The path on the node of a path on this machine: the reverse of `at`."""
    base = str(root())
    text = str(path)
    return text if base == "/" else "/" + text.removeprefix(base).lstrip("/")


def node() -> str:
    """The node's name: the first label of the host name."""
    if (place := _place.get()) is not None:
        return place.node
    return os.environ.get("NESTEDPVE_NODE_NAME") or socket.gethostname().split(".")[0]


def cluster_dir() -> Path:
    """The directory that the nodes of one cluster share."""
    return at("/var/lib/pve-cluster")


def database() -> Path:
    return cluster_dir() / "config.db"


def pace_file() -> Path:
    """The delays set by `nestedpve-lab set`; shared with the guests that boot on the node."""
    return at("/etc/nestedpve-lab.json")


def command_log() -> Path:
    """The log with a line for each start of one of PVE's commands."""
    return at("/var/log/nestedpve-lab-commands.log")


def delays() -> dict[str, float]:
    """The configured delays in seconds: `cli_delay_s`, `start_s`, `stop_s`, `destroy_s`."""
    try:
        loaded = json.loads(pace_file().read_text())
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in loaded.items() if isinstance(value, (int, float))}


def pause(name: str, share: float = 1.0) -> None:
    """Wait for the `share` of the configured delay `name`."""
    import threading

    seconds = delays().get(name, 0.0) * share
    if seconds > 0:
        threading.Event().wait(seconds)
