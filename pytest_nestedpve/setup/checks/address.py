"""The address that the nested VM is to have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.config.parsers import static_address
from pytest_nestedpve.setup.checks.finding import Finding, fine

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Seen


def address(seen: Seen) -> Iterator[Finding]:
    """A static one is one VM's: not that of each of several workers, nor one that the host has itself."""
    wanted = static_address(seen.settings.ipconfig)
    if wanted is None:
        return
    origin = seen.settings.origin("ipconfig")
    if seen.workers > 1:
        yield Finding(
            "address", f"addresses by DHCP for {seen.workers} workers, each with a VM of its own",
            f"one for all of them, {wanted} ({origin})",
            "Take ip=dhcp, leave out -n, or share one nested PVE (nested_pve_scope = run).",
        )  # fmt: skip
        return
    there = seen.host.run(["ip", "-4", "-o", "addr", "show", "to", str(wanted.ip)], timeout=20)
    if there.ok and str(wanted.ip) in there.stdout:
        yield Finding(
            "address", f"{wanted.ip} ({origin}) to be free", f"{seen.host.name} has it itself",
            "Set nested_pve_ipconfig to an address that nobody has.",
        )  # fmt: skip
        return
    yield fine("address", f"{wanted} ({origin})")
