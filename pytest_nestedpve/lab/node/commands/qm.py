# ruff: noqa: ARG001 (printers have one signature)
"""qm: VMs as a command. The exit code is the task's."""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from ..api import access, tree
from ..api.errors import PveFailure, Unsupported
from ..machine import disks
from ..state import guests, locks, paths, vm_options, volumes
from . import frame, tables
from .frame import BOOLEAN, TEXT, Command

Definition = Mapping[str, Any]
VM = "/nodes/{node}/qemu/{vmid}"
VMID_ONLY = ("vmid",)
VMID: Definition = {"type": "integer", "format": "pve-vmid", "minimum": 100, "maximum": 999999999}
REQUIRED: Definition = {"type": "string"}
REQUIRED_BOOLEAN: Definition = {"type": "boolean"}
STORAGE: Definition = {"type": "string", "format": "pve-storage-id"}
IMAGE: Definition = {"type": "string", "optional": 1, "enum": ["raw", "qcow2", "vmdk"]}
COUNT: Definition = {"type": "integer", "optional": 1, "minimum": 0}


def main() -> int:
    return frame.main_of(lambda argv: frame.dispatch("qm", COMMANDS, _read_keys(argv), aliases=ALIASES))


def _read_keys(argv: list[str]) -> list[str]:
    """Replace the file name after `--sshkeys` by the text of the file."""
    words = list(argv)
    for index, word in enumerate(words[:-1]):
        if word in ("--sshkeys", "-sshkeys", "--sshkey", "-sshkey") and words[index + 1]:
            try:
                text = paths.at(words[index + 1]).read_text()
            except OSError as e:
                raise PveFailure(f"can't open '{words[index + 1]}' - {e.strerror}", rc=2) from e
            words[index + 1] = quote(text, safe="")
    return words


def _list(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    if not rows:
        return
    print(f"{'VMID':>10} {'NAME':<20} {'STATUS':<10} {'MEM(MB)':<10} {'BOOTDISK(GB)':>12} {'PID':<10}")
    for row in sorted(rows, key=lambda row: int(row["vmid"])):
        status = "paused" if guests.paused(row["vmid"]) else row["status"]
        memory, disk = row["maxmem"] // 1024**2, row["maxdisk"] / 1024**3
        name, pid = row["name"], row.get("pid", 0)
        print(f"{row['vmid']:>10} {name:<20} {status:<10} {memory:<10} {disk:>12.2f} {pid:<10}")


def _status(status: dict[str, Any], values: dict[str, Any]) -> None:
    if str(values.get("verbose", "0")) != "1":
        text = status["qmpstatus"] if status["status"] == "running" else status["status"]
        print(f"status: {text}")
        return
    skip = ("cpu", "ha", "agent")
    for key in sorted(status):
        if key == "nics":
            print("nics:")
            for name, about in sorted(status[key].items()):
                print(f"\t{name}:")
                for what in sorted(about):
                    print(f"\t\t{what}: {about[what]}")
        elif key not in skip:
            print(f"{key}: {status[key]}")


def _config(config: dict[str, Any], values: dict[str, Any]) -> None:
    for key in sorted(config):
        if key != "digest":
            value = guests.encode(str(config[key])) if key == "description" else config[key]
            print(f"{key}: {value}")


def _pending(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    for row in sorted(rows, key=lambda row: str(row["key"])):
        if row["key"] == "digest":
            continue
        encode = guests.encode if row["key"] == "description" else str
        if "value" in row:
            print(f"{'del' if row.get('delete') else 'cur'} {row['key']}: {encode(str(row['value']))}")
        if "pending" in row:
            print(f"new {row['key']}: {encode(str(row['pending']))}")


def _snapshots(rows: list[dict[str, Any]], values: dict[str, Any]) -> None:
    by_parent: dict[str | None, list[dict[str, Any]]] = {}
    names = {row["name"] for row in rows}
    for row in rows:
        parent = row.get("parent") if row.get("parent") in names else None
        by_parent.setdefault(parent, []).append(row)
    deep = _depth(by_parent, None, 0)
    longest = max(len(row["name"]) for row in rows)

    def show(parent: str | None, depth: int) -> None:
        order = sorted(by_parent.get(parent, []), key=lambda row: row.get("snaptime", 1 << 62))
        for row in order:
            prefix = " " * depth + "`-> "
            width = max(27, longest + deep) - depth
            when = (
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["snaptime"]))
                if "snaptime" in row
                else ""
            )
            text = row["description"].split("\n")[0] or "no-description"
            print(f"{prefix}{row['name']:<{width}} {when:<23} {text}")
            show(row["name"], depth + 1)

    show(None, 0)


