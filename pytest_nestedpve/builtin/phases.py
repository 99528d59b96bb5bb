"""The fourteen phases in their order. Those that are not built yet fail, and say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.phases import Phase
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment


class NotBuilt(PveError):
    """This version does not have the phase."""


def _missing(name: str) -> Callable[[Environment], Mapping[str, Any] | None]:
    def do(_env: Environment) -> Mapping[str, Any] | None:
        raise NotBuilt(
            f"this version has no built-in phase {name} yet; a project can bring its own by the hook "
            "pytest_nestedpve_phases"
        )

    return do


def _preflight(env: Environment) -> Mapping[str, Any] | None:
    from pytest_nestedpve.builtin.preflight import preflight

    return preflight(env)


_TO_COME = (
    ("provision", "a VM in the run's pool, with image and cloud-init"),
    ("start_vm", "the VM starts"),
    ("wait_ip", "the guest agent says the address and the host key"),
    ("ensure_pve", "PVE is there and healthy"),
    ("setup_network", "the network card becomes a port of vmbr0"),
    ("setup_ssh", "the run's key pair, also on the nested node"),
    ("setup_repos", "sources, secrets, certificate, API token"),
    ("download_image", "the leaf's image on the nested PVE"),
    ("leaf_provision", "a VM inside the VM"),
    ("leaf_start", "the leaf starts"),
    ("leaf_wait_ip", "the leaf's address and host key"),
    ("sync_repos", "sources on to the leaf"),
    ("verify_ssh_chain", "host keys verified on every hop"),
)


def default_phases() -> list[Phase]:
    """The phases of the package, in order."""
    phases = [Phase("preflight", "the host has what is needed", _preflight, timeout=120.0, usual=5.0)]
    phases += [Phase(name, title, _missing(name)) for name, title in _TO_COME]
    return phases
