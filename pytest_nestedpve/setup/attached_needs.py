"""What an attached PVE lacks so far, and chosen steps are about to bring: preflight does not insist on it.

It looks again before the VM inside is made, when those steps have been done.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup.checks.storage import contents, usable

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen
    from pytest_nestedpve.setup.checks.finding import Finding

STEPS = frozenset({"ensure_pve", "setup_network", "setup_repos"})
"""Those that bring something which preflight looks for."""
STORAGE = "local"
"""The one that setup_repos gives content types."""
_CONTENT = {"storage": "images", "snippets": "snippets", "image": "import"}


def promised(seen: Seen, chosen: frozenset[str], missing: Iterable[Finding]) -> dict[str, str]:
    """Of the findings those that a chosen step mends: what was looked at, and the name of the step."""
    names = {finding.what for finding in missing}
    found: dict[str, str] = {}
    if "ensure_pve" in chosen and "PVE" in names:
        found["PVE"] = "ensure_pve"
    if "setup_network" in chosen and "bridge" in names and seen.settings.bridge in (None, "vmbr0"):
        found["bridge"] = "setup_network"
    if "setup_repos" in chosen and (there := _storage(seen)) is not None:
        lacks = {what for what, kind in _CONTENT.items() if kind not in contents(there)}
        if seen.settings.storage not in (None, STORAGE):
            lacks.discard("storage")
        if _elsewhere(seen.settings.image):
            lacks.discard("image")
        found |= dict.fromkeys(sorted(lacks & names), "setup_repos")
    return found


def _elsewhere(image: str | None) -> bool:
    """Whether the image that was named is a volume of another storage or content, not a URL or a file."""
    return image is not None and not re.match(r"https?://|/|" + STORAGE + ":import/", image)


def _storage(seen: Seen) -> dict[str, object] | None:
    try:
        storages = seen.storages
    except PveError:
        return None
    return next((each for each in storages if each.get("storage") == STORAGE and usable(each)), None)
