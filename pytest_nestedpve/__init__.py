"""A real, throw-away Proxmox VE inside a VM of a Proxmox VE host, for a pytest session.

The names in `__all__` are the public ones. Each is loaded at first use, so the package costs no module until
then, and none of them needs pytest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.attached import NotOurs
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Phase, PhaseListError
    from pytest_nestedpve.ownership.discover import discover
    from pytest_nestedpve.ownership.proof import RunProver, prove
    from pytest_nestedpve.pve.errors import PveError
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.setup.ansible.dependencies import digest_of
    from pytest_nestedpve.setup.own_vm import NotAdopted, VmRequest, adopt_vms, replace_provision
    from pytest_nestedpve.teardown.destroy import destroy

__all__ = [
    "Environment",
    "NestedPve",
    "NotAdopted",
    "NotOurs",
    "Phase",
    "PhaseListError",
    "PveError",
    "PveHost",
    "RunProver",
    "Settings",
    "VmRequest",
    "adopt_vms",
    "destroy",
    "digest_of",
    "discover",
    "prove",
    "replace_provision",
]

_MODULES = {
    "Environment": "environment.environment",
    "NestedPve": "session.nested_pve",
    "NotAdopted": "setup.own_vm",
    "NotOurs": "environment.attached",
    "Phase": "environment.phases",
    "PhaseListError": "environment.phases",
    "PveError": "pve.errors",
    "PveHost": "pve.host",
    "RunProver": "ownership.proof",
    "Settings": "config.settings",
    "VmRequest": "setup.own_vm",
    "adopt_vms": "setup.own_vm",
    "destroy": "teardown.destroy",
    "digest_of": "setup.ansible.dependencies",
    "discover": "ownership.discover",
    "prove": "ownership.proof",
    "replace_provision": "setup.own_vm",
}


def __getattr__(name: str) -> Any:
    """Load a public name. Raises AttributeError for any other."""
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
