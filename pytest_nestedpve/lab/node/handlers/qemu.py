# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu: the list, create, destroy, and the index of a VM."""

from __future__ import annotations

import uuid
from typing import Any

from ..api import access
from ..api.access import Caller
from ..api.errors import NotAllowed, PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import disks, machine
from ..state import clock, guests, locks, output, paths, vm_options, volumes, worker
from ..state.guests import Guest
from ..state.store import store
from . import pools
from .cluster import guest_with_id, purge_references

BASE = "/nodes/{node}/qemu/{vmid}"
INDEX = [
    "config",
    "cloudinit",
    "pending",
    "status",
    "unlink",
    "vncproxy",
    "termproxy",
    "migrate",
    "resize",
    "move",
    "rrd",
    "rrddata",
    "monitor",
    "agent",
    "snapshot",
    "spiceproxy",
    "sendkey",
    "firewall",
    "mtunnel",
    "remote_migrate",
]


@api("GET", "/nodes/{node}/qemu")
def index(caller: Caller, params: dict[str, Any]) -> Any:
    full = params.get("full") == "1"
    return [
        guests.status(guest, full=full)
        for guest in guests.every()
        if caller.is_root or access.has(caller, f"/vms/{guest.vmid}", ["VM.Audit"])
    ]


@api("GET", BASE)
def vm_index(caller: Caller, params: dict[str, Any]) -> Any:
    """The index of a VM; exists for any id (facts 7)."""
    return [{"subdir": name} for name in INDEX]


