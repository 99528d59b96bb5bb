"""A VM's options: normalized forms of values, privileges to set them, and creation of their disks."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..api import access, validation
from ..api.access import Caller
from ..api.errors import BadParameters, NotAllowed, PveFailure, Unsupported
from ..machine import disks
from . import output, paths, volumes
from .guests import DRIVES, NETS, Guest

# Parameters of create and config that are no options of the VM.
NOT_OPTIONS = {
    *("node", "vmid", "pool", "start", "archive", "force", "unique", "storage", "bwlimit", "live-restore"),
    *("import-working-storage", "ha-managed", "delete", "digest", "revert", "skiplock", "background_delay"),
}
_GROUPS = (
    (r"cores|sockets|smp|vcpus|numa\d*|cpu|cpulimit|cpuunits|affinity", "VM.Config.CPU"),
    (r"memory|balloon|shares|hugepages|keephugepages|allow-ksm", "VM.Config.Memory"),
    (
        r"acpi|hotplug|kvm|machine|bios|scsihw|tablet|vga|watchdog|audio0|ivshmem|rng0|spice_enhancements|"
        r"usb\d+|serial\d+|parallel\d+|hostpci\d+|efidisk0|tpmstate0|virtiofs\d+|keyboard|localtime|startdate",
        "VM.Config.HWType",
    ),
    (r"net\d+", "VM.Config.Network"),
    (
        r"ciuser|cipassword|citype|ciupgrade|cicustom|nameserver|searchdomain|sshkeys|ipconfig\d+",
        "VM.Config.Cloudinit",
    ),
)
ONLY_ROOT = re.compile(r"lock|args|hookscript|parallel\d+|hostpci\d+|usb\d+|ivshmem|amd-sev")
NETWORK = "/sdn/zones/localnetwork"


def privilege(option: str) -> str:
    for pattern, priv in _GROUPS:
        if re.fullmatch(pattern, option):
            return priv
    return (
        "VM.Config.Disk" if DRIVES.fullmatch(option) or option.startswith("unused") else "VM.Config.Options"
    )


def check_rights(
    caller: Caller, vmid: int, pool: str | None, names: Iterable[str], values: Mapping[str, Any]
) -> None:
    """Check that the caller may set (or, without a value, delete) these options. PveFailure if not."""
    if caller.is_root:
        return
    for name in sorted(names):
        value = str(values.get(name, ""))
        if ONLY_ROOT.fullmatch(name) and not (name.startswith("usb") and value.startswith("spice")):
            raise PveFailure(f"only root can set '{name}' config")
        if name.startswith("serial") and value.startswith("/dev/"):
            raise PveFailure(f"only root can set '{name}' config for real devices")
        if name == "startup":
            access.check(caller, "/", ["Sys.Modify"])
            continue
        if name == "tags":
            continue  # checked separately: on the VM, not on its pool [ownA-019]
        priv = privilege(name)
        if DRIVES.fullmatch(name) and ("media=cdrom" in value or ":cloudinit" in value):
            access.check_guest(caller, vmid, pool, ["VM.Config.CDROM", "VM.Config.Disk"], any_of=True)
        elif priv == "VM.Config.Cloudinit":
            access.check_guest(caller, vmid, pool, [priv, "VM.Config.Network"], any_of=True)
        else:
            access.check_guest(caller, vmid, pool, [priv])
        if NETS.fullmatch(name) and value:
            parts = net_parts(value)
            if bridge := parts.get("bridge"):
                where = f"{NETWORK}/{bridge}" + (f"/{parts['tag']}" if parts.get("tag") else "")
                access.check(caller, where, ["SDN.Use"])


def check_tags(caller: Caller, vmid: int) -> None:
    access.check(caller, f"/vms/{vmid}", ["VM.Config.Options"])


def drive_parts(value: str) -> dict[str, str]:
    from ..api import schema

    method = schema.method("POST", "/nodes/{node}/qemu")
    definition = method.definition("scsi0") if method else None
    return validation.split((definition or {}).get("format", {}), value)


def net_parts(value: str) -> dict[str, str]:
    from ..api import schema

    method = schema.method("POST", "/nodes/{node}/qemu")
    definition = method.definition("net0") if method else None
    return validation.split((definition or {}).get("format", {}), value)


def check_storage(caller: Caller, vmid: int, values: Mapping[str, Any]) -> None:
    """Check the requested disks: syntax, storages, and the caller's rights. PveFailure if one is wrong."""
    for name in sorted(values):
        if not DRIVES.fullmatch(name):
            continue
        parts = drive_parts(str(values[name]))
        file, source = parts.get("file", ""), parts.get("import-from")
        if file in ("none", "cdrom") or not file:
            continue
        if file.startswith("/"):
            if not caller.is_root:
                raise NotAllowed("Only root can pass arbitrary filesystem paths")
            raise Unsupported(f"{name}: a disk outside of storages")
        store, rest = volumes.split(file)
        volumes.storage(store)
        if rest == "cloudinit":
            continue
        if re.fullmatch(r"\d+(\.\d+)?", rest):
            if source and float(rest) != 0:
                message = "'import-from' requires special syntax - use <storage ID>:0,import-from=<source>"
                raise BadParameters({name: message}, rc=255)
            if "images" not in volumes.content(store):
                raise BadParameters({"storage": f"storage '{store}' does not support vm images"})
            access.check(caller, f"/storage/{store}", ["Datastore.AllocateSpace"])
            if source:
                _check_source(caller, vmid, source)
            continue
        _check_volume(caller, vmid, file)


