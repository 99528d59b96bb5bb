"""Requirements that an attached PVE does not meet yet, and that steps selected by name will meet.

Preflight accepts them as missing, and is repeated before the VM inside is created.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup.checks.storage import contents, usable

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context
    from pytest_nestedpve.setup.checks.finding import Finding

STEPS = frozenset({"ensure_pve", "setup_network", "setup_repos"})
"""Phases whose results preflight checks."""
STORAGE = "local"
"""The storage whose content types setup_repos completes."""
_CONTENT = {"storage": "images", "snippets": "snippets", "image": "import"}


def awaited_results(seen: Context, selected: frozenset[str], missing: Iterable[Finding]) -> dict[str, str]:
    """The findings that a selected phase will fix: that phase by the name of the check."""
    names = {finding.what for finding in missing}
    awaited: dict[str, str] = {}
    if "ensure_pve" in selected and "PVE" in names:
        awaited["PVE"] = "ensure_pve"
    if "setup_network" in selected and "bridge" in names and seen.settings.bridge in (None, "vmbr0"):
        awaited["bridge"] = "setup_network"
    if "setup_repos" in selected and (storage := _storage(seen)) is not None:
        incomplete = {what for what, kind in _CONTENT.items() if kind not in contents(storage)}
        if seen.settings.storage not in (None, STORAGE):
            incomplete.discard("storage")
        if _is_elsewhere(seen.settings.image):
            incomplete.discard("image")
        awaited |= dict.fromkeys(sorted(incomplete & names), "setup_repos")
    return awaited


def _is_elsewhere(image: str | None) -> bool:
    """Whether the configured image is a volume of another storage or content type, not a URL or a file."""
    return image is not None and not re.match(r"https?://|/|" + STORAGE + ":import/", image)


def _storage(seen: Context) -> dict[str, object] | None:
    try:
        storages = seen.storages
    except PveError:
        return None
    return next((entry for entry in storages if entry.get("storage") == STORAGE and usable(entry)), None)
