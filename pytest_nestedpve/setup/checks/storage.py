"""Checks of storages: for the disk, for the snippet that installs the guest agent, and their free space."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import mapping, whole
from pytest_nestedpve.pve.storage import contents, disk_format, has_snapshots, takes_room_at_once, usable
from pytest_nestedpve.setup.checks import fixes
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context

GIB = 1024**3
# The space that a nested PVE with a leaf uses of a thin disk, about.
THIN_USE = 8 * GIB

__all__ = ["contents", "disk_format", "snippets", "space", "storage", "usable"]


def _names(storages: list[dict[str, Any]]) -> str:
    return ", ".join(sorted(str(entry.get("storage")) for entry in storages)) or "none"


def _alternatives(context: Context, able: list[dict[str, Any]]) -> tuple[str, ...]:
    return fixes.alternatives(context, "storage", sorted(str(entry.get("storage")) for entry in able))


def _description(storage: dict[str, Any]) -> str:
    free = whole(storage.get("avail"))
    text = f"{storage.get('type', 'storage')}" + (f", {free / GIB:.0f} GiB free" if free is not None else "")
    return text + ("; its disks have no snapshots" if has_snapshots(storage) is False else "")


def storage(context: Context) -> Iterator[Finding]:
    """Check the configured storage for the disk, or choose the one with the most free space."""
    settings, storages = context.settings, context.storages
    able = [entry for entry in storages if usable(entry) and "images" in contents(entry)]
    origin, name = settings.origin("storage"), settings.storage
    if name is None:
        if not able:
            first = next((entry for entry in storages if usable(entry)), {"storage": "local"})
            yield Finding(
                "storage", "an active storage with content images",
                f"no such storage among {_names(storages)}",
                "Add that content to one.", fix=(fixes.content(context, "images", str(first["storage"])),),
            )  # fmt: skip
            return
        best = max(able, key=lambda entry: (whole(entry.get("avail")) or 0, str(entry.get("storage"))))
        why = (
            f"the most free space of {_names(able)}" if len(able) > 1 else "the only one with content images"
        )
        context.choose(why, storage=str(best["storage"]), format=disk_format(best))
        yield fine("storage", f"{best['storage']} ({_description(best)})")
        return
    entry = next((entry for entry in storages if entry.get("storage") == name), None)
    if entry is None:
        yield Finding(
            "storage", f"the storage {name!r} ({origin})",
            f"no such storage; with content images: {_names(able)}",
            "Set nested_pve_storage to one of them.", fix=_alternatives(context, able), local_fix=True,
        )  # fmt: skip
    elif not usable(entry):
        yield Finding(
            "storage", f"{name} ({origin}) to be active", "it is disabled or not active",
            f"See its state: `pvesm status --storage {name}`.",
            fix=(shlex.join(["pvesm", "set", name, "--disable", "0"]),),
        )  # fmt: skip
    elif "images" not in contents(entry):
        yield Finding(
            "storage", f"{name} ({origin}) to have content images", ",".join(sorted(contents(entry))),
            f"Add that content, or set nested_pve_storage to one of: {_names(able)}.",
            fix=(fixes.content(context, "images", name),),
        )  # fmt: skip
    else:
        context.choose(origin, storage=name, format=disk_format(entry))
        yield fine("storage", f"{name} ({_description(entry)})")


def snippets(context: Context) -> Iterator[Finding]:
    """Choose the storage for the vendor-data that installs the guest agent; a template has the agent."""
    if context.settings.template or not context.boots:
        return
    able = [
        str(entry["storage"]) for entry in context.storages if usable(entry) and "snippets" in contents(entry)
    ]
    if not able:
        yield Finding(
            "snippets", "an active storage with content snippets (a snippet installs the guest agent)",
            "none", "Add that content to one, or use a template that has the agent.",
            fix=(fixes.content(context, "snippets"),),
        )  # fmt: skip
        return
    chosen = context.choices.storage
    if chosen in able:
        context.choose("the storage of the disk", snippets=chosen)
    elif "local" in able:
        context.choose("the default storage", snippets="local")
    else:
        context.choose("the first storage with content snippets", snippets=able[0])
    yield fine("snippets", str(context.choices.snippets))


def space(context: Context) -> Iterator[Finding]:
    """Check the free space for the disk, or for the usual use of a thin one."""
    entry = next(entry for entry in context.storages if entry.get("storage") == context.choices.storage)
    settings, free = context.settings, whole(entry.get("avail"))
    if free is None:
        return
    disk = settings.disk * GIB
    config = mapping(context.host.api.get(f"/storage/{entry.get('storage')}"))
    thin = not takes_room_at_once(entry, config)
    # A linked clone is thin too; LVM has no linked clones.
    needed = min(THIN_USE, disk) if thin or (settings.template and entry.get("type") != "lvm") else disk
    if free < needed:
        yield Finding(
            "space", f"{needed / GIB:.0f} GiB free on {entry.get('storage')}"
            + ("" if thin else f" for a disk of {settings.disk} GiB, which takes its space at once"),
            f"{free / GIB:.1f} GiB",
            "Free space, or set another nested_pve_storage or a smaller nested_pve_disk.",
            fix=(shlex.join(["pvesm", "list", str(entry.get("storage"))]),),
        )  # fmt: skip
        return
    text = f"{free / GIB:.0f} GiB free on {entry.get('storage')}"
    yield fine("space", f"{text}, about {needed / GIB:.0f} needed")
