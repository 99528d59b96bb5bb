"""A guest's configuration: what is kept, what its .conf file looks like, what PVE shows of it."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from ..api import schema, validation
from ..api.errors import PveFailure, no_guest
from ..machine import machine
from . import clock, paths
from .store import store

DRIVES = re.compile(rf"({validation.DISK}|efidisk0|tpmstate0)")
NETS = re.compile(r"net\d+")
RUNTIME_ONLY = ("digest", "snapstate")


@dataclass
class Guest:
    """A VM's configuration: current values, pending ones, snapshots by name. Values are PVE's strings."""

    vmid: int
    conf: dict[str, str] = field(default_factory=dict)
    pending: dict[str, str | None] = field(default_factory=dict)  # None: to be deleted
    snapshots: dict[str, dict[str, str]] = field(default_factory=dict)
    node: str = field(default_factory=paths.node)

    @property
    def name(self) -> str:
        return self.conf.get("name") or f"VM {self.vmid}"

    @property
    def lock(self) -> str | None:
        return self.conf.get("lock")

    @property
    def template(self) -> bool:
        return self.conf.get("template") == "1"

    def save(self) -> None:
        body = {"conf": self.conf, "pending": self.pending, "snapshots": self.snapshots, "node": self.node}
        store().put("qemu", self.vmid, body)
        _render(self)

    def drives(self, *, unused: bool = False) -> dict[str, str]:
        """Disk options in order."""
        keys = [k for k in self.conf if DRIVES.fullmatch(k) or (unused and re.fullmatch(r"unused\d+", k))]
        return {key: self.conf[key] for key in sorted(keys)}

    def text(self) -> str:
        """The .conf file."""
        parts = [_section(self.conf)]
        if self.pending:
            lines = {key: value for key, value in self.pending.items() if value is not None}
            gone = sorted(key for key, value in self.pending.items() if value is None)
            parts.append("[PENDING]\n" + (f"delete: {','.join(gone)}\n" if gone else "") + _section(lines))
        for name in sorted(self.snapshots):
            parts.append(f"[{name}]\n" + _section(self.snapshots[name]))
        return "\n".join(parts)

    def digest(self) -> str:
        return hashlib.sha1(self.text().encode()).hexdigest()

    def check_digest(self, digest: str | None) -> None:
        if digest and digest != self.digest():
            raise PveFailure("checksum mismatch (file change by other user?)")

    def check_lock(self, *, skip: bool = False, but: Iterable[str] = ()) -> None:
        if self.lock and not skip and self.lock not in but:
            raise PveFailure(f"VM is locked ({self.lock})")


def encode(text: str) -> str:
    """Text as PVE writes it into one line: all but printable ASCII without `%` and `:` escaped."""
    return quote(text, safe="".join(chr(c) for c in range(32, 127) if chr(c) not in "%:"))


def _section(values: dict[str, str] | dict[str, str | None]) -> str:
    lines = []
    description = values.get("description")
    if description:
        lines += ["#" + encode(line) for line in description.rstrip("\n").split("\n")]
    lines += [f"{key}: {values[key]}" for key in sorted(values) if key not in ("description", *RUNTIME_ONLY)]
    return "".join(line + "\n" for line in lines)


def _render(guest: Guest) -> None:
    from . import cluster_fs

    cluster_fs.show(f"nodes/{guest.node}/qemu-server/{guest.vmid}.conf", guest.text())


def _read(vmid: int | str, body: dict[str, Any]) -> Guest:
    return Guest(int(vmid), body["conf"], body["pending"], body["snapshots"], body["node"])


def here(vmid: int | str) -> bool:
    """Whether this node has such a VM."""
    body = store().get("qemu", vmid)
    return body is not None and body["node"] == paths.node()


def load(vmid: int | str, *, rc: int = 2) -> Guest:
    """The guest, or PVE's "Configuration file … does not exist", which another node's VM is told too."""
    body = store().get("qemu", vmid)
    if body is None or body["node"] != paths.node():
        raise no_guest(paths.node(), vmid, rc=rc)
    return _read(vmid, body)


def find(vmid: int | str, *, rc: int = 255) -> Guest:
    """The same with the words of stop, shutdown, clone, reset, …"""
    from ..api.errors import no_guest_found

    if not here(vmid):
        raise no_guest_found(paths.node(), vmid, rc=rc)
    return load(vmid)


def everywhere() -> list[Guest]:
    """The VMs of all nodes."""
    found = [_read(vmid, body) for vmid, body in store().all("qemu").items()]
    return sorted(found, key=lambda guest: guest.vmid)


def every() -> list[Guest]:
    """This node's."""
    return [guest for guest in everywhere() if guest.node == paths.node()]


