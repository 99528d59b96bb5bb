"""Inventories for Ansible as data: hosts, variables, groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class InventoryHost:
    """One host with its Ansible variables (ansible_host, pve_hostname, nested_pve_…)."""

    name: str
    variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Inventory:
    """Hosts and the groups they are in; a group's members are names of `hosts`."""

    hosts: tuple[InventoryHost, ...]
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """The inventory in the form of Ansible's `yaml` plugin, which reads JSON as well.

        Raises ValueError for a group member that is no host.
        """
        names = {host.name for host in self.hosts}
        for group, members in self.groups.items():
            if unknown := sorted(set(members) - names):
                raise ValueError(f"group {group}: expected members among {sorted(names)}, found {unknown}")
        return {
            "all": {
                "hosts": {host.name: dict(host.variables) for host in self.hosts},
                "children": {
                    group: {"hosts": {name: {} for name in members}} for group, members in self.groups.items()
                },
            }
        }


def nested_inventory(
    name: str,
    *,
    address: str,
    groups: Iterable[str] = (),
    alias: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Inventory:
    """The inventory of one nested node; `name` is its node name as well.

    `alias` (default `name`): the host for SSH, an entry of the run's ssh_config with jump host, key and
    pinned host keys. The address is the variable `nested_pve_ip`.
    """
    variables: dict[str, Any] = {
        "ansible_host": alias or name,
        "ansible_user": "root",
        "pve_hostname": name,
        "nested_pve_ip": address,
        **(extra or {}),
    }
    return Inventory((InventoryHost(name, variables),), dict.fromkeys(groups, (name,)))
