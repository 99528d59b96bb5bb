"""Commands that mend what several checks find lacking: one command for one thing."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import flag

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

# Snippets and images to import are files.
_OF_FILES = frozenset({"dir", "nfs", "cifs", "cephfs", "btrfs"})
_SHOWN = 3


def content(seen: Seen, kind: str, name: str | None = None) -> str:
    """The command that gives a storage one more content type.

    It sets the whole list, so all that is lacking anywhere goes into each such command for a storage of
    files: run one after the other, none takes back what the one before gave.
    """
    storages, target = seen.storages, name or home(seen)
    usable = _usable(storages)
    there = next((each for each in storages if each.get("storage") == target), None)
    if there is None:
        made = ",".join(sorted({kind, *_lacking(seen, usable)}))
        return shlex.join(["pvesm", "add", "dir", target, "--path", "/var/lib/vz", "--content", made])
    wanted = set(str(there.get("content") or "").split(",")) - {"", "none"} | {kind}
    if there.get("type") in _OF_FILES:
        wanted |= _lacking(seen, usable)
    return shlex.join(["pvesm", "set", str(there["storage"]), "--content", ",".join(sorted(wanted))])


def home(seen: Seen) -> str:
    """The storage where what a run needs as files is best kept: `local`, or the first of files."""
    names = [str(each.get("storage")) for each in _usable(seen.storages) if each.get("type") in _OF_FILES]
    return "local" if "local" in names or not names else names[0]


def _usable(storages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [each for each in storages if flag(each.get("active", 1)) and flag(each.get("enabled", 1))]


def _lacking(seen: Seen, usable: Iterable[dict[str, Any]]) -> set[str]:
    """What no storage offers, of what a run needs."""
    offered = {kind for each in usable for kind in str(each.get("content") or "").split(",")}
    wanted = {"images"}
    if seen.boots and not seen.settings.template:
        wanted |= {"snippets", "import"}
    return wanted - offered


def instead(seen: Seen, key: str, values: Iterable[object]) -> tuple[str, ...]:
    """Command lines of pytest that name something else, one for each of the first few that there are."""
    shown = [str(value) for value in values][:_SHOWN]
    return tuple(seen.pytest("-o", f"nested_pve_{key}={value}") for value in shown)
