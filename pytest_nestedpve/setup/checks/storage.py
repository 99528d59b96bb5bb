"""Storages: for the disk, for the snippet that brings the guest agent, and their room."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import mapping, whole
from pytest_nestedpve.pve.storage import contents, disk_format, has_snapshots, takes_room_at_once, usable
from pytest_nestedpve.setup.checks import fixes
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

GIB = 1024**3
# A nested PVE with a leaf uses about this much of a disk that grows with its use.
GROWN = 8 * GIB

__all__ = ["contents", "disk_format", "snippets", "space", "storage", "usable"]


def _named(storages: list[dict[str, Any]]) -> str:
    return ", ".join(sorted(str(each.get("storage")) for each in storages)) or "none"


def _others(seen: Seen, able: list[dict[str, Any]]) -> tuple[str, ...]:
    return fixes.instead(seen, "storage", sorted(str(each.get("storage")) for each in able))


def _room(storage: dict[str, Any]) -> str:
    free = whole(storage.get("avail"))
    room = f"{storage.get('type', 'storage')}" + (f", {free / GIB:.0f} GiB free" if free is not None else "")
    return room + ("; its disks have no snapshots" if has_snapshots(storage) is False else "")


def storage(seen: Seen) -> Iterator[Finding]:
    """Where the disk goes: the storage that was named, or the one with the most room."""
    settings, storages = seen.settings, seen.storages
    able = [each for each in storages if usable(each) and "images" in contents(each)]
    origin, name = settings.origin("storage"), settings.storage
    if name is None:
        if not able:
            first = next((each for each in storages if usable(each)), {"storage": "local"})
            yield Finding(
                "storage", "an active storage with content images", f"none such among {_named(storages)}",
                "Give one that content.", fix=(fixes.content(seen, "images", str(first["storage"])),),
            )  # fmt: skip
            return
        best = max(able, key=lambda each: (whole(each.get("avail")) or 0, str(each.get("storage"))))
        why = f"the most room of {_named(able)}" if len(able) > 1 else "the only one with content images"
        seen.choose(why, storage=str(best["storage"]), format=disk_format(best))
        yield fine("storage", f"{best['storage']} ({_room(best)})")
        return
    found = next((each for each in storages if each.get("storage") == name), None)
    if found is None:
        yield Finding(
            "storage", f"the storage {name!r} ({origin})", f"no such one; with images: {_named(able)}",
            "Set nested_pve_storage to one of them.", fix=_others(seen, able), here=True,
        )  # fmt: skip
    elif not usable(found):
        yield Finding(
            "storage", f"{name} ({origin}) to be active", "it is disabled or not active",
            f"See what it says in `pvesm status --storage {name}`.",
            fix=(shlex.join(["pvesm", "set", name, "--disable", "0"]),),
        )  # fmt: skip
    elif "images" not in contents(found):
        yield Finding(
            "storage", f"{name} ({origin}) to have content images", ",".join(sorted(contents(found))),
            f"Give it that, or set nested_pve_storage to one of: {_named(able)}.",
            fix=(fixes.content(seen, "images", name),),
        )  # fmt: skip
    else:
        seen.choose(origin, storage=name, format=disk_format(found))
        yield fine("storage", f"{name} ({_room(found)})")


def snippets(seen: Seen) -> Iterator[Finding]:
    """Where the vendor-data goes that installs the guest agent; a template has its own."""
    if seen.settings.template or not seen.boots:
        return
    able = [str(each["storage"]) for each in seen.storages if usable(each) and "snippets" in contents(each)]
    if not able:
        yield Finding(
            "snippets", "an active storage with content snippets (the guest agent comes to the VM that way)",
            "none", "Give one that content, or use a template that has the agent.",
            fix=(fixes.content(seen, "snippets"),),
        )  # fmt: skip
        return
    chosen = seen.choices.storage
    if chosen in able:
        seen.choose("with the disk", snippets=chosen)
    elif "local" in able:
        seen.choose("the usual one", snippets="local")
    else:
        seen.choose("the first that has content snippets", snippets=able[0])
    yield fine("snippets", str(seen.choices.snippets))


def space(seen: Seen) -> Iterator[Finding]:
    """Room for the disk, as much as a nested PVE is known to fill of it."""
    found = next(each for each in seen.storages if each.get("storage") == seen.choices.storage)
    settings, free = seen.settings, whole(found.get("avail"))
    if free is None:
        return
    disk = settings.disk * GIB
    config = mapping(seen.host.api.get(f"/storage/{found.get('storage')}"))
    thin = not takes_room_at_once(found, config)
    # A linked clone grows too; LVM has none.
    needed = min(GROWN, disk) if thin or (settings.template and found.get("type") != "lvm") else disk
    if free < needed:
        yield Finding(
            "space", f"{needed / GIB:.0f} GiB free on {found.get('storage')}"
            + ("" if thin else f" for a disk of {settings.disk} GiB, which takes its room at once"),
            f"{free / GIB:.1f} GiB", "Make room, name another storage, or a smaller nested_pve_disk.",
            fix=(shlex.join(["pvesm", "list", str(found.get("storage"))]),),
        )  # fmt: skip
        return
    room = f"{free / GIB:.0f} GiB free on {found.get('storage')}"
    yield fine("space", f"{room}, about {needed / GIB:.0f} needed")
