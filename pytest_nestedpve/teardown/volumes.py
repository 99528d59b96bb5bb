"""The volumes of VMs that are destroyed: listed before the first of them is touched, swept at the end."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import STORAGE_NAME, entries, whole
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.cluster import node_of
from pytest_nestedpve.pve.errors import ApiError, GuestNotFound, NotFound, PveError
from pytest_nestedpve.pve.tasks import wait_task

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api

_DISK = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+\Z")
# Storage and name; it becomes part of a path, so nothing in it may end or leave one.
_VOLID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*:(?!(?:.*/)?\.{0,2}(?:/|\Z))[A-Za-z0-9_./@+=,~^-]+\Z")


_LONGEST = 1000


@dataclass
class _Record:
    """The volumes of one VM, by node and volume id, with the reason not to remove each (None: remove it)."""

    volumes: dict[tuple[str, str], str | None] = field(default_factory=dict)

    def add(self, node: str, volid: str, doubt: str | None) -> None:
        self.volumes.setdefault((node, volid), doubt)


class Volumes:
    """The volumes of VMs that are destroyed: listed once before the first is touched, then swept."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._lock = threading.Lock()
        self._listed: dict[str, dict[int, list[str]]] = {}
        self._shared: set[str] = set()
        self._records: dict[int, _Record] = {}

    def look(self, node: str) -> None:
        """List the volumes on the node's storages, unless that has been done. Raises PveError."""
        with self._lock:
            if node not in self._listed:
                self._listed[node] = self._list(node)

    def note(
        self,
        node: str,
        vmid: int,
        config: Mapping[str, Any],
        *,
        marked: bool = True,
        created_here: bool = True,
    ) -> None:
        """Record the volumes that its configuration names, and those that storages list for its id.

        An id is only drawn when no storage holds a volume of it, so a volume that no configuration names came
        with a VM that is `marked` (an import that was cut off leaves one), and is removed. It is reported and
        kept beside a VM without a marker; on a shared storage, where a guest of another cluster may have the
        same id; and on a node to which the VM was moved, whose storages were not listed when the id was drawn
        (`created_here` is false). Raises PveError.
        """
        self.look(node)
        named = volumes_of(config, vmid)
        with self._lock:
            record = self._records.setdefault(vmid, _Record())
            record.volumes |= dict.fromkeys((node, volid) for volid in named)
            for volid in self._listed[node].get(vmid, ()):
                if not belongs(volid, vmid):
                    record.add(node, volid, "listed for this id, and not named for it")
                elif volid in self._shared:
                    record.add(node, volid, "on a shared storage, and no configuration of ours names it")
                elif not marked:
                    record.add(node, volid, "no configuration names it")
                elif not created_here:
                    record.add(node, volid, f"on {node} perhaps before the VM, and no configuration names it")
                else:
                    record.add(node, volid, None)

    def _list(self, node: str) -> dict[int, list[str]]:
        volids: dict[int, list[str]] = {}
        path = f"/nodes/{node}/storage"
        for storage in entries(self._api.get(path, content="images", enabled=True), call=f"get {path}"):
            name = storage.get("storage")
            if isinstance(name, str) and STORAGE_NAME.match(name) and whole(storage.get("active", 1)) != 0:
                call = f"{path}/{name}/content"
                try:
                    listed = entries(self._api.get(call, content="images"), call=f"get {call}")
                except ApiError:
                    continue  # no teardown waits for a broken storage; volumes of configurations are swept
                for volume in listed:
                    vmid = whole(volume.get("vmid"))
                    if vmid is not None and isinstance(volume.get("volid"), str):
                        volids.setdefault(vmid, []).append(volume["volid"])
                        if qemu.cautious(storage.get("shared")):
                            self._shared.add(volume["volid"])
        return volids

    def sweep(self, gone: Mapping[int, str]) -> Iterator[tuple[int, str]]:
        """Remove left-over volumes of deleted VMs (id and node); where some remain, yields the VM's id and a
        text that names them."""
        content: dict[str, frozenset[str]] = {}
        for vmid in gone:
            left = []
            for (node, volid), doubt in self._records.get(vmid, _Record()).volumes.items():
                path = f"/nodes/{node}/storage/{volid.partition(':')[0]}/content"
                try:
                    if path not in content:
                        content[path] = self._content(path)
                    if volid in content[path] and doubt:
                        left.append(f"{volid} ({doubt})")
                    elif volid in content[path]:
                        left += patiently(partial(self._remove, node, vmid, path, volid))
                except PveError as e:
                    left.append(f"{volid} ({e})")
            if left:
                yield vmid, f"volumes left: {', '.join(left)}"

    def _remove(self, node: str, vmid: int, path: str, volid: str) -> list[str]:
        try:
            config = qemu.guest_config(self._api, node, vmid)
            if volid in volumes_of(config, vmid):
                return []  # it is that VM's: PVE reuses a name that no volume has any more
            return [f"{volid} (the id is in use again)"]
        except GuestNotFound:
            pass  # any other error: the id may be in use
        elsewhere = node_of(self._api, vmid)
        if elsewhere is not None:
            return [f"{volid} (the id is in use again, on {elsewhere})"]
        upid = self._api.delete(f"{path}/{volid}")
        if isinstance(upid, str) and upid.startswith("UPID:"):
            wait_task(self._api, upid, timeout=60)
        return [volid] if volid in self._content(path) else []

    def _content(self, path: str) -> frozenset[str]:
        try:
            volumes = entries(self._api.get(path, content="images"), call=f"get {path}")
        except NotFound as error:
            if not re.search(r"storage '?[^\s']+'? does not exist", error.text):
                raise
            return frozenset()  # the storage itself was removed
        return frozenset(str(volume.get("volid")) for volume in volumes)


def volumes_of(config: Mapping[str, Any], vmid: int) -> list[str]:
    """The volumes of a configuration that belong to the VM itself, not to another one or to a library."""
    first = (str(value).split(",", 1)[0] for key, value in config.items() if _DISK.match(key))
    return [volid for volid in first if belongs(volid, vmid)]


def belongs(volid: str, vmid: int) -> bool:
    """Whether a volume is the VM's own by the last part of its name: the base of a linked clone is not."""
    if len(volid) > _LONGEST or not _VOLID.match(volid):
        return False
    *above, name = volid.partition(":")[2].split("/")
    return re.match(rf"(?:vm|base|subvol)-{vmid}-", name) is not None or above[-1:] == [str(vmid)]