@api("POST", "/nodes/{node}/qemu")
def create(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, pool = int(params["vmid"]), params.get("pool")
    if "archive" in params:
        raise Unsupported("restoring a backup")
    options = {key: str(value) for key, value in params.items() if key not in vm_options.NOT_OPTIONS}
    if pool is not None:
        pools.require(pool)
    if not caller.is_root:
        _check_may_create(caller, vmid, pool)
        vm_options.check_rights(caller, vmid, pool, options, options)
    vm_options.check_storage(caller, vmid, options)
    for name in ("sshkeys", "net0"):
        if name in options:
            vm_options.normalized(name, options[name])
    _reserve(vmid, caller)

    def work() -> None:
        created: list[str] = []
        try:
            with locks.guest(vmid):
                _create(caller, vmid, options, created)
                if pool is not None:
                    pools.add_guest(pool, vmid)
        except BaseException as e:
            vm_options.remove_created(created)
            guests.remove(vmid)
            if isinstance(e, PveFailure):
                raise PveFailure(f"unable to create VM {vmid} - {e.for_cli().rstrip()}") from e
            raise
        if params.get("start") == "1":
            from .power import start_now

            try:
                start_now(vmid)
            except PveFailure as e:
                worker.warn(f"unable to start VM {vmid} - {e.text}")

    return task(caller, "qmcreate", vmid, work)


def _check_may_create(caller: Caller, vmid: int, pool: str | None) -> None:
    if access.has(caller, f"/vms/{vmid}", ["VM.Allocate"]):
        return
    if pool is not None and access.has(caller, f"/pool/{pool}", ["VM.Allocate"]):
        return
    raise NotAllowed()


def _reserve(vmid: int, caller: Caller) -> None:
    """Save a configuration of `lock: create` alone, until the worker has ended (facts 50)."""
    with locks.guest(vmid, quiet=not caller.sync), store().change():
        if existing := guest_with_id(vmid):
            kind, node = existing
            raise PveFailure(f"unable to create VM {vmid} - {kind} {vmid} already exists on node '{node}'")
        Guest(vmid, {"lock": "create"}).save()


def _create(caller: Caller, vmid: int, options: dict[str, str], created: list[str]) -> None:
    if "tags" in options:
        vm_options.check_tags(caller, vmid)
    guest = Guest(vmid)
    vm_options.create_drives(guest, options, created=created)
    for name, value in options.items():
        if name not in guest.conf:
            guest.conf[name] = vm_options.normalized(name, value)
    guest.conf.setdefault("smbios1", f"uuid={uuid.uuid4()}")
    if guest.conf.get("vmgenid", "1") == "1":
        guest.conf["vmgenid"] = str(uuid.uuid4())
    elif guest.conf["vmgenid"] == "0":
        del guest.conf["vmgenid"]
    guest.conf.setdefault("boot", vm_options.default_boot(guest.conf))
    if not guest.conf.get("description"):
        guest.conf.pop("description", None)
    guest.conf["meta"] = f"creation-qemu={paths.QEMU},ctime={int(clock.now())}"
    guest.save()


@api("DELETE", BASE)
def destroy(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    skip, purge = params.get("skiplock") == "1", params.get("purge") == "1"
    guest = guests.load(vmid)
    _require_unprotected(guest)
    managed = store().get("ha", f"vm:{vmid}") is not None
    if managed and not purge:
        raise PveFailure(f"unable to remove VM {vmid} - used in HA resources and purge parameter not set.")
    _require_stopped(vmid)

    def work() -> None:
        with locks.guest(vmid):
            # Destroys the current VM of the id without checking the caller's rights again (facts 52).
            guest = guests.load(vmid)
            guest.check_lock(skip=skip)
            _require_unprotected(guest)
            _require_stopped(vmid)
            paths.pause("destroy_s")
            _destroy(guest, unreferenced=params.get("destroy-unreferenced-disks") == "1")
            if purge:
                output.line(f"purging VM {vmid} from related configurations..")
                purge_references(vmid)
            pools.remove_guest(vmid)
            guests.remove(vmid)
            machine.forget(vmid)

    return task(caller, "qmdestroy", vmid, work)


def _require_unprotected(guest: Guest) -> None:
    if guest.conf.get("protection") == "1":
        raise PveFailure(f"can't remove VM {guest.vmid} - protection mode enabled")


def _require_stopped(vmid: int) -> None:
    if guests.running(vmid):
        raise PveFailure(f"VM {vmid} is running - destroy failed", rc=25)


def _destroy(guest: Guest, *, unreferenced: bool) -> None:
    volids: list[str] = []
    for conf in (guest.conf, *guest.snapshots.values()):
        volids += [volid for volid in vm_options.volids(conf) if volid not in volids]
    owned = []
    for volid in volids:
        try:
            if volumes.owner(volid) == guest.vmid and volumes.path(volid):
                owned.append(volid)
        except PveFailure as e:
            worker.warn(f"failed to get path and owner of volume '{volid}': {e.text}")
    for volid in owned:
        if volumes.path(volid).name.startswith("base-") and volumes.users_of(volid):
            raise PveFailure(f"base volume '{volid}' is still in use by linked cloned")
    for volid in owned:
        try:
            volumes.free(volid)
        except PveFailure as e:
            worker.warn(f"Could not remove disk '{volid}', check manually: {e.text}")
    if unreferenced:
        for name in volumes.storages():
            for row in volumes.listing(name, vmid=guest.vmid, of="images"):
                volumes.free(row["volid"])
    Guest(guest.vmid, {"lock": "destroyed"}).save()


@api("POST", BASE + "/monitor")
def monitor(caller: Caller, params: dict[str, Any]) -> Any:
    """QEMU's monitor, for two recorded commands [power-068, power-070]."""
    vmid = int(params["vmid"])
    guests.load(vmid)
    if not guests.running(vmid):
        raise PveFailure(f"VM {vmid} not running")
    command = params["command"].strip()
    if command == "info status":
        return f"VM status: {'paused' if guests.paused(vmid) else 'running'}\r\n"
    if command == "info version":
        return f"{paths.QEMU}pve-qemu-kvm_10.0.2-4\r\n"
    raise Unsupported(f"monitor command '{command}'")


@api("POST", BASE + "/template")
def template(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    with locks.guest(vmid, quiet=not caller.sync):
        guest = guests.load(vmid)
        guest.check_lock()
        if guest.snapshots:
            raise PveFailure("unable to create template, because VM contains snapshots")
        if guest.template:
            raise PveFailure("you can't convert a template to a template")
        if guests.running(vmid):
            raise PveFailure("you can't convert a VM to template if VM is running")
        if "disk" in params and params["disk"] not in guest.conf:
            raise PveFailure(f"disk '{params['disk']}' does not exist")

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.apply_pending(guests.load(vmid))
            guest.conf["template"] = "1"
            for key, value in guest.drives().items():
                volid = value.split(",")[0]
                if "media=cdrom" in value or ":" not in volid or "/vm-" not in volid:
                    continue
                new = disks.to_template(volumes.path(volid))
                base = volid.rpartition("/")[0]
                store_name, rest = volumes.split(base)
                parts = rest.split("/")
                renamed = f"{store_name}:{'/'.join(parts)}/{new.name}"
                guest.conf[key] = value.replace(volid, renamed)
            guest.save()

    return task(caller, "qmtemplate", vmid, work)
