"""The network that the nested VM is on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.setup.checks import fixes
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen

_BRIDGES = frozenset({"bridge", "OVSBridge", "vnet"})


def bridge(seen: Seen) -> Iterator[Finding]:
    """A bridge that is there."""
    settings, node = seen.settings, seen.host.node
    found = entries(seen.host.api.get(f"/nodes/{node}/network"))
    there = {str(each.get("iface")): each for each in found if each.get("type") in _BRIDGES}
    names = sorted(there)
    listed = ", ".join(names) or "none"
    if settings.bridge is not None and settings.bridge not in names:
        yield Finding(
            "bridge", f"the bridge {settings.bridge!r} ({settings.origin('bridge')}) on {node}",
            f"no such one; there: {listed}", "Set nested_pve_bridge to one of them.",
            fix=fixes.instead(seen, "bridge", names), here=True,
        )  # fmt: skip
        return
    if settings.bridge is not None:
        chosen, why = settings.bridge, settings.origin("bridge")
    elif "vmbr0" in names:
        chosen, why = "vmbr0", "the usual one"
    elif len(names) == 1:
        chosen, why = names[0], "the only one"
    else:
        yield Finding(
            "bridge", "vmbr0, or one single bridge", listed,
            "Say which one in nested_pve_bridge." if names else "Make one, in its web interface.",
            fix=fixes.instead(seen, "bridge", names), here=True,
        )  # fmt: skip
        return
    seen.choose(why, bridge=chosen)
    address = there[chosen].get("cidr") or there[chosen].get("address")
    yield fine("bridge", f"{chosen} ({address})" if address else chosen)
