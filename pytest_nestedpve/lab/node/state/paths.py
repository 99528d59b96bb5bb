"""Where a node keeps things, and what it is called. NESTEDPVE_NODE_ROOT moves everything (for tests), and so
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
    """A node in this process: its directory and its name. A task runs inside of the call that starts it."""

    root: Path
    node: str


_place: ContextVar[Place | None] = ContextVar("nestedpve_place", default=None)


@contextlib.contextmanager
def placed(place: Place) -> Iterator[None]:
    """Calls of this thread are calls of the node at `place`."""
    token = _place.set(place)
    try:
        yield
    finally:
        _place.reset(token)


def in_process() -> bool:
    """Whether this call is one of a node that is no machine of its own."""
    return _place.get() is not None


def root() -> Path:
    place = _place.get()
    return place.root if place is not None else Path(os.environ.get("NESTEDPVE_NODE_ROOT", "/"))


def at(path: str) -> Path:
    """The place of an absolute path of the node on this machine."""
    return root() / path.lstrip("/")


def shown(path: Path | str) -> str:
    """The path as the node's user sees it."""
    base = str(root())
    text = str(path)
    return text if base == "/" else "/" + text.removeprefix(base).lstrip("/")


def node() -> str:
    """The node's name: the first label of the host name."""
    if (place := _place.get()) is not None:
        return place.node
    return os.environ.get("NESTEDPVE_NODE_NAME") or socket.gethostname().split(".")[0]


def cluster_dir() -> Path:
    """What is the cluster's: nodes of one cluster have the very same directory."""
    return at("/var/lib/pve-cluster")


def database() -> Path:
    return cluster_dir() / "config.db"


def pace_file() -> Path:
    """How slow the node shall be (`nestedpve-lab set`); the guests that boot on it see the same file."""
    return at("/etc/nestedpve-lab.json")


def command_log() -> Path:
    """A line for each start of one of PVE's commands."""
    return at("/var/log/nestedpve-lab-commands.log")


def delays() -> dict[str, float]:
    """How slow the node shall be: seconds by `cli_delay_s`, `start_s`, `stop_s`, `destroy_s`."""
    try:
        loaded = json.loads(pace_file().read_text())
    except (OSError, ValueError):
        return {}
    return {key: float(value) for key, value in loaded.items() if isinstance(value, (int, float))}


def pause(name: str, share: float = 1.0) -> None:
    """Be as slow as `nestedpve-lab set` wants; a wait that nothing wakes, for slowness is its purpose."""
    import threading

    seconds = delays().get(name, 0.0) * share
    if seconds > 0:
        threading.Event().wait(seconds)