def _check_source(caller: Caller, vmid: int, source: str) -> None:
    if source.startswith("/"):
        if not caller.is_root:
            raise NotAllowed("Only root can pass arbitrary filesystem paths")
        return
    volumes.storage(volumes.split(source)[0])
    _check_volume(caller, vmid, source)


def _check_volume(caller: Caller, vmid: int, volid: str) -> None:
    """Check the rights on another guest's volume (its storage and guest), or on an import volume."""
    if caller.is_root:
        return
    name = volumes.split(volid)[0]
    owner = volumes.owner(volid)
    if owner == vmid:
        return
    if owner is not None:
        access.check(caller, f"/storage/{name}", ["Datastore.Audit"])
        access.check(caller, f"/vms/{owner}", ["VM.Config.Disk"])
    else:
        access.check(caller, f"/storage/{name}", ["Datastore.Audit", "Datastore.AllocateSpace"], any_of=True)


def normalized(name: str, value: str) -> str:
    """The value in the form in which PVE stores it."""
    if NETS.fullmatch(name):
        return _net(value)
    if name == "tags":
        return ";".join(sorted({tag.lower() for tag in re.split(r"[;,\s]+", value) if tag})) or " "
    if name == "vmgenid" and value == "1":
        return str(uuid.uuid4())
    if name == "smbios1" and "uuid=" not in value:
        return f"{value},uuid={uuid.uuid4()}" if value else f"uuid={uuid.uuid4()}"
    if name == "sshkeys":
        if not all(map(validation.is_public_key, validation.decode_keys(value))):
            raise PveFailure("SSH public key validation error")
        return value.rstrip()
    return value


def _net(value: str) -> str:
    parts = net_parts(value)
    model, mac = parts.pop("model"), parts.pop("macaddr", None)
    rest = "".join(f",{key}={parts[key]}" for key in sorted(parts))
    return f"{model}={(mac or new_mac()).upper()}{rest}"


def new_mac() -> str:
    return "BC:24:11:" + ":".join(f"{byte:02X}" for byte in os.urandom(3))


# -- disks


def create_drives(guest: Guest, values: dict[str, str], *, created: list[str]) -> None:
    """Put the disks of `values` into the configuration, creating and importing volumes; the ids of new ones
    are appended to `created`, for `remove_created` of a failed task."""
    for name in sorted(values):
        if DRIVES.fullmatch(name):
            guest.conf[name] = _create_drive(guest, name, values[name], created)


def _create_drive(guest: Guest, name: str, value: str, created: list[str]) -> str:
    parts = drive_parts(value)
    file = parts.pop("file", "")
    fmt, source = parts.pop("format", None), parts.pop("import-from", None)
    if file in ("none", "cdrom"):
        return _drive_text(file, {"media": "cdrom", **parts})
    store, rest = volumes.split(file)
    if rest == "cloudinit":
        return _create_cloudinit_drive(guest, name, store, fmt, parts, created)
    if re.fullmatch(r"\d+(\.\d+)?", rest):
        parts.pop("size", None)
        if name in ("efidisk0", "tpmstate0"):
            raise Unsupported(f"{name}: a disk for firmware")
        if source:
            volid, size = _import(guest.vmid, store, source, fmt, created)
        else:
            volid, size = _create_volume(guest.vmid, store, int(float(rest) * 1024**3), fmt or "raw", created)
        parts["size"] = volumes.short_size(size)
        text = _drive_text(volid, parts)
        output.line(f"{name}: successfully created disk '{text}'")
        return text
    place = volumes.path(file)
    if not place.exists():
        raise PveFailure(f"volume '{file}' does not exist")
    if volumes.kind(file) == "images":
        parts["size"] = volumes.short_size(disks.info(place)["size"])
    _remove_unused(guest, file)
    return _drive_text(file, parts)


