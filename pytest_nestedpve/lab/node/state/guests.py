"""A guest's configuration: the stored values, the .conf file, and the answers of the API."""

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
            unset = sorted(key for key, value in self.pending.items() if value is None)
            parts.append("[PENDING]\n" + (f"delete: {','.join(unset)}\n" if unset else "") + _section(lines))
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
    """One line in PVE's encoding: everything but printable ASCII is escaped, and `%` and `:` too."""
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
    """Whether the VM is on this node."""
    body = store().get("qemu", vmid)
    return body is not None and body["node"] == paths.node()


def load(vmid: int | str, *, rc: int = 2) -> Guest:
    """The VM of this node; PveFailure "Configuration file … does not exist" for no VM or another node's."""
    body = store().get("qemu", vmid)
    if body is None or body["node"] != paths.node():
        raise no_guest(paths.node(), vmid, rc=rc)
    return _read(vmid, body)


def find(vmid: int | str, *, rc: int = 255) -> Guest:
    """`load` with the error message of stop, shutdown, clone, reset, …"""
    from ..api.errors import no_guest_found

    if not here(vmid):
        raise no_guest_found(paths.node(), vmid, rc=rc)
    return load(vmid)


def everywhere() -> list[Guest]:
    """The VMs of all nodes."""
    loaded = [_read(vmid, body) for vmid, body in store().all("qemu").items()]
    return sorted(loaded, key=lambda guest: guest.vmid)


def every() -> list[Guest]:
    """The VMs of this node."""
    return [guest for guest in everywhere() if guest.node == paths.node()]


def containers(node: str = "*") -> dict[int, dict[str, str]]:
    """Containers of all nodes or one, with their `node`. No command creates them, but a configuration file
    /etc/pve/lxc/ID.conf occupies the id and is listed."""
    from . import cluster_fs

    configurations = {}
    for file in sorted(cluster_fs.fs().glob(f"nodes/{node}/lxc/*.conf")):
        if file.stem.isdigit():
            lines = (line.partition(":") for line in file.read_text().splitlines() if ":" in line)
            options = {key.strip(): value.strip() for key, _, value in lines}
            configurations[int(file.stem)] = options | {"node": file.parent.parent.name}
    return configurations


def remove(vmid: int, node: str | None = None) -> None:
    """Delete the configuration of a VM on `node`, by default this node."""
    from . import cluster_fs

    with store().change() as db:
        db.drop("qemu", vmid)
        db.drop("runtime", vmid)
    cluster_fs.hide(f"nodes/{node or paths.node()}/qemu-server/{vmid}.conf")


# -- the state of the machine


def running(vmid: int) -> bool:
    return machine.status(vmid) == "running"


def paused(vmid: int) -> bool:
    return running(vmid) and bool((store().get("runtime", vmid) or {}).get("paused"))


def apply_pending(guest: Guest) -> Guest:
    """Turn pending values of a stopped guest into current ones."""
    if guest.pending and not running(guest.vmid):
        for key, value in guest.pending.items():
            if value is None:
                guest.conf.pop(key, None)
            else:
                guest.conf[key] = value
        guest.pending = {}
        guest.save()
    return guest


# -- answers of the API


def typed(key: str, value: str) -> Any:
    """The value with its JSON type in the API: numbers for integers and booleans, else strings."""
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
    """The configured memory in MiB."""
    text = conf.get("memory", "512").removeprefix("current=")
    return int(text) if text.isdigit() else 512


def boot_drive(guest: Guest) -> str | None:
    """The option of the drive to boot from: the first disk in the boot order."""
    order = boot_order(guest.conf.get("boot", ""))
    for key in order:
        value = guest.conf.get(key, "")
        if DRIVES.fullmatch(key) and value and "media=cdrom" not in value:
            return key
    return None


def boot_order(boot: str) -> list[str]:
    match = re.search(r"order=([^,]*)", boot)
    return [part for part in match[1].split(";") if part] if match else []


def drive_bytes(value: str) -> int:
    match = re.search(r"size=([\d.]+[KMGT]?)", value)
    return (validation.size(match[1]) or 0) if match else 0


def status(guest: Guest, *, full: bool = True) -> dict[str, Any]:
    """The answer of `status/current` (`full`), or a row of `/nodes/N/qemu`."""
    is_running = running(guest.vmid)
    drive = boot_drive(guest)
    cores = int(guest.conf.get("cores", 1)) * int(guest.conf.get("sockets", 1))
    answer: dict[str, Any] = {
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
        "status": "running" if is_running else "stopped",
        "uptime": 0,
        "vmid": guest.vmid,
    }
    if guest.lock:
        answer["lock"] = guest.lock
    if guest.conf.get("tags"):
        answer["tags"] = guest.conf["tags"]
    if guest.template:
        answer["template"] = 1
    if guest.conf.get("serial0"):
        answer["serial"] = 1
    if full:
        answer["qmpstatus"] = ("paused" if paused(guest.vmid) else "running") if is_running else "stopped"
    if not is_running:
        answer.pop("serial", None)
        return answer
    started = machine.started_at(guest.vmid)
    answer["uptime"] = max(0, int(clock.now() - started)) if started else 0
    answer["mem"] = answer["memhost"] = min(answer["maxmem"], 96 * 1024**2)
    if pid := machine.pid(guest.vmid):
        answer["pid"] = pid
    if full:
        for what in ("cpufull", "cpusome", "iofull", "iosome", "memoryfull", "memorysome"):
            answer[f"pressure{what}"] = 0
        nets = sorted(key for key in guest.conf if NETS.fullmatch(key))
        if nets:
            answer["nics"] = {f"tap{guest.vmid}i{key[3:]}": {"netin": 0, "netout": 0} for key in nets}
    return answer


def copy_of(values: dict[str, str]) -> dict[str, str]:
    return copy.deepcopy(values)


def decode(text: str) -> str:
    return unquote(text)