def _depth(by_parent: dict[str | None, list[dict[str, Any]]], parent: str | None, depth: int) -> int:
    return max([depth, *(_depth(by_parent, row["name"], depth + 1) for row in by_parent.get(parent, []))])


def _json(result: Any, values: dict[str, Any]) -> None:
    if result is not None:
        if isinstance(result, (dict, list)):
            sys.stdout.write(tables.render(result, tables.Style("json-pretty")))
        else:
            print(result)


def _agent(answer: dict[str, Any], values: dict[str, Any]) -> None:
    result = answer["result"]
    if result not in ({}, None):
        _json(result, values)


def _text(text: str, values: dict[str, Any]) -> None:
    print(text)


def _guest_exec(values: dict[str, Any]) -> int:
    vmid = str(values["vmid"])
    call: dict[str, Any] = {"command": values.get("command", [])}
    if str(values.get("pass-stdin", "0")) == "1":
        call["input-data"] = sys.stdin.read()
    node = paths.node()
    if not call["command"]:
        line = frame.usage("qm guest exec", COMMANDS["guest exec"])
        raise frame.Usage(f"400 not enough arguments\n{line}", rc=2)
    started = tree.call("POST", f"/nodes/{node}/qemu/{vmid}/agent/exec", call, access.ROOT)
    if str(values.get("synchronous", "1")) == "1":
        end = time.monotonic() + float(values.get("timeout", 30))
        while True:
            status = tree.call(
                "GET", f"/nodes/{node}/qemu/{vmid}/agent/exec-status", {"pid": started["pid"]}, access.ROOT
            )
            if status.get("exited"):
                _json(status, {})
                return 0
            if time.monotonic() >= end:
                print("timeout reached, returning pid", file=sys.stderr)
                break
            threading.Event().wait(0.2)
    _json(started, {})
    return 0


def _import(values: dict[str, Any]) -> int:
    vmid, source, storage = int(values["vmid"]), values["source"], values["storage"]
    guest = guests.load(vmid)
    is_volume = ":" in source and not source.startswith("/")
    file = volumes.path(source) if is_volume else paths.at(source)
    volumes.storage(storage)
    if "images" not in volumes.content(storage):
        raise PveFailure(f"storage {storage} does not support vm images")
    if not file.is_file():
        raise PveFailure(f"{source}: non-existent or non-regular file", rc=2)
    if "target-disk" in values:
        raise Unsupported("--target-disk")

    def work() -> None:
        from ..handlers.config import add_unused

        print(f"importing disk '{source}' to VM {vmid} ...", flush=True)
        created: list[str] = []
        try:
            with locks.guest(vmid):
                guest = guests.load(vmid)
                guest.check_lock()
                fmt = values.get("format", "raw")
                volid = f"{storage}:{vmid}/{volumes.next_name(storage, vmid, fmt)}"
                vm_options.copy_in(file, volid, fmt, announce=False, created=created)
                key = add_unused(guest, volid)
                guest.save()
        except BaseException:
            vm_options.remove_created(created)
            raise
        print(f"{key}: successfully imported disk '{volid}'", flush=True)

    guest.check_lock()
    return frame.print_outcome(tree.task(access.ROOT, "qmimport", vmid, work))


def _rescan(values: dict[str, Any]) -> int:
    if values.get("dryrun") == "1":
        raise Unsupported("--dryrun")
    chosen = [guests.load(values["vmid"])] if "vmid" in values else guests.every()
    print("rescan volumes...")
    from ..handlers.config import add_unused

    for guest in chosen:
        with locks.guest(guest.vmid):
            known = vm_options.volids(guest.conf)
            for name in volumes.storages():
                for row in volumes.listing(name, vmid=guest.vmid, of="images"):
                    if row["volid"] not in known and "cloudinit" not in row["volid"]:
                        key = add_unused(guest, row["volid"])
                        print(
                            f"VM {guest.vmid} add unreferenced volume '{row['volid']}' as '{key}' to config"
                        )
            for key, value in guest.drives().items():
                volid = value.split(",")[0]
                if ":" in volid and volumes.path(volid).exists() and "size=" in value:
                    size = volumes.short_size(disks.info(volumes.path(volid))["size"])
                    guest.conf[key] = ",".join(
                        p if not p.startswith("size=") else f"size={size}" for p in value.split(",")
                    )
            guest.save()
    return 0


