"""Properties of a storage, by the host's answers and never by its name: formats, contents, allocation.

`storage` is an entry of /nodes/N/storage?format=1. Sources: the API's schema of PVE 9.2 (`formats`) and of
PVE 8 (`format`), and PVE's documentation of snapshots by storage type.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import flag, mapping
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api

# Storage types on which a raw volume has snapshots, or never has; for others, see `vm_can`.
_RAW_SNAPSHOTS = {
    "lvmthin": True, "zfspool": True, "zfs": True, "rbd": True, "btrfs": True,
    "dir": False, "nfs": False, "cifs": False, "cephfs": False, "lvm": False, "iscsi": False,
    "iscsidirect": False,
}  # fmt: skip
_FILES = frozenset({"dir", "nfs", "cifs", "btrfs", "cephfs", "glusterfs"})
_GROWING = frozenset({"lvmthin", "rbd"})


def contents(storage: Mapping[str, Any]) -> frozenset[str]:
    """The content types of a storage."""
    return frozenset(str(storage.get("content") or "").split(",")) - {"", "none"}


def usable(storage: Mapping[str, Any]) -> bool:
    """Whether a storage is enabled, and active on the node of the answer."""
    return flag(storage.get("active", 1)) and flag(storage.get("enabled", 1))


def shared(storage: Mapping[str, Any]) -> bool:
    """Whether the volumes are the same on all nodes that have the storage."""
    return flag(storage.get("shared", 0))


def formats(storage: Mapping[str, Any]) -> frozenset[str]:
    """The formats that disks on the storage may have; only raw if the answer has none.

    PVE 9 answers `formats` ({"supported": […], "default": …}); PVE 8 answers `format`, a list whose first
    element has the formats as keys, and neither for storages with raw volumes only.
    """
    answer = storage.get("formats", storage.get("format"))
    names: list[str] = []
    if isinstance(answer, dict):
        supported = answer.get("supported")
        names = [str(name) for name in supported] if isinstance(supported, (list, tuple)) else []
    elif isinstance(answer, list) and answer and isinstance(answer[0], dict):
        names = [str(name) for name, able in answer[0].items() if flag(able)]
    elif storage.get("type") in ("dir", "nfs", "cifs") and not answer:
        names = ["raw", "qcow2"]  # the call had no `format`
    return frozenset(names) or frozenset({"raw"})


def disk_format(storage: Mapping[str, Any]) -> str | None:
    """qcow2 if the storage supports it (raw files have no snapshots), else None: the storage's default."""
    return "qcow2" if "qcow2" in formats(storage) else None


def has_snapshots(storage: Mapping[str, Any]) -> bool | None:
    """Whether a disk in `disk_format` can have snapshots; None: known only of a VM (`vm_can`)."""
    if disk_format(storage) == "qcow2":
        return True
    return _RAW_SNAPSHOTS.get(str(storage.get("type")))


def takes_room_at_once(storage: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a new disk is allocated in full; `config` is the entry of /storage.

    A volume on LVM always is, also in qcow2; on ZFS, unless the storage is `sparse`; a file only with
    `preallocation`: raw files are sparse otherwise (recorded: preallocation=off).
    """
    kind = storage.get("type")
    if kind in _GROWING:
        return False
    if kind in ("zfspool", "zfs"):
        return not flag(config.get("sparse", 0))
    if kind in _FILES:
        return config.get("preallocation") in ("full", "falloc")
    return True


def vm_can(api: Api, node: str, vmid: int, feature: str) -> bool | None:
    """Whether a VM's disks support "snapshot", "clone" (linked) or "copy"; None: the host gives no answer."""
    try:
        answer = mapping(api.get(f"/nodes/{node}/qemu/{vmid}/feature", feature=feature))
    except PveError:
        return None
    return flag(answer["hasFeature"]) if "hasFeature" in answer else None


def nodes_of(api: Api, node: str, vmid: int) -> frozenset[str]:
    """The nodes that have all disks of a VM: only its own if a disk is local. Raises PveError."""
    answer = mapping(api.get(f"/nodes/{node}/qemu/{vmid}/feature", feature="copy"))
    names = answer.get("nodes")
    return frozenset(str(name) for name in names) if isinstance(names, list) else frozenset({node})
