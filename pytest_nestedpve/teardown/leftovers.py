"""Leftovers of a run beside its VMs: snippet files, tokens, rights, its pool; and their deletion."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ownership.pool import pool_name, read_pool, remove_pool
from pytest_nestedpve.pve.answers import entries, flag
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.cluster import nodes_now
from pytest_nestedpve.pve.errors import NodeUnreachable, PveError

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost


def delete_leftovers(host: PveHost, settings: Settings, run_id: str) -> list[str]:
    """Delete snippet files, tokens, their rights, and the pool if it is empty; lines about leftovers."""
    from pytest_nestedpve.pve import tokens

    names: list[str] = []

    def grants() -> list[str]:
        names.extend(tokens.run_tokens(host.api, run_id))
        tokens.remove_grants(host.api, names)
        return []

    def remove() -> list[str]:
        tokens.remove_tokens(host.api, names)
        return [f"token {name}" for name in tokens.run_tokens(host.api, run_id)]

    # Access control before the pool, the tokens last: else lines of user.cfg remain (facts of PVE 9.2, 61).
    steps: tuple[tuple[str, Callable[[], list[str]]], ...] = (
        ("the snippet files", lambda: _snippets(host, run_id)),
        ("the rights of the run's tokens", grants),
        (f"the pool {pool_name(settings, run_id)}", lambda: _pool(host, settings, run_id)),
        ("the run's tokens", remove),
    )
    lines: list[str] = []
    for what, delete in steps:
        try:
            lines += patiently(delete)
        except PveError as e:
            lines.append(f"{what}: {e}")
    return lines


def _snippets(host: PveHost, run_id: str) -> list[str]:
    """Delete the run's snippet files in the directory of every storage; lines about those that remain.

    By their names in the file system: a storage without the content type `snippets` may still hold some, and
    a file that was not written completely has a name that PVE does not list.
    """
    storages = entries(host.api.get("/storage"), call="get /storage")
    left = _snippets_on(host, storages, run_id)
    if host.cluster.several:
        for node, state in nodes_now(host.api).items():
            # Files of a node that is off cannot be listed; a run with a VM on it is not over anyway.
            if node != host.node and state == "online":
                left += _snippets_elsewhere(host, node, storages, run_id)
    return left


def _snippets_elsewhere(host: PveHost, node: str, storages: list[dict[str, Any]], run_id: str) -> list[str]:
    """The same on another node; where commands cannot be run, the API at least lists the files."""
    local = [storage for storage in storages if not flag(storage.get("shared", 0))]
    try:
        return [f"{line} on {node}" for line in _snippets_on(host.at(node), local, run_id)]
    except NodeUnreachable as e:
        path = f"/nodes/{node}/storage"
        volids: list[str] = []
        for storage in entries(host.api.get(path, content="snippets", enabled=True), call=f"get {path}"):
            listed = host.api.get(f"{path}/{storage.get('storage')}/content", content="snippets")
            volids += [str(file.get("volid")) for file in entries(listed, call=f"get {path}")]
        return [f"snippet {volid} on {node}: {e}" for volid in volids if f"/npve-{run_id}-" in volid]


def _snippets_on(host: PveHost, storages: list[dict[str, Any]], run_id: str) -> list[str]:
    left = []
    names = ["-name", f"npve-{run_id}-*", "-o", "-name", f".npve-{run_id}-*.part"]
    for storage in storages:
        path = storage.get("path")
        if not isinstance(path, str) or not path.startswith("/"):
            continue
        find = ["find", f"{path.rstrip('/')}/snippets", "-maxdepth", "1", "-type", "f", "(", *names, ")"]
        removed = host.run([*find, "-print", "-delete"], timeout=60)
        if not removed.ok and "No such file or directory" in removed.stderr:
            continue  # no snippet was ever stored there
        remaining = host.run([*find, "-print"], timeout=60)
        if not remaining.ok:
            left.append(f"snippet files on {storage.get('storage')}: {remaining.stderr.strip()[:200]}")
        left += [f"snippet {line}" for line in remaining.stdout.splitlines() if line.strip()]
    return left


def _pool(host: PveHost, settings: Settings, run_id: str) -> list[str]:
    """Delete the run's pool, if it is empty; a line if it remains."""
    name = pool_name(settings, run_id)
    pool = read_pool(host.api, name)
    if pool is None:
        return []
    if pool.members:
        members = ", ".join(str(vmid) for vmid in sorted(pool.vmids))
        return [f"pool {name}: it still contains {members}"]
    try:
        remove_pool(host.api, name)
    except PveError as e:
        return [f"pool {name}: {e}"]
    return []
