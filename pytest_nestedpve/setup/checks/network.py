"""Check of the bridge for the nested VM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.setup.checks import fixes
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context

_BRIDGES = frozenset({"bridge", "OVSBridge", "vnet"})


def bridge(context: Context) -> Iterator[Finding]:
    """Check that the configured bridge exists, or choose one."""
    settings, node = context.settings, context.host.node
    interfaces = entries(context.host.api.get(f"/nodes/{node}/network"))
    bridges = {str(entry.get("iface")): entry for entry in interfaces if entry.get("type") in _BRIDGES}
    names = sorted(bridges)
    existing = ", ".join(names) or "none"
    if settings.bridge is not None and settings.bridge not in names:
        yield Finding(
            "bridge", f"the bridge {settings.bridge!r} ({settings.origin('bridge')}) on {node}",
            f"no such bridge; existing: {existing}", "Set nested_pve_bridge to one of them.",
            fix=fixes.alternatives(context, "bridge", names), local_fix=True,
        )  # fmt: skip
        return
    if settings.bridge is not None:
        chosen, why = settings.bridge, settings.origin("bridge")
    elif "vmbr0" in names:
        chosen, why = "vmbr0", "the default bridge"
    elif len(names) == 1:
        chosen, why = names[0], "the only bridge"
    else:
        yield Finding(
            "bridge", "vmbr0, or a single bridge", existing,
            "Set nested_pve_bridge to one of them." if names else "Create one, in the host's web interface.",
            fix=fixes.alternatives(context, "bridge", names), local_fix=True,
        )  # fmt: skip
        return
    context.choose(why, bridge=chosen)
    address = bridges[chosen].get("cidr") or bridges[chosen].get("address")
    yield fine("bridge", f"{chosen} ({address})" if address else chosen)
