"""Which identity carries a call, and what the run's token has to be granted for it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any


class Identity(Enum):
    """Who makes a call."""

    SEE = "see"
    """A token that sees everything, with minutes to live. Never sent what could hit a guest or a volume that
    is there, except on a nested PVE, whose everything is the tests' own (`free`)."""
    ACT = "act"
    """The token of one pool: PVE itself refuses it every other guest."""
    ROOT = "root"
    """root's `pvesh`: what PVE allows to no token."""


@dataclass(frozen=True)
class Grant:
    """Roles on an ACL path."""

    path: str
    roles: str


_GUEST = re.compile(r"/nodes/[^/]+/(?:qemu|lxc)(?:/(?P<vmid>\d+)(?P<rest>/.*)?)?\Z")
# Refused to every token, whatever its rights (facts 44, 48).
_ROOT_KEYS = re.compile(r"(?:args|skiplock|startup|hookscript|lock|hostpci\d+|usb\d+|parallel\d+)\Z")
_ROOT_CALLS = ("/monitor", "/sendkey")
# What the token that sees may change: pools, access control, and a download, which makes a new volume.
_SEE_WRITES = re.compile(r"/pools\Z|/access/|/nodes/[^/]+/storage/[^/]+/download-url\Z")
_VOLUME = re.compile(r"(?:^|[=,])(?P<storage>[A-Za-z][A-Za-z0-9._-]*[A-Za-z0-9]):(?=\S)")
_DISKS = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+\Z|cicustom\Z|vmstatestorage\Z")
_BRIDGE = re.compile(r"(?:^|,)bridge=(?P<bridge>[A-Za-z0-9._-]+)")


def identity(
    method: str, path: str, params: Mapping[str, Any], *, pool: str | None, free: bool = False
) -> Identity:
    """Who makes this call: `method` is get, post, put or delete, `pool` the pool that is acted in, if any.

    What changes a guest goes by the pool's token and by nothing else, unless only root may do it; without
    a pool (a guest that has none, found by an explicit clean-up) by root. `free`: there is no line to be
    drawn, the host is the caller's to do with what they like.
    """
    if method == "get":
        return Identity.SEE
    if free and not any(only_root(key, value) for key, value in params.items()):
        return Identity.SEE
    guest = _GUEST.match(path)
    if guest is None:
        # The lease: the pool's own token may write its comment, as long as it lives.
        mine = method == "put" and path == "/pools" and pool is not None and params.get("poolid") == pool
        if mine and set(params) == {"poolid", "comment"}:
            return Identity.ACT
        return Identity.SEE if _SEE_WRITES.match(path) else Identity.ROOT
    if pool is None or any(only_root(key, value) for key, value in params.items()):
        return Identity.ROOT
    return Identity.ROOT if (guest["rest"] or "").startswith(_ROOT_CALLS) else Identity.ACT


def only_root(key: str, value: Any) -> bool:
    """Whether PVE takes this parameter of a guest's from root@pam alone."""
    if value is None or value is False:
        return False
    if _ROOT_KEYS.match(key):
        return True
    text = str(value)
    if key == "delete":
        return any(_ROOT_KEYS.match(each) for each in re.split(r"[,;\s]+", text))
    if re.match(r"serial\d+\Z", key):
        return text != "socket"
    return "import-from=/" in text


def grants(path: str, params: Mapping[str, Any]) -> list[Grant]:
    """What a pool's token needs beside its pool for a call: storages and bridges that the call itself names,
    and the template that it clones. Never a guest otherwise.
    """
    found: list[Grant] = []
    for key, value in params.items():
        text = str(value)
        if key == "storage":
            found.append(storage_grant(text))
        elif _DISKS.match(key):
            found += [storage_grant(match["storage"]) for match in _VOLUME.finditer(text)]
        elif re.match(r"net\d+\Z", key) and (match := _BRIDGE.search(text)):
            found.append(Grant(f"/sdn/zones/localnetwork/{match['bridge']}", "PVESDNUser"))
    guest = _GUEST.match(path)
    if guest is not None and guest["rest"] == "/clone":
        found.append(Grant(f"/vms/{guest['vmid']}", "PVETemplateUser"))
    return found


def storage_grant(storage: str) -> Grant:
    """What is needed to make volumes on a storage."""
    return Grant(f"/storage/{storage}", "PVEDatastoreUser")


def cloned(path: str) -> tuple[str, int] | None:
    """Node and vmid of what a call clones, if it does."""
    match = re.match(r"/nodes/(?P<node>[^/]+)/qemu/(?P<vmid>\d+)/clone\Z", path)
    return (match["node"], int(match["vmid"])) if match else None


def of_clone(config: Mapping[str, Any]) -> list[Grant]:
    """What is needed beside the template itself to clone a VM of that configuration: storages, bridges."""
    nets = {key: value for key, value in config.items() if re.match(r"net\d+\Z", key)}
    return [storage_grant(name) for name in sorted(storages(config))] + grants("", nets)


def storages(config: Mapping[str, Any]) -> set[str]:
    """The storages that a configuration's disks are on."""
    return {
        match["storage"]
        for key, value in config.items()
        if _DISKS.match(key)
        for match in [_VOLUME.match(str(value))]
        if match is not None
    }