def _unlock(values: dict[str, Any]) -> int:
    with locks.guest(int(values["vmid"])):
        guest = guests.load(values["vmid"])
        if guest.conf.pop("lock", None) is not None:
            guest.save()
    return 0


def _wait(values: dict[str, Any]) -> int:
    vmid = int(values["vmid"])
    guests.find(vmid, rc=2)
    end = time.monotonic() + float(values.get("timeout", 1e9))
    while guests.running(vmid):
        if time.monotonic() >= end:
            raise PveFailure("wait failed - got timeout")
        threading.Event().wait(0.5)
    return 0


def _unsupported(
    name: str, args: tuple[str, ...], *, verb: str = "", path: str = "", **options: Definition
) -> Command:
    """A command that the lab does not have; its parameters and its VM are checked first."""

    def body(values: dict[str, Any]) -> int:
        if "vmid" in values and name != "import":
            guest = guests.load(values["vmid"])
            if name == "sendkey" and not guests.running(guest.vmid):
                raise PveFailure(f"VM {guest.vmid} not running")  # [power-027]
            if name == "terminal" and not any(re.fullmatch(r"serial\d", key) for key in guest.conf):
                raise PveFailure("unable to find a serial interface")  # [power-072]
        raise Unsupported(f"qm {name}")

    return replace(
        _command(body, args, **options), verb=verb, path=path, section=0 if name == "sendkey" else 1
    )


def _command(
    body: Callable[[dict[str, Any]], int], args: tuple[str, ...] = VMID_ONLY, **options: Definition
) -> Command:
    """A command without a method of the API; `_` in the names of options is replaced by `-`."""
    known = {arg: VMID if arg == "vmid" else REQUIRED for arg in args}
    known |= {name.replace("_", "-"): definition for name, definition in options.items()}
    return Command("", "", args, extra=known, body=body, section=1)


def _monitor(values: dict[str, Any]) -> int:
    vmid = values["vmid"]
    guests.load(vmid)
    print(f"Entering QEMU Monitor for VM {vmid} - type 'help' for help", flush=True)
    for line in sys.stdin:
        command = line.strip()
        print(f"qm> {command}", file=sys.stderr, flush=True)
        if command in ("quit", "q"):
            break
        if not command:
            continue
        try:
            call = {"command": command}
            answer = tree.call("POST", f"/nodes/{paths.node()}/qemu/{vmid}/monitor", call, access.ROOT)
            print(answer, end="", flush=True)
        except PveFailure as e:
            print(f"ERROR: {e.text}", file=sys.stderr, flush=True)
    return 0


def _passwd(values: dict[str, Any]) -> int:
    words = sys.stdin.read().splitlines()
    call = {
        "username": values["username"],
        "password": words[0] if words else "",
        "crypted": values.get("crypted", "0"),
    }
    path = f"/nodes/{paths.node()}/qemu/{values['vmid']}/agent/set-user-password"
    tree.call("POST", path, call, access.ROOT)
    return 0


def _cleanup(values: dict[str, Any]) -> int:
    return 0  # called by qmeventd, which the lab does not have


