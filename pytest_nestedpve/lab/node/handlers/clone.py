"""/nodes/N/qemu/ID/clone: full and linked."""

from __future__ import annotations

import re
import uuid
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import PveFailure
from ..api.tree import api, task
from ..machine import disks
from ..state import guests, locks, members, output, paths, vm_options, volumes
from ..state.guests import NETS, Guest
from . import pools
from .cluster import guest_with_id

BASE = "/nodes/{node}/qemu/{vmid}"
NOT_COPIED = ("parent", "template", "lock", "digest", "snaptime", "vmstate", "runningmachine", "runningcpu")


@api("POST", BASE + "/clone")
def clone(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, new = int(params["vmid"]), int(params["newid"])
    if params.get("pool"):
        pools.require(params["pool"])
    target = params.get("target", paths.node())
    if members.find(target) is None:
        raise PveFailure(f"no such cluster node '{target}'", rc=2)
    if "storage" in params:
        volumes.storage(params["storage"])
        access.check(caller, f"/storage/{params['storage']}", ["Datastore.AllocateSpace"])
    guest = guests.find(vmid)
    source = _source(guest, params.get("snapname"))
    full = params.get("full", "0" if guest.template else "1") == "1"
    guest.check_lock()
    if guest_with_id(new):
        raise PveFailure(f"unable to create VM {new}: config file already exists", rc=2)
    if not full:
        _check_linkable(source)
    if not caller.is_root:
        _check_rights(caller, source, params.get("storage"))
    if target != paths.node():
        _check_target(source, target, params.get("storage"))
    Guest(new, {"lock": "clone"}, node=target).save()

    def work() -> None:
        created: list[str] = []
        try:
            with locks.guest(vmid, timeout=1.0):
                _clone(guests.load(vmid), source, new, params, created, full=full)
            if params.get("pool"):
                pools.add_guest(params["pool"], new)
        except BaseException as e:
            vm_options.remove_created(created)
            guests.remove(new, target)
            if isinstance(e, disks.DiskError):
                raise PveFailure(f"clone failed: {e}") from e
            raise

    return task(caller, "qmclone", vmid, work)


def _source(guest: Guest, snapshot: str | None) -> dict[str, str]:
    if not snapshot or snapshot == "current":
        return guests.copy_of(guest.conf)
    values = guest.snapshots.get(snapshot)
    if values is None:
        raise PveFailure(f"snapshot '{snapshot}' does not exist")
    options = {key: value for key, value in values.items() if key not in ("description", "snaptime")}
    return guests.copy_of(options)


def _disks(conf: dict[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in conf.items()
        if guests.DRIVES.fullmatch(key) and ":" in value.split(",")[0]
    }


def _check_linkable(source: dict[str, str]) -> None:
    for key, value in sorted(_disks(source).items()):
        volid = value.split(",")[0]
        if "media=cdrom" not in value and not volumes.path(volid).name.startswith("base-"):
            raise PveFailure(f"Linked clone feature is not supported for '{volid}' ({key})", rc=2)


def _check_target(source: dict[str, str], target: str, storage: str | None) -> None:
    """Check that the target node shares the disks, which are cloned on this node. PveFailure if not."""
    for value in _disks(source).values():
        for name in {volumes.split(value)[0], storage or volumes.split(value)[0]}:
            if not volumes.shared(name) or target not in volumes.nodes(name):
                raise PveFailure(f"can't clone VM to node '{target}' (VM uses local storage)")


def _check_rights(caller: Caller, source: dict[str, str], storage: str | None) -> None:
    for key, value in sorted(source.items()):
        if NETS.fullmatch(key) and (bridge := vm_options.net_parts(value).get("bridge")):
            access.check(caller, f"{vm_options.NETWORK}/{bridge}", ["SDN.Use"])
    for value in _disks(source).values():
        access.check(caller, f"/storage/{storage or volumes.split(value)[0]}", ["Datastore.AllocateSpace"])


def _clone(
    guest: Guest, source: dict[str, str], new: int, params: dict[str, Any], created: list[str], *, full: bool
) -> None:
    output.line(f"creating a clone of VM {guest.vmid} with ID {new}")
    conf = {k: v for k, v in source.items() if k not in NOT_COPIED and not re.fullmatch(r"unused\d+", k)}
    for key, value in sorted(_disks(source).items()):
        volid, _, rest = value.partition(",")
        if "cloudinit" in volid:
            name, _ = volumes.split(volid)
            copy = f"{params.get('storage', name)}:{new}/vm-{new}-cloudinit.qcow2"
            output.line(f"create full clone of drive {key} ({volid})")
            created.append(copy)
            volumes.allocate(copy, 4 * 1024**2, "qcow2")
            conf[key] = f"{copy},media=cdrom,size=4M"
        elif "media=cdrom" in value:
            continue
        elif full:
            conf[key] = ",".join(filter(None, (_create_full_clone(volid, new, key, params, created), rest)))
        else:
            conf[key] = ",".join(filter(None, (_create_linked_clone(volid, new, key, created), rest)))
    for key in [key for key in conf if NETS.fullmatch(key)]:
        conf[key] = re.sub(
            r"=[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", f"={vm_options.new_mac()}", conf[key], count=1
        )
    smbios = conf.get("smbios1", "uuid=")
    conf["smbios1"] = re.sub(r"uuid=[^,]*", f"uuid={uuid.uuid4()}", smbios)
    if "vmgenid" in conf:
        conf["vmgenid"] = str(uuid.uuid4())
    if params.get("name"):
        conf["name"] = params["name"]
    else:
        conf["name"] = f"Copy-of-VM-{conf.get('name', guest.vmid)}"
    if "description" in params:
        conf["description"] = params["description"]
    Guest(new, conf, node=params.get("target", paths.node())).save()


def _create_full_clone(volid: str, new: int, key: str, params: dict[str, Any], created: list[str]) -> str:
    output.line(f"create full clone of drive {key} ({volid})")
    file = volumes.path(volid)
    about = disks.info(file)
    store = params.get("storage") or volumes.split(volid)[0]
    fmt = params.get("format") or about["format"]
    copy = f"{store}:{new}/{volumes.next_name(store, new, fmt)}"
    output.line(volumes.formatting(volumes.path(copy), about["size"], fmt))
    created.append(copy)
    snapshot = params.get("snapname") if params.get("snapname") not in (None, "current") else None
    disks.full_clone(file, volumes.path(copy), fmt, snapshot)
    output.line(f"allocated target volume '{copy}'")
    volumes.transferred(about["size"])
    return copy


def _create_linked_clone(volid: str, new: int, key: str, created: list[str]) -> str:
    output.line(f"create linked clone of drive {key} ({volid})")
    name, _ = volumes.split(volid)
    base = volumes.path(volid)
    owner = base.parent.name
    file = volumes.next_name(name, new, "qcow2")
    below = f"../{owner}/{base.name}"
    output.line(f"clone {owner}/{base.name}: images, {file}, {new} to {file} (base={below})")
    about = disks.info(base)
    copy = f"{name}:{owner}/{base.name}/{new}/{file}"
    target = volumes.path(copy)
    extra = f" backing_file={below} backing_fmt={about['format']}"
    output.line(volumes.formatting(target, about["size"], "qcow2", extra))
    created.append(copy)
    disks.linked_clone(base, target, "qcow2")
    return copy
