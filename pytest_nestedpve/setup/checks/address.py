"""Check of the configured address of the nested VM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.config.parsers import static_address
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context


def address(context: Context) -> Iterator[Finding]:
    """Check that a static address is for one VM only, and not the host's."""
    static = static_address(context.settings.ipconfig)
    if static is None:
        return
    origin = context.settings.origin("ipconfig")
    if context.workers > 1:
        yield Finding(
            "address", f"an address by DHCP for the VM of each of {context.workers} workers",
            f"one static address for all of them, {static} ({origin})",
            "Set nested_pve_ipconfig = ip=dhcp, leave out -n, or set nested_pve_scope = run.",
        )  # fmt: skip
        return
    answer = context.host.run(["ip", "-4", "-o", "addr", "show", "to", str(static.ip)], timeout=20)
    if answer.ok and str(static.ip) in answer.stdout:
        yield Finding(
            "address", f"{static.ip} ({origin}) to be unused", f"it is an address of {context.host.name}",
            "Set nested_pve_ipconfig to an unused address.",
        )  # fmt: skip
        return
    yield fine("address", f"{static} ({origin})")
