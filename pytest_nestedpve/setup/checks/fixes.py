"""Commands that fix findings of several checks."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import flag

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context

# Snippets and images to import are files.
_FILE_TYPES = frozenset({"dir", "nfs", "cifs", "cephfs", "btrfs"})
_AT_MOST = 3


def content(context: Context, kind: str, name: str | None = None) -> str:
    """The command that adds the content type `kind` to a storage (`name`, or the one for files).

    The command sets the whole list, so for a file storage it adds all missing types: the commands of several
    findings do not undo each other.
    """
    storages, target = context.storages, name or file_storage(context)
    usable = _usable(storages)
    storage = next((entry for entry in storages if entry.get("storage") == target), None)
    if storage is None:
        types = ",".join(sorted({kind, *_missing(context, usable)}))
        return shlex.join(["pvesm", "add", "dir", target, "--path", "/var/lib/vz", "--content", types])
    kinds = set(str(storage.get("content") or "").split(",")) - {"", "none"} | {kind}
    if storage.get("type") in _FILE_TYPES:
        kinds |= _missing(context, usable)
    return shlex.join(["pvesm", "set", target, "--content", ",".join(sorted(kinds))])


def file_storage(context: Context) -> str:
    """The storage for snippets and images: `local`, or the first file storage."""
    names = [
        str(entry.get("storage")) for entry in _usable(context.storages) if entry.get("type") in _FILE_TYPES
    ]
    return "local" if "local" in names or not names else names[0]


def _usable(storages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [entry for entry in storages if flag(entry.get("active", 1)) and flag(entry.get("enabled", 1))]


def _missing(context: Context, usable: Iterable[dict[str, Any]]) -> set[str]:
    """The content types that a run needs and no storage has."""
    offered = {kind for storage in usable for kind in str(storage.get("content") or "").split(",")}
    needed = {"images"}
    if context.boots and not context.settings.template:
        needed |= {"snippets", "import"}
    return needed - offered


def alternatives(context: Context, key: str, values: Iterable[object]) -> tuple[str, ...]:
    """Command lines of pytest that set the option `key` to the first few of `values`."""
    first = [str(value) for value in values][:_AT_MOST]
    return tuple(context.pytest("-o", f"nested_pve_{key}={value}") for value in first)
