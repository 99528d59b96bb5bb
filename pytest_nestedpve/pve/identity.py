"""Which identity sends a call, and which grants the run's token needs for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Identity(Enum):
    """The credentials that a call is sent with."""

    SEE = "see"
    """A token that reads everything and expires after minutes. No call that could change an existing guest or
    volume is sent with it, except on a nested PVE, which the tests own (`free`)."""
    ACT = "act"
    """The token of one pool: PVE refuses it every other guest."""
    ROOT = "root"
    """root's `pvesh`, for what PVE allows to no token."""


@dataclass(frozen=True)
class Grant:
    """Roles on an ACL path."""

    path: str
    roles: str


_GUEST = re.compile(r"/nodes/[^/]+/(?:qemu|lxc)(?:/(?P<vmid>\d+)(?P<rest>/.*)?)?\Z")
# PVE refuses these to every token, with any rights (facts 44, 48).
_ROOT_KEYS = re.compile(r"(?:args|skiplock|startup|hookscript|lock|hostpci\d+|usb\d+|parallel\d+)\Z")
_ROOT_CALLS = ("/monitor", "/sendkey")
# What the reading token may change: pools, access control, and a download, which creates a new volume.
_SEE_WRITES = re.compile(r"/pools\Z|/access/|/nodes/[^/]+/storage/[^/]+/download-url\Z")
_VOLUME = re.compile(r"(?:^|[=,])(?P<storage>[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]):(?=\S)")
_DISKS = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+\Z|cicustom\Z|vmstatestorage\Z")
_BRIDGE = re.compile(r"(?:^|,)bridge=(?P<bridge>[A-Za-z0-9._-]+)")


def identity_of(
    method: str, path: str, params: Mapping[str, Any], *, pool: str | None, free: bool = False
) -> Identity:
    """The identity for a call: `method` is get, post, put or delete, `pool` the run's pool, if any.

    A change of a guest needs the pool's token, unless only root may do it; without a pool (a guest without
    one, in an explicit clean-up) it needs root. `free`: without restrictions, the caller owns the host.
    """
    if method == "get":
        return Identity.SEE
    if free and not any(is_root_only(key, value) for key, value in params.items()):
        return Identity.SEE
    guest = _GUEST.match(path)
    if guest is None:
        # The lease: the pool's own token may write the comment until it expires.
        lease = method == "put" and path == "/pools" and pool is not None and params.get("poolid") == pool
        if lease and set(params) == {"poolid", "comment"}:
            return Identity.ACT
        return Identity.SEE if _SEE_WRITES.match(path) else Identity.ROOT
    if pool is None or any(is_root_only(key, value) for key, value in params.items()):
        return Identity.ROOT
    return Identity.ROOT if (guest["rest"] or "").startswith(_ROOT_CALLS) else Identity.ACT


def is_root_only(key: str, value: Any) -> bool:
    """Whether PVE accepts this parameter of a guest from root@pam alone."""
    if value is None or value is False:
        return False
    if _ROOT_KEYS.match(key):
        return True
    text = str(value)
    if key == "delete":
        return any(_ROOT_KEYS.match(option) for option in re.split(r"[,;\s]+", text))
    if re.match(r"serial\d+\Z", key):
        return text != "socket"
    return "import-from=/" in text


def grants(path: str, params: Mapping[str, Any]) -> list[Grant]:
    """The grants that a pool's token needs for a call beside its pool: the storages and bridges that the call
    names, and the template that it clones. Never another guest.
    """
    needed: list[Grant] = []
    for key, value in params.items():
        text = str(value)
        if key == "storage":
            needed.append(storage_grant(text))
        elif _DISKS.match(key):
            needed += [storage_grant(match["storage"]) for match in _VOLUME.finditer(text)]
        elif re.match(r"net\d+\Z", key) and (match := _BRIDGE.search(text)):
            needed.append(Grant(f"/sdn/zones/localnetwork/{match['bridge']}", "PVESDNUser"))
    guest = _GUEST.match(path)
    if guest is not None and guest["rest"] == "/clone":
        needed.append(Grant(f"/vms/{guest['vmid']}", "PVETemplateUser"))
    return needed


def storage_grant(storage: str) -> Grant:
    """The grant for creating volumes on a storage."""
    return Grant(f"/storage/{storage}", "PVEDatastoreUser")


def clone_source(path: str) -> tuple[str, int] | None:
    """Node and vmid of the guest that a call clones; None for other calls."""
    match = re.match(r"/nodes/(?P<node>[^/]+)/qemu/(?P<vmid>\d+)/clone\Z", path)
    return (match["node"], int(match["vmid"])) if match else None


def clone_grants(config: Mapping[str, Any]) -> list[Grant]:
    """The grants for cloning a VM of that configuration, beside the template: its storages and bridges."""
    nets = {key: value for key, value in config.items() if re.match(r"net\d+\Z", key)}
    return [storage_grant(name) for name in sorted(storages(config))] + grants("", nets)


def storages(config: Mapping[str, Any]) -> set[str]:
    """The storages of the disks in a configuration."""
    return {
        match["storage"]
        for key, value in config.items()
        if _DISKS.match(key)
        for match in [_VOLUME.match(str(value))]
        if match is not None
    }