def containers(node: str = "*") -> dict[int, dict[str, str]]:
    """Containers, of all nodes or one, each with its `node`: there are no commands for them, but a
    configuration that somebody writes to /etc/pve/lxc/ID.conf takes the id and stands in the lists."""
    from . import cluster_fs

    found = {}
    for file in sorted(cluster_fs.fs().glob(f"nodes/{node}/lxc/*.conf")):
        if file.stem.isdigit():
            lines = (line.partition(":") for line in file.read_text().splitlines() if ":" in line)
            known = {key.strip(): value.strip() for key, _, value in lines}
            found[int(file.stem)] = known | {"node": file.parent.parent.name}
    return found


def remove(vmid: int, node: str | None = None) -> None:
    """Forget a VM that is on `node`, by default this one."""
    from . import cluster_fs

    with store().change() as db:
        db.drop("qemu", vmid)
        db.drop("runtime", vmid)
    cluster_fs.hide(f"nodes/{node or paths.node()}/qemu-server/{vmid}.conf")


# -- running or not


def running(vmid: int) -> bool:
    return machine.status(vmid) == "running"


def paused(vmid: int) -> bool:
    return running(vmid) and bool((store().get("runtime", vmid) or {}).get("paused"))


def settle(guest: Guest) -> Guest:
    """Pending values of a guest that is off are its values."""
    if guest.pending and not running(guest.vmid):
        for key, value in guest.pending.items():
            if value is None:
                guest.conf.pop(key, None)
            else:
                guest.conf[key] = value
        guest.pending = {}
        guest.save()
    return guest


# -- what calls show of it


def typed(key: str, value: str) -> Any:
    """The value with the JSON type the API gives it: numbers for integers and booleans, else strings."""
    method = schema.method("POST", "/nodes/{node}/qemu")
    definition = method.definition(key) if method else None
    if definition and definition.get("type") in ("integer", "boolean") and re.fullmatch(r"-?\d+", value):
        return int(value)
    if definition and definition.get("type") == "number":
        return float(value) if "." in value else int(value)
    if key in ("snaptime", "vmstate") and value.isdigit():
        return int(value)
    return value


def masked(key: str, value: str) -> str:
    return "**********" if key == "cipassword" else value


def memory(conf: dict[str, str]) -> int:
    """MiB."""
    text = conf.get("memory", "512").removeprefix("current=")
    return int(text) if text.isdigit() else 512


def boot_drive(guest: Guest) -> str | None:
    """The drive that is booted from: the first in the boot order that is a disk."""
    order = checks_order(guest.conf.get("boot", ""))
    for key in order:
        value = guest.conf.get(key, "")
        if DRIVES.fullmatch(key) and value and "media=cdrom" not in value:
            return key
    return None


def checks_order(boot: str) -> list[str]:
    match = re.search(r"order=([^,]*)", boot)
    return [part for part in match[1].split(";") if part] if match else []


def drive_bytes(value: str) -> int:
    match = re.search(r"size=([\d.]+[KMGT]?)", value)
    return (validation.size(match[1]) or 0) if match else 0


def status(guest: Guest, *, full: bool = True) -> dict[str, Any]:
    """`status/current` and a row of `/nodes/N/qemu`."""
    on = running(guest.vmid)
    drive = boot_drive(guest)
    cores = int(guest.conf.get("cores", 1)) * int(guest.conf.get("sockets", 1))
    now: dict[str, Any] = {
        "cpu": 0,
        "cpus": int(guest.conf.get("vcpus", cores)),
        "disk": 0,
        "maxdisk": drive_bytes(guest.conf[drive]) if drive else 0,
        "maxmem": memory(guest.conf) * 1024**2,
        "mem": 0,
        "memhost": 0,
        "name": guest.name,
        "netin": 0,
        "netout": 0,
        "status": "running" if on else "stopped",
        "uptime": 0,
        "vmid": guest.vmid,
    }
    if guest.lock:
        now["lock"] = guest.lock
    if guest.conf.get("tags"):
        now["tags"] = guest.conf["tags"]
    if guest.template:
        now["template"] = 1
    if guest.conf.get("serial0"):
        now["serial"] = 1
    if full:
        now["qmpstatus"] = ("paused" if paused(guest.vmid) else "running") if on else "stopped"
    if not on:
        now.pop("serial", None)
        return now
    started = machine.started_at(guest.vmid)
    now["uptime"] = max(0, int(clock.now() - started)) if started else 0
    now["mem"] = now["memhost"] = min(now["maxmem"], 96 * 1024**2)
    if pid := machine.pid(guest.vmid):
        now["pid"] = pid
    if full:
        for what in ("cpufull", "cpusome", "iofull", "iosome", "memoryfull", "memorysome"):
            now[f"pressure{what}"] = 0
        nets = sorted(key for key in guest.conf if NETS.fullmatch(key))
        if nets:
            now["nics"] = {f"tap{guest.vmid}i{key[3:]}": {"netin": 0, "netout": 0} for key in nets}
    return now


def clone_of(values: dict[str, str]) -> dict[str, str]:
    return copy.deepcopy(values)


def decode(text: str) -> str:
    return unquote(text)
