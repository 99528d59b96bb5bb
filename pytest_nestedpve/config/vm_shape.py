"""The shape of the nested VM: the settings of its creation, as texts to compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings


#: The settings of the VM's creation: another value of one of these needs another VM.
SHAPE = (
    "host", "name_patterns", "vmid_ranges", "pool_parent", "image", "template", "storage", "bridge",
    "ipconfig", "cores", "memory", "disk", "vm_options", "leaf_image", "leaf_options",
)  # fmt: skip


def shape(settings: Settings) -> dict[str, str]:
    """The settings of a VM's creation, as texts by name."""
    return {name: _text(getattr(settings, name)) for name in SHAPE}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    if isinstance(value, tuple):
        return ", ".join("-".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return "none" if value is None else str(value)
