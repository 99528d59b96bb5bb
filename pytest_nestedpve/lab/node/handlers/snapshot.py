# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/snapshot: list, take, roll back, delete."""

from __future__ import annotations

from typing import Any

from ..api.access import Caller
from ..api.errors import PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import disks, machine
from ..state import clock, guests, locks, members, output, paths, reported, volumes
from ..state.guests import Guest
from .power import agent_enabled, boot, mark_stopped

BASE = "/nodes/{node}/qemu/{vmid}/snapshot"
NOT_SAVED = ("lock", "parent", "digest", "template", "description", "snaptime", "snapstate")


@api("GET", BASE)
def index(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    rows = []
    for name, values in guest.snapshots.items():
        row = {
            "description": values.get("description", ""),
            "name": name,
            "snaptime": int(values.get("snaptime", 0)),
            "vmstate": 1 if "vmstate" in values else 0,
        }
        rows.append(row | ({"parent": values["parent"]} if "parent" in values else {}))
    current: dict[str, Any] = {"description": "You are here!", "digest": guest.digest(), "name": "current"}
    current["running"] = 1 if guests.running(guest.vmid) else 0
    return [*rows, current | ({"parent": guest.conf["parent"]} if "parent" in guest.conf else {})]


def _drives(guest: Guest) -> dict[str, str]:
    """The volumes that a snapshot includes, by option: no CD-ROMs."""
    volids = {}
    for key, value in guest.drives().items():
        volid = value.split(",")[0]
        if ":" in volid and "media=cdrom" not in value:
            volids[key] = volid
    return volids


@api("GET", "/nodes/{node}/qemu/{vmid}/feature")
def feature(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    drives = list(_drives(guest).values())
    available = {
        "snapshot": all(map(_can_have_snapshots, drives)),
        "clone": all(volumes.path(volid).name.startswith("base-") for volid in drives),
        "copy": True,
    }
    answer = {"hasFeature": int(available[params["feature"]]), "nodes": _common_nodes(guest)}
    return answer | reported.of("feature", str(params["vmid"])).get(params["feature"], {})


def _common_nodes(guest: Guest) -> list[str]:
    """The nodes that have all volumes of the VM: only this one if a volume is local."""
    nodes = {member.name for member in members.every()}
    for value in guest.drives().values():
        storage, separator, _ = value.removeprefix("file=").split(",")[0].partition(":")
        if separator:
            nodes &= {*volumes.nodes(storage)} if volumes.shared(storage) else {paths.node()}
    return sorted(nodes)


def _can_have_snapshots(volid: str) -> bool:
    """Whether the volume can have snapshots."""
    if volumes.has_snapshots(volumes.split(volid)[0]):
        return True
    return bool(disks.info(volumes.path(volid))["format"] == "qcow2")


def _snapshot(guest: Guest, name: str) -> dict[str, str]:
    values = guest.snapshots.get(name)
    if values is None:
        raise PveFailure(f"snapshot '{name}' does not exist")
    return values


@api("POST", BASE)
def take(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, name = int(params["vmid"]), params["snapname"]
    if name == "current":
        raise PveFailure("unable to use snapshot name 'current' (reserved name)", rc=2)
    guests.load(vmid)

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.load(vmid)
            guest.check_lock()
            if guest.template:
                raise PveFailure("can't take snapshot of a template")
            if name in guest.snapshots:
                raise PveFailure(f"snapshot name '{name}' already used")
            drives = _drives(guest)
            for volid in drives.values():
                if not _can_have_snapshots(volid):
                    raise PveFailure("snapshot feature is not available")
            if params.get("vmstate") == "1" and guests.running(vmid):
                raise Unsupported("saving the RAM of a running VM")
            _take(guest, name, drives, params.get("description", ""))

    return task(caller, "qmsnapshot", vmid, work)


def _take(guest: Guest, name: str, drives: dict[str, str], description: str) -> None:
    values = {key: value for key, value in guest.conf.items() if key not in NOT_SAVED}
    if "parent" in guest.conf:
        values["parent"] = guest.conf["parent"]
    if description:
        values["description"] = description
    values["snaptime"] = str(int(clock.now()))
    guest.conf["lock"] = "snapshot"
    guest.save()
    completed: list[str] = []
    try:
        _log_missing_freeze(guest)
        with machine.frozen(guest.vmid):
            for key, volid in drives.items():
                output.line(f"snapshotting 'drive-{key}' ({volid})")
                disks.snapshot(volumes.path(volid), name)
                completed.append(volid)
    except BaseException as e:
        for volid in completed:
            disks.delete_snapshot(volumes.path(volid), name)
        guest.conf.pop("lock", None)
        guest.save()
        if isinstance(e, disks.DiskError):
            raise PveFailure(str(e)) from e
        raise
    guest.conf.pop("lock")
    guest.snapshots[name] = values
    guest.conf["parent"] = name
    guest.save()


def _log_missing_freeze(guest: Guest) -> None:
    """Log an agent without an answer; PVE asks it to flush, here the frozen machine is enough."""
    if guests.running(guest.vmid) and agent_enabled(guest):
        try:
            machine.agent(guest.vmid, "guest-ping", None, 1.0)
        except machine.AgentError:
            output.line("skipping guest filesystem freeze - agent configured but not running?")


@api("GET", BASE + "/{snapname}")
def snapshot_index(caller: Caller, params: dict[str, Any]) -> Any:
    return [{"cmd": "rollback"}, {"cmd": "config"}]


@api("GET", BASE + "/{snapname}/config")
def read(caller: Caller, params: dict[str, Any]) -> Any:
    values = _snapshot(guests.load(params["vmid"]), params["snapname"])
    return {key: guests.typed(key, guests.masked(key, value)) for key, value in values.items()}


@api("PUT", BASE + "/{snapname}/config")
def describe(caller: Caller, params: dict[str, Any]) -> Any:
    with locks.guest(int(params["vmid"]), quiet=not caller.sync):
        guest = guests.load(params["vmid"])
        values = _snapshot(guest, params["snapname"])
        if "description" in params:
            values["description"] = params["description"]
        guest.save()


@api("POST", BASE + "/{snapname}/rollback")
def rollback(caller: Caller, params: dict[str, Any]) -> Any:
    """Restore name, tags, memory and protection; the description does not change (facts 55)."""
    vmid, name = int(params["vmid"]), params["snapname"]

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.load(vmid)
            values = _snapshot(guest, name)
            if guest.template:
                raise PveFailure("unable to rollback vm: vm is a template")
            guest.check_lock()
            if guests.running(vmid):
                machine.stop(vmid)
                mark_stopped(vmid)
                guest = guests.load(vmid)
            unchanged = {key: guest.conf[key] for key in ("description",) if key in guest.conf}
            _require_newest(guest, name, values)
            for volid in _drives(Guest(vmid, values)).values():
                try:
                    disks.rollback(volumes.path(volid), name)
                except disks.DiskError as e:
                    raise PveFailure(str(e)) from e
            restored = {k: v for k, v in values.items() if k not in NOT_SAVED}
            guest.conf = {**restored, **unchanged, "parent": name}
            guest.pending = {}
            guest.save()
            if params.get("start") == "1":
                boot(guest)

    return task(caller, "qmrollback", vmid, work)


def _require_newest(guest: Guest, name: str, values: dict[str, str]) -> None:
    """Refuse a rollback on ZFS to any but the newest snapshot."""
    newest = max(guest.snapshots, key=lambda other: int(guest.snapshots[other].get("snaptime", 0)))
    for volid in _drives(Guest(guest.vmid, values)).values():
        if name != newest and volumes.storage(volumes.split(volid)[0])["type"] == "zfspool":
            raise PveFailure(f"can't rollback, '{name}' is not most recent snapshot on '{volid}'")


@api("DELETE", BASE + "/{snapname}")
def delete(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, name = int(params["vmid"]), params["snapname"]

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.load(vmid)
            values = _snapshot(guest, name)
            force = params.get("force") == "1"
            guest.check_lock(skip=force)
            for volid in _drives(Guest(vmid, values)).values():
                try:
                    disks.delete_snapshot(volumes.path(volid), name)
                except disks.DiskError as e:
                    if not force:
                        raise PveFailure(str(e)) from e
            del guest.snapshots[name]
            for other in (guest.conf, *guest.snapshots.values()):
                if other.get("parent") == name:
                    if "parent" in values:
                        other["parent"] = values["parent"]
                    else:
                        del other["parent"]
            guest.save()

    return task(caller, "qmdelsnapshot", vmid, work)
