# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/config, pending, cloudinit, resize, unlink: reading and changing a VM's options."""

from __future__ import annotations

import re
from typing import Any

from ..api import schema, validation
from ..api.access import Caller
from ..api.errors import BadParameters, PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import cloudinit, disks, machine
from ..state import guests, locks, output, vm_options, volumes
from ..state.guests import DRIVES, NETS, Guest

BASE = "/nodes/{node}/qemu/{vmid}"
# Options applied to a running VM at once; all others are pending until it stops.
AT_ONCE = re.compile(
    r"lock|name|onboot|shares|startup|description|protection|vmstatestorage|hookscript|tags|template|ci\w+|"
    r"nameserver|searchdomain|sshkeys|ipconfig\d+|net\d+|scsi\d+|virtio\d+|ide\d+|sata\d+|unused\d+"
)


@api("GET", BASE + "/config")
def read(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    digest = guest.digest()
    if "snapshot" in params:
        values = guest.snapshots.get(params["snapshot"])
        if values is None:
            raise PveFailure(f"snapshot '{params['snapshot']}' does not exist")
    elif params.get("current") == "1":
        values = guest.conf
    else:
        values = {**guest.conf, **{k: v for k, v in guest.pending.items() if v is not None}}
        for key in (k for k, v in guest.pending.items() if v is None):
            values.pop(key, None)
    _verify(values)
    answer = {key: guests.typed(key, guests.masked(key, value)) for key, value in values.items()}
    return answer | {"digest": digest}


def _verify(values: dict[str, str]) -> None:
    """Verify the answer as PVE does: `lock: destroyed` fails (facts 59)."""
    method = schema.method("POST", "/nodes/{node}/qemu")
    definition = method.definition("lock") if method else None
    if "lock" in values and definition and (error := validation.value(definition, values["lock"])):
        raise BadParameters({"lock": error}, rc=255, text="Result verification failed")


@api("GET", BASE + "/pending")
def pending(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    rows: list[dict[str, Any]] = []
    for key in sorted({*guest.conf, *guest.pending}):
        row: dict[str, Any] = {"key": key}
        if key in guest.conf:
            row["value"] = guests.typed(key, guests.masked(key, guest.conf[key]))
        if key in guest.pending:
            value = guest.pending[key]
            if value is None:
                row["delete"] = 1
            else:
                row["pending"] = guests.typed(key, guests.masked(key, value))
        rows.append(row)
    return [*rows, {"key": "digest", "value": guest.digest()}]


@api("PUT", BASE + "/config")
def update_now(caller: Caller, params: dict[str, Any]) -> Any:
    _update(caller, params, background=False)


@api("POST", BASE + "/config")
def update_as_task(caller: Caller, params: dict[str, Any]) -> Any:
    return _update(caller, params, background=True)


def _update(caller: Caller, params: dict[str, Any], *, background: bool) -> Any:
    vmid = int(params["vmid"])
    options = {key: str(value) for key, value in params.items() if key not in vm_options.NOT_OPTIONS}
    deleted = [name for name in re.split(r"[,;\s]+", params.get("delete", "")) if name]
    revert = [name for name in re.split(r"[,;\s]+", params.get("revert", "")) if name]
    if not options and not deleted and not revert:
        raise PveFailure("no options specified")
    _check_names("revert", revert)
    _check_names("delete", deleted)
    for name in deleted:
        if name in options:
            message = f"you can't use '-{name}' and '-delete {name}' at the same time"
            raise BadParameters({"delete": message}, rc=255)
    if "hookscript" in options and not volumes.path(options["hookscript"]).exists():
        raise BadParameters({"hookscript": f"script '{options['hookscript']}' does not exist\n"})
    vm_options.check_rights(caller, vmid, None, [*options, *deleted, *revert], options)
    vm_options.check_storage(caller, vmid, options)
    if "tags" in options or "tags" in deleted:
        vm_options.check_tags(caller, vmid)
    skip = params.get("skiplock") == "1"
    before = guests.load(vmid)
    before.check_digest(params.get("digest"))
    line = f"update VM {vmid}:" + "".join(
        f" -{key} {'<hidden>' if key == 'cipassword' else params[key]}"
        for key in sorted(params)
        if key not in ("node", "vmid", "digest")
    )

    def work() -> None:
        with locks.guest(vmid, rc=4, quiet=not caller.sync and not background):
            guest = guests.load(vmid)
            guest.check_digest(params.get("digest"))
            only_lock = set(deleted) | set(options) <= {"lock"} and caller.is_root and not options
            guest.check_lock(skip=skip or only_lock)
            if caller.sync or background:
                output.line(line)
            _apply(guest, options, deleted, revert, force=params.get("force") == "1")

    if background:
        return task(caller, "qmconfig", vmid, work)
    work()
    return None


def _check_names(parameter: str, names: list[str]) -> None:
    method = schema.method("POST", "/nodes/{node}/qemu")
    for name in names:
        if not method or method.definition(name) is None or name in vm_options.NOT_OPTIONS:
            raise BadParameters({parameter: f"unknown option '{name}'"}, rc=255)


def _apply(
    guest: Guest, options: dict[str, str], deleted: list[str], revert: list[str], *, force: bool
) -> None:
    is_running = guests.running(guest.vmid)
    guests.apply_pending(guest)
    for name in revert:
        guest.pending.pop(name, None)
    for name in deleted:
        if name not in guest.conf and name not in guest.pending:
            output.error(f"cannot delete '{name}' - not set in current configuration!")
        elif is_running and not AT_ONCE.fullmatch(name):
            guest.pending[name] = None
        else:
            delete_option(guest, name, force=force)
    created: list[str] = []
    try:
        drives = {name: value for name, value in options.items() if DRIVES.fullmatch(name)}
        for name in drives:
            _release(guest, name)
        vm_options.create_drives(guest, drives, created=created)
    except BaseException:
        vm_options.remove_created(created)
        raise
    for name, value in options.items():
        if name in drives:
            continue
        value = vm_options.normalized(name, value)
        if name == "template" and value == "0":
            guest.conf.pop("template", None)
        elif is_running and not AT_ONCE.fullmatch(name):
            guest.pending[name] = value
            if guest.conf.get(name) == value:
                del guest.pending[name]
        elif value == "" and name == "description":
            guest.conf.pop(name, None)
        else:
            if is_running and NETS.fullmatch(name):
                machine.set_link(
                    guest.vmid, int(name[3:]), up=vm_options.net_parts(value).get("link_down") != "1"
                )
            guest.conf[name] = value
    guest.save()


def _release(guest: Guest, name: str) -> None:
    """Turn the volume of a disk option that is about to be overwritten into an unused one."""
    if name in guest.conf:
        delete_option(guest, name, force=False)


def delete_option(guest: Guest, name: str, *, force: bool) -> None:
    value = guest.conf.pop(name, None)
    guest.pending.pop(name, None)
    if value is None:
        return
    volid = value.split(",")[0]
    if re.fullmatch(r"unused\d+", name) or (DRIVES.fullmatch(name) and ":" in volid):
        is_owned = ":" in volid and volumes.owner(volid) == guest.vmid
        if re.fullmatch(r"unused\d+", name) or force or "cloudinit" in volid:
            if is_owned and not any(
                volid in text for other in guest.snapshots.values() for text in other.values()
            ):
                disks.free(volumes.path(volid))
                folder = volumes.path(volid).parent
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        elif is_owned and "media=cdrom" not in value:
            add_unused(guest, volid)


def add_unused(guest: Guest, volid: str) -> str:
    number = next(n for n in range(256) if f"unused{n}" not in guest.conf)
    guest.conf[f"unused{number}"] = volid
    return f"unused{number}"


@api("PUT", BASE + "/unlink")
def unlink(caller: Caller, params: dict[str, Any]) -> Any:
    inner = {"node": params["node"], "vmid": params["vmid"], "delete": params["idlist"]}
    if params.get("force") == "1":
        inner["force"] = "1"
    _update(caller, inner, background=False)


@api("PUT", BASE + "/resize")
def resize(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, name = int(params["vmid"]), params["disk"]

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.load(vmid)
            guest.check_digest(params.get("digest"))
            guest.check_lock(skip=params.get("skiplock") == "1")
            if name not in guest.conf:
                raise PveFailure(f"disk '{name}' does not exist")
            volid = guest.conf[name].split(",")[0]
            file = volumes.path(volid)
            size = int(disks.info(file)["size"])
            relative, amount = (
                params["size"].startswith("+"),
                validation.size(params["size"].lstrip("+")) or 0,
            )
            new_size = size + amount if relative else amount
            if new_size < size:
                raise PveFailure("shrinking disks is not supported")
            if new_size > size:
                disks.resize(file, new_size)
                output.line("Image resized.")
            parts = vm_options.drive_parts(guest.conf[name])
            parts.pop("file")
            parts["size"] = volumes.short_size(new_size)
            guest.conf[name] = volid + "".join(f",{key}={parts[key]}" for key in sorted(parts))
            guest.save()

    return task(caller, "resize", vmid, work)


@api("POST", BASE + "/move_disk")
def move_disk(caller: Caller, params: dict[str, Any]) -> Any:
    guests.load(params["vmid"])
    if "storage" in params:
        volumes.storage(params["storage"])
    raise Unsupported("move_disk")


# -- cloud-init


@api("GET", BASE + "/cloudinit")
def cloudinit_pending(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    names = [k for k in guest.conf if k in cloudinit.OPTIONS or k.startswith("ipconfig") or k == "name"]
    return [{"key": key, "value": guests.masked(key, guest.conf[key])} for key in sorted(names)]


@api("PUT", BASE + "/cloudinit")
def cloudinit_update(caller: Caller, params: dict[str, Any]) -> Any:
    """Write the drive again; a running machine reads it at its next start."""
    with locks.guest(int(params["vmid"])):
        guest = guests.load(params["vmid"])
        if cloudinit.drive(guest) is None:
            return
        output.line("generating cloud-init ISO") if caller.sync else None
        cloudinit.seed(guest)


@api("GET", BASE + "/cloudinit/dump")
def cloudinit_dump(caller: Caller, params: dict[str, Any]) -> Any:
    return cloudinit.dump(guests.load(params["vmid"]), params["type"])
