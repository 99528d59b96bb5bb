"""The shape of the nested VM: which settings decide it, as texts that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings


#: What a VM is made from: another value of one of these is another VM.
SHAPE = (
    "host", "name_patterns", "vmid_ranges", "pool_parent", "image", "template", "storage", "bridge",
    "ipconfig", "cores", "memory", "disk", "vm_options", "leaf_image", "leaf_options",
)  # fmt: skip


def shape(settings: Settings) -> dict[str, str]:
    """The settings that a VM is made from, as texts."""
    return {name: _text(getattr(settings, name)) for name in SHAPE}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value[key]}" for key in sorted(value)) or "none"
    if isinstance(value, tuple):
        return ", ".join("-".join(map(str, each)) if isinstance(each, tuple) else str(each) for each in value)
    return "none" if value is None else str(value)
