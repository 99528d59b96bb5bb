"""What a storage can, by what the host answers about it: formats, contents, room. Its name says nothing.

An answer is an entry of /nodes/N/storage?format=1. Sources: the API's schema of PVE 9.2 (`formats`), PVE 8's
form of the same (`format`), and which kinds of storage PVE documents to have snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.answers import flag, mapping
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api

# Where a raw volume has snapshots, and where it surely has none; of other kinds only a VM's own answer tells.
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
    """Whether a storage is enabled and active on the node that was asked."""
    return flag(storage.get("active", 1)) and flag(storage.get("enabled", 1))


def shared(storage: Mapping[str, Any]) -> bool:
    """Whether every node that has it sees the same volumes."""
    return flag(storage.get("shared", 0))


def formats(storage: Mapping[str, Any]) -> frozenset[str]:
    """The formats that its disks may have; raw alone where the answer names none.

    PVE 9 answers `formats` ({"supported": […], "default": …}); PVE 8 answers `format`, a list whose first
    element holds the formats as keys, and nothing at all for storages that have raw volumes only.
    """
    said = storage.get("formats", storage.get("format"))
    if isinstance(said, dict):
        listed = said.get("supported")
        found = [str(each) for each in listed] if isinstance(listed, (list, tuple)) else []
    elif isinstance(said, list) and said and isinstance(said[0], dict):
        found = [str(name) for name, able in said[0].items() if flag(able)]
    elif storage.get("type") in ("dir", "nfs", "cifs") and not said:
        found = ["raw", "qcow2"]  # asked without `format`
    else:
        found = []
    return frozenset(found) or frozenset({"raw"})


def disk_format(storage: Mapping[str, Any]) -> str | None:
    """qcow2 where the storage can have it (raw files have no snapshots), else None: its own default."""
    return "qcow2" if "qcow2" in formats(storage) else None


def has_snapshots(storage: Mapping[str, Any]) -> bool | None:
    """Whether a disk as `disk_format` has it can have snapshots; None: only the VM will tell (`feature`)."""
    if disk_format(storage) == "qcow2":
        return True
    return _RAW_SNAPSHOTS.get(str(storage.get("type")))


def takes_room_at_once(storage: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    """Whether a new disk takes all of its room when it is made; `config` is the entry of /storage.

    A volume on LVM always does, also one in qcow2; a ZFS one unless the storage is `sparse`; a file only if
    the storage says so (`preallocation`): raw files are sparse otherwise (recorded: preallocation=off).
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
    """Whether a VM's disks can "snapshot", "clone" (linked) or "copy"; None: the host does not say."""
    try:
        answer = mapping(api.get(f"/nodes/{node}/qemu/{vmid}/feature", feature=feature))
    except PveError:
        return None
    return flag(answer["hasFeature"]) if "hasFeature" in answer else None


def nodes_of(api: Api, node: str, vmid: int) -> frozenset[str]:
    """The nodes on which all disks of a VM are to be had: of local ones only its own. Raises PveError."""
    answer = mapping(api.get(f"/nodes/{node}/qemu/{vmid}/feature", feature="copy"))
    listed = answer.get("nodes")
    return frozenset(str(each) for each in listed) if isinstance(listed, list) else frozenset({node})