_DISK = ("vmid", "source", "storage")
COMMANDS: dict[str, Command] = {
    "cloudinit dump": Command("GET", VM + "/cloudinit/dump", ("vmid", "type"), show=_text),
    "cloudinit pending": Command("GET", VM + "/cloudinit", VMID_ONLY, show=_pending),
    "cloudinit update": Command("PUT", VM + "/cloudinit", VMID_ONLY),
    "disk move": Command("POST", VM + "/move_disk", ("vmid", "disk", "storage")),
    "disk resize": Command("PUT", VM + "/resize", ("vmid", "disk", "size"), mirror=False),
    "disk unlink": Command("PUT", VM + "/unlink", VMID_ONLY),
    "disk import": _command(_import, _DISK, storage=STORAGE, format=IMAGE, target_disk=TEXT),
    "disk rescan": _command(_rescan, (), dryrun=BOOLEAN, vmid={**VMID, "optional": 1}),
    "guest cmd": Command("POST", VM + "/agent", ("vmid", "command"), show=_agent),
    "guest exec-status": Command("GET", VM + "/agent/exec-status", ("vmid", "pid"), show=_json),
    "guest passwd": _command(_passwd, ("vmid", "username"), crypted=BOOLEAN),
    "guest exec": replace(
        _command(_guest_exec, timeout=COUNT, synchronous=BOOLEAN, pass_stdin=BOOLEAN), rest="command"
    ),
    "clone": Command("POST", VM + "/clone", ("vmid", "newid")),
    "config": Command("GET", VM + "/config", VMID_ONLY, show=_config),
    "create": Command("POST", "/nodes/{node}/qemu", VMID_ONLY),
    "delsnapshot": Command("DELETE", VM + "/snapshot/{snapname}", ("vmid", "snapname")),
    "destroy": Command("DELETE", VM, VMID_ONLY),
    "list": Command("GET", "/nodes/{node}/qemu", show=_list),
    "listsnapshot": Command("GET", VM + "/snapshot", VMID_ONLY, show=_snapshots),
    "migrate": Command("POST", VM + "/migrate", ("vmid", "target")),
    "pending": Command("GET", VM + "/pending", VMID_ONLY, show=_pending),
    "reboot": Command("POST", VM + "/status/reboot", VMID_ONLY),
    "reset": Command("POST", VM + "/status/reset", VMID_ONLY),
    "resume": Command("POST", VM + "/status/resume", VMID_ONLY),
    "rollback": Command("POST", VM + "/snapshot/{snapname}/rollback", ("vmid", "snapname")),
    "sendkey": _unsupported("sendkey", ("vmid", "key"), verb="PUT", path=VM + "/sendkey"),
    "set": Command("PUT", VM + "/config", VMID_ONLY, rc=255),
    "shutdown": Command("POST", VM + "/status/shutdown", VMID_ONLY),
    "snapshot": Command("POST", VM + "/snapshot", ("vmid", "snapname")),
    "start": Command("POST", VM + "/status/start", VMID_ONLY),
    "stop": Command("POST", VM + "/status/stop", VMID_ONLY),
    "suspend": Command("POST", VM + "/status/suspend", VMID_ONLY),
    "template": Command("POST", VM + "/template", VMID_ONLY, mirror=False),
    "cleanup": _command(
        _cleanup,
        ("vmid", "clean-shutdown", "guest-requested"),
        clean_shutdown=REQUIRED_BOOLEAN,
        guest_requested=REQUIRED_BOOLEAN,
    ),
    "enroll-efi-keys": _unsupported("enroll-efi-keys", VMID_ONLY),
    "import": _unsupported(
        "import", ("vmid", "source"), verb="POST", path="/nodes/{node}/qemu", storage=STORAGE
    ),
    "importovf": _unsupported(
        "importovf", ("vmid", "manifest", "storage"), storage=STORAGE, dryrun=BOOLEAN, format=IMAGE
    ),
    "monitor": _command(_monitor),
    "mtunnel": _unsupported("mtunnel", ()),
    "nbdstop": _unsupported("nbdstop", VMID_ONLY),
    "remote-migrate": _unsupported(
        "remote-migrate",
        ("vmid", "target-vmid", "target-endpoint"),
        verb="POST",
        path=VM + "/remote_migrate",
        target_vmid={**VMID, "optional": 1},
    ),
    "showcmd": _unsupported("showcmd", VMID_ONLY, pretty=BOOLEAN, snapshot=TEXT),
    "status": Command(
        "GET", VM + "/status/current", VMID_ONLY, show=_status, extra={"verbose": BOOLEAN}, section=1
    ),
    "terminal": _unsupported("terminal", VMID_ONLY, escape=TEXT, iface=TEXT),
    "unlock": _command(_unlock),
    "vncproxy": _unsupported("vncproxy", VMID_ONLY),
    "wait": _command(_wait, timeout={**COUNT, "minimum": 1}),
}
ALIASES = {
    "agent": "guest cmd",
    "importdisk": "disk import",
    "rescan": "disk rescan",
    "move_disk": "disk move",
    "move-disk": "disk move",
    "resize": "disk resize",
    "unlink": "disk unlink",
}

if __name__ == "__main__":
    sys.exit(main())