def _remove_unused(guest: Guest, volid: str) -> None:
    """Delete the `unusedN` options that name the volume, which is in use now."""
    for key in [k for k in guest.conf if re.fullmatch(r"unused\d+", k) and guest.conf[k] == volid]:
        del guest.conf[key]


def _drive_text(file: str, parts: Mapping[str, str]) -> str:
    return file + "".join(f",{key}={parts[key]}" for key in sorted(parts))


def _create_volume(vmid: int, store: str, size: int, fmt: str, created: list[str]) -> tuple[str, int]:
    volid = f"{store}:{vmid}/{volumes.next_name(store, vmid, fmt)}"
    created.append(volid)
    volumes.allocate(volid, size, fmt)
    return volid, size


def _create_cloudinit_drive(
    guest: Guest, name: str, store: str, fmt: str | None, parts: dict[str, str], created: list[str]
) -> str:
    fmt = fmt or "qcow2"
    volid = f"{store}:{guest.vmid}/vm-{guest.vmid}-cloudinit.{fmt}"
    if not volumes.path(volid).exists():
        created.append(volid)
        volumes.allocate(volid, 4 * 1024**2, fmt)
    parts["media"] = "cdrom"
    text = _drive_text(volid, parts)
    output.line(f"{name}: successfully created disk '{text}'")
    return text


def _import(vmid: int, store: str, source: str, fmt: str | None, created: list[str]) -> tuple[str, int]:
    """Create a volume with the content of a file or volume [import-008, import-027]."""
    is_volume = not source.startswith("/")
    if is_volume:
        file = volumes.path(source)
        if not file.is_file():
            raise PveFailure(f"volume '{source}' does not exist")
        output.line(f"create full clone of drive ({source})")
        fmt = fmt or {"img": "raw"}.get(file.suffix[1:], volumes.file_format(file.name))
    else:
        file = paths.at(source)
        if not file.is_file():
            raise PveFailure(f"can't find file '{source}'")
    fmt = fmt or "raw"
    volid = f"{store}:{vmid}/{volumes.next_name(store, vmid, fmt)}"
    return volid, copy_in(file, volid, fmt, announce=is_volume, created=created)


def copy_in(file: Path, volid: str, fmt: str, *, announce: bool, created: list[str]) -> int:
    """Copy an image file into a new volume, with the lines that PVE prints; its virtual size in bytes."""
    size = -(-int(disks.info(file)["size"]) // 512) * 512
    target = volumes.path(volid)
    output.line(volumes.formatting(target, size, fmt))
    created.append(volid)
    try:
        disks.import_image(file, target, fmt, size)
    except disks.DiskError as e:
        raise PveFailure(str(e)) from e
    if announce:
        output.line(f"allocated target volume '{volid}'")
    volumes.transferred(size)
    return size


def remove_created(created: Iterable[str]) -> None:
    """Remove volumes that a failed task created."""
    import contextlib

    for volid in created:
        with contextlib.suppress(PveFailure, OSError):
            if volumes.path(volid).exists():
                disks.free(volumes.path(volid))
                folder = volumes.path(volid).parent
                if not any(folder.iterdir()):
                    folder.rmdir()


def volids(conf: Mapping[str, str]) -> list[str]:
    """The ids of the volumes that a configuration names, disks and unused ones."""
    ids = []
    for key, value in conf.items():
        if DRIVES.fullmatch(key) or re.fullmatch(r"unused\d+|vmstate", key):
            volid = value.split(",")[0].removeprefix("file=")
            if ":" in volid and volid not in ids:
                ids.append(volid)
    return ids


def default_boot(conf: Mapping[str, str]) -> str:
    """The boot order that create writes: first disk, CD-ROM, first network card; `" "` without any."""
    order = ("ide", "scsi", "virtio", "sata")

    def place(key: str) -> tuple[int, str]:
        match = re.match("|".join(order), key)
        return (order.index(match[0]) if match else len(order), key)

    drives = [key for key in sorted(conf, key=place) if DRIVES.fullmatch(key)]
    drives = [key for key in drives if not key.startswith(("efi", "tpm"))]
    hard = [key for key in drives if "media=cdrom" not in conf[key]]
    roms = [key for key in drives if key not in hard]
    nets = sorted((key for key in conf if NETS.fullmatch(key)), key=lambda key: int(key[3:]))
    devices = hard[:1] + roms[:1] + nets[:1]
    return f"order={';'.join(devices)}" if devices else " "
