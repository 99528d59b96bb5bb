"""The rules of the in-memory PVE host: what guests, pools, volumes and tasks do to each other.

Works on one JSON-like dict; words, exit codes and side effects are those of recordings of PVE 9.2.11.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from typing import Any
from urllib.parse import quote

from pytest_nestedpve.pve.errors import ApiError, classify

State = dict[str, Any]
BROADCAST = 10.0
"""Seconds until pvestatd has told everybody about a new guest (facts: /cluster/resources)."""

DISK = re.compile(r"(?:scsi|virtio|sata|ide)\d+\Z|efidisk0\Z|tpmstate0\Z")
LOCKS = "backup, clone, create, migrate, rollback, snapshot, snapshot-delete, suspending, suspended"


def new_state(node: str) -> State:
    """A node with one directory storage, a bridge and a Debian image in `import`."""
    return {
        "node": node,
        "offset": 0.0,
        "pid": 4096,
        "vms": {},
        "ghosts": {},
        "pools": {},
        "tokens": [],
        "acl": [],
        "tasks": [],
        "delays": {},
        "ha": [],
        "backup": [],
        "replication": [],
        "files": {},
        "commands": [],
        "faults": [],
        # Volumes that a destroy leaves: with a warning and for good, with a warning, without a word.
        "sticky": [],
        "busy": [],
        "forgotten": [],
        "agent_answers": True,
        "storages": {
            "local": {
                "type": "dir",
                "path": "/var/lib/vz",
                "content": "vztmpl,iso,backup,rootdir,snippets,images,import",
                "total": 270553174016,
                "avail": 76549996544,
            }
        },
        "bridges": {"vmbr0": "10.77.7.10/24"},
        "volumes": {
            "local:import/debian-13-genericcloud-amd64.qcow2": {
                "content": "import",
                "format": "qcow2",
                "size": 3 << 30,
                "vmid": None,
            }
        },
    }


def fail(text: str, rc: int = 255, call: str = "") -> ApiError:
    """The typed error for PVE's words, as a transport would raise it."""
    return classify(text, rc, call)


class Model:
    """One state and what can be done to it. Every method works at the host's clock, `now`."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.node: str = state["node"]

    def site(self, node: str) -> State:
        """What is a node's own: files, storages, bridges, volumes. Of the first node: the state itself."""
        return self.state if node == self.node else dict_of(self.state["others"][node])

    def join(self, node: str, **changed: Any) -> State:
        """A second node, with the same storages and bridges; `shared` storages have their volumes here."""
        copied = {key: dict(self.state[key]) for key in ("files", "storages", "bridges")}
        volumes = {k: v for k, v in self.state["volumes"].items() if v["content"] == "import"}
        number = len(self.state.setdefault("others", {})) + 12
        address = {"ip": f"10.77.7.{number}", "online": True, "ssh": True}
        memory = {"maxmem": 64 << 30, "mem": 16 << 30}
        self.state["others"][node] = {**copied, "volumes": volumes, **address, **memory, **changed}
        return dict_of(self.state["others"][node])

    def volumes(self, node: str, volid: str = "") -> State:
        """The volumes that a node sees; those of one storage, if `volid` begins with it."""
        site = self.site(node)
        shared = site["storages"].get(volid.partition(":")[0], {}).get("shared")
        return dict_of(self.state["volumes"] if shared else site["volumes"])

    def migrate(self, vmid: int, target: str) -> None:
        """Move a VM with its local volumes, in no time."""
        vm = self.state["vms"][str(vmid)]
        for volid in volids(vm["config"]):
            here, there = self.volumes(vm["node"], volid), self.volumes(target, volid)
            if here is not there and volid in here:
                there[volid] = here.pop(volid)
        vm["node"] = target

    @property
    def now(self) -> float:
        return time.time() + float(self.state["offset"])

    # -- guests ---------------------------------------------------------------------------------

    def vm(self, node: str, vmid: int, *, wanted: str = "config") -> State:
        found = self.state["vms"].get(str(vmid))
        if found is None or found["kind"] != "qemu" or found["node"] != node:
            if wanted == "find":
                raise fail(f"unable to find configuration file for VM {vmid} on node '{node}'")
            raise fail(f"Configuration file 'nodes/{node}/qemu-server/{vmid}.conf' does not exist", 2)
        return dict_of(found)

    def config(self, node: str, vmid: int) -> State:
        vm = self.vm(node, vmid)
        lock = vm["config"].get("lock")
        if lock == "destroyed":
            raise fail(
                "400 Result verification failed\n"
                f"lock: value 'destroyed' does not have a value in the enumeration '{LOCKS}'"
            )
        shown = dict(vm["config"], digest=self.digest(vmid))
        if "cipassword" in shown:
            shown["cipassword"] = "**********"
        return shown

    def text(self, vmid: int) -> str:
        """The configuration file."""
        vm = self.state["vms"][str(vmid)]
        config = vm["config"]
        lines = []
        if "description" in config:
            described = str(config["description"]).split("\n")
            lines = [f"#{quote(line, safe=' {}:,.-_/')}" for line in described]
        lines += [f"{key}: {config[key]}" for key in sorted(config) if key != "description"]
        for name, snapshot in sorted(vm.get("snapshots", {}).items()):
            lines += ["", f"[{name}]", *(f"{key}: {snapshot[key]}" for key in sorted(snapshot))]
        return "\n".join(lines) + "\n"

    def digest(self, vmid: int) -> str:
        return hashlib.sha1(self.text(vmid).encode()).hexdigest()

    def check_lock(self, vm: State, skip: bool = False) -> None:
        lock = vm["config"].get("lock")
        if lock and not skip:
            raise fail(f"VM is locked ({lock})")

    def pool_of(self, vmid: int) -> str | None:
        for name, pool in self.state["pools"].items():
            if vmid in pool["vms"]:
                return str(name)
        return None

    def begin_create(self, node: str, params: State) -> int:
        """What the API does before it forks: the id is taken, the configuration says `lock: create`."""
        vmid = int(params["vmid"])
        existing = self.state["vms"].get(str(vmid))
        if existing is not None:
            kind = "VM" if existing["kind"] == "qemu" else "CT"
            where = existing["node"]
            raise fail(f"unable to create VM {vmid} - {kind} {vmid} already exists on node '{where}'")
        pool = params.get("pool")
        if pool is not None and pool not in self.state["pools"]:
            raise fail(f"403 Permission check failed (pool '{pool}' does not exist)", 2)
        self.state["vms"][str(vmid)] = {
            "kind": "qemu",
            "node": node,
            "config": {"lock": "create"},
            "snapshots": {},
            "running": False,
            "paused": False,
            "born": self.now,
        }
        return vmid

    def end_create(self, vmid: int, params: State) -> None:
        vm = self.state["vms"].get(str(vmid))
        if vm is None:
            return
        config: State = {
            "boot": " ",
            "meta": f"creation-qemu=10.0.13,ctime={int(self.now)}",
            "smbios1": f"uuid={uuid.uuid4()}",
            "vmgenid": str(uuid.uuid4()),
        }
        vm["config"] = config
        try:
            for key, value in params.items():
                if key not in ("vmid", "pool", "start", "storage"):
                    self.set_key(vmid, vm, key, value)
        except ApiError as e:
            del self.state["vms"][str(vmid)]
            raise fail(f"unable to create VM {vmid} - {e.text}") from e
        if params.get("pool"):
            self.state["pools"][params["pool"]]["vms"].append(vmid)

    def set_key(self, vmid: int, vm: State, key: str, value: Any) -> None:
        """One option of a configuration, volumes allocated as PVE does."""
        config = vm["config"]
        text = str(value)
        if DISK.match(key):
            text = self.allocate(vmid, text)
        elif key.startswith("net") and re.match(r"(?:virtio|e1000|vmxnet3)(?:,|\Z)", text):
            model, _, rest = text.partition(",")
            seed = hashlib.sha1(f"{vmid}{key}{self.now}".encode()).hexdigest()
            mac = "BC:24:11:" + ":".join(seed[i : i + 2] for i in (0, 2, 4)).upper()
            text = f"{model}={mac}" + (f",{rest}" if rest else "")
        elif key == "tags":
            text = ";".join(sorted({tag.lower() for tag in re.split(r"[;, ]", text) if tag}))
        config[key] = int(text) if key in ("cores", "sockets", "kvm", "onboot", "protection") else text

    def allocate(self, vmid: int, text: str) -> str:
        match = re.match(r"([A-Za-z][\w-]*):(\d+|cloudinit)(?:,(.*))?\Z", text)
        if not match:
            return text
        storage, size, rest = match[1], match[2], match[3] or ""
        node = str(self.state["vms"][str(vmid)]["node"])
        here, entry = self.volumes(node, text), self.site(node)["storages"].get(storage)
        if entry is None:
            raise fail(f"storage '{storage}' does not exist", 2)
        if "images" not in entry["content"].split(","):
            raise fail(f"storage '{storage}' does not support vm images")
        options = dict(part.partition("=")[::2] for part in rest.split(",") if part)
        source = options.pop("import-from", None)
        form = options.pop("format", None)
        if size == "cloudinit":
            volid = f"{storage}:{vmid}/vm-{vmid}-cloudinit.qcow2"
            here[volid] = volume("images", "qcow2", 4 << 20, vmid)
            return f"{volid},media=cdrom"
        bytes_ = int(size) << 30
        if source is not None:
            if source not in self.volumes(node, source):
                raise fail(f"cannot import from '{source}' - volume '{source}' does not exist")
            bytes_ = self.volumes(node, source)[source]["size"]
            form = form or self.volumes(node, source)[source]["format"]
        form = form or "raw"
        number = 0
        while (volid := f"{storage}:{vmid}/vm-{vmid}-disk-{number}.{form}") in here:
            number += 1
        here[volid] = volume("images", form, bytes_, vmid)
        extra = "".join(f",{key}={value}" for key, value in options.items())
        return f"{volid}{extra},size={max(1, bytes_ >> 30)}G"

    def update(self, node: str, vmid: int, params: State) -> None:
        """PUT or POST config."""
        vm = self.vm(node, vmid)
        params = dict(params)
        digest, skip = params.pop("digest", None), str(params.pop("skiplock", 0)) == "1"
        if digest is not None and digest != self.digest(vmid):
            raise fail("checksum mismatch (file change by other user?)")
        self.check_lock(vm, skip)
        for key in str(params.pop("delete", "")).replace(",", " ").split():
            vm["config"].pop(key, None)
        for key, value in params.items():
            self.set_key(vmid, vm, key, value)

    def begin_destroy(self, node: str, vmid: int, params: State) -> None:
        vm = self.vm(node, vmid)
        if vm["config"].get("protection"):
            raise fail(f"can't remove VM {vmid} - protection mode enabled")
        if vm["running"]:
            raise fail(f"VM {vmid} is running - destroy failed", 25)
        if f"vm:{vmid}" in self.state["ha"] and not params.get("purge"):
            raise fail(f"unable to remove VM {vmid} - used in HA resources and purge parameter not set.")

    def end_destroy(self, vmid: int, params: State) -> str:
        vm = self.state["vms"].get(str(vmid))
        if vm is None:
            raise fail(f"Configuration file 'nodes/{self.node}/qemu-server/{vmid}.conf' does not exist", 2)
        self.check_lock(vm, str(params.get("skiplock", 0)) == "1")
        if vm["running"]:
            raise fail(f"VM {vmid} is running - destroy failed", 25)
        for volid in volids(vm["config"]):
            if any(other.startswith(f"{volid}/") for other in self.state["volumes"]):
                raise fail(f"base volume '{volid}' is still in use by linked cloned")
        warnings = self.drop_volumes(vm)
        self.forget(vmid)
        return f"WARNINGS: {warnings}" if warnings else "OK"

    def drop_volumes(self, vm: State) -> int:
        warnings = 0
        for volid in volids(vm["config"]):
            if volid in (*self.state["sticky"], *self.state["busy"]):
                warnings += 1
            elif volid not in self.state["forgotten"]:
                self.volumes(vm["node"], volid).pop(volid, None)
        return warnings

    def forget(self, vmid: int) -> None:
        """The configuration is gone, and with it membership; the last broadcast still knows the name."""
        vm = self.state["vms"].pop(str(vmid))
        name = vm["config"].get("name")
        if name:
            self.state["ghosts"][str(vmid)] = {"name": name, "until": self.now + BROADCAST}
        for pool in self.state["pools"].values():
            pool["vms"] = [each for each in pool["vms"] if each != vmid]

    def start(self, node: str, vmid: int) -> None:
        vm = self.vm(node, vmid)
        self.check_lock(vm)
        if vm["config"].get("template"):
            raise fail("you can't start a vm if it's a template")
        if vm["running"]:
            raise fail(f"VM {vmid} already running")
        for part in str(vm["config"].get("cicustom", "")).split(","):
            volid = part.partition("=")[2]
            if volid and self.path_of(volid) not in self.site(node)["files"]:
                raise fail(f"volume '{volid}' does not exist")
        for key, value in vm["config"].items():
            bridge = re.search(r"bridge=([\w.-]+)", str(value)) if key.startswith("net") else None
            if bridge and bridge[1] not in self.site(node)["bridges"]:
                raise fail(f"bridge '{bridge[1]}' does not exist")
        vm["running"], vm["paused"] = True, False

    def stop(self, node: str, vmid: int) -> None:
        vm = self.vm(node, vmid, wanted="find")
        if vm["running"]:
            self.check_lock(vm)
        vm["running"] = vm["paused"] = False

    def path_of(self, volid: str) -> str:
        storage, _, name = volid.partition(":")
        return f"{self.state['storages'].get(storage, {}).get('path', '/nowhere')}/{name}"

    # -- clones, templates, snapshots ------------------------------------------------------------

    def clone(self, node: str, vmid: int, params: State) -> None:
        new, vm = int(params["newid"]), self.vm(node, vmid)
        if str(new) in self.state["vms"]:
            raise fail(f"unable to create VM {new}: config file already exists", 2)
        snapshot, target = params.get("snapname"), params.get("target", node)
        config = dict(vm["snapshots"][snapshot] if snapshot else vm["config"])
        if snapshot:
            config.pop("description", None)
        full = str(params.get("full", 0 if vm["config"].get("template") else 1)) == "1"
        for key, value in list(config.items()):
            if DISK.match(key) and volid_of(value):
                old = str(volid_of(value))
                source = self.volumes(node, old)[old]
                if target != node and not self.site(node)["storages"][old.split(":")[0]].get("shared"):
                    raise fail(f"can't clone VM to node '{target}' (VM uses local storage)")
                copy = f"{old.split(':')[0]}:{new}/vm-{new}-disk-0.{source['format']}"
                copy = copy if full else f"{old}/{new}/vm-{new}-disk-0.qcow2"
                self.volumes(target, copy)[copy] = volume("images", source["format"], source["size"], new)
                config[key] = str(value).replace(old, copy, 1)
            elif key.startswith("net"):
                config[key] = re.sub(r"(?:[0-9A-F]{2}:){5}[0-9A-F]{2}", "BC:24:11:00:00:01", str(value))
        config.update(smbios1=f"uuid={uuid.uuid4()}", vmgenid=str(uuid.uuid4()))
        config.update({key: params[key] for key in ("name", "description") if key in params})
        for key in ("template", "lock", "parent", "snaptime"):
            config.pop(key, None)
        self.state["vms"][str(new)] = dict(
            vm, node=target, config=config, snapshots={}, running=False, paused=False, born=self.now
        )
        if params.get("pool"):
            self.state["pools"][params["pool"]]["vms"].append(new)

    def template(self, node: str, vmid: int) -> None:
        vm = self.vm(node, vmid)
        if vm["config"].get("template"):
            raise fail("you can't convert a template to a template")
        if vm["snapshots"]:
            raise fail("unable to create template, because VM contains snapshots")
        for key, value in list(vm["config"].items()):
            volid = volid_of(value) if DISK.match(key) else None
            here = self.volumes(node, str(volid))
            if volid in here:
                base = str(volid).replace("/vm-", "/base-")
                here[base] = here.pop(volid)
                vm["config"][key] = str(value).replace(str(volid), base, 1)
        vm["config"]["template"] = 1

    def snapshot(self, node: str, vmid: int, name: str) -> None:
        vm = self.vm(node, vmid)
        self.check_lock(vm)
        if name in vm["snapshots"]:
            raise fail(f"snapshot name '{name}' already used")
        vm["snapshots"][name] = dict(vm["config"], snaptime=int(self.now))

    def rollback(self, node: str, vmid: int, name: str, start: bool) -> None:
        vm = self.vm(node, vmid)
        if name not in vm["snapshots"]:
            raise fail(f"snapshot '{name}' does not exist")
        if self.state.get("newest_only") and name != list(vm["snapshots"])[-1]:
            raise fail(f"can't rollback, '{name}' is not most recent snapshot on 'tank:vm-{vmid}-disk-0'")
        keep = {key: vm["config"][key] for key in ("description",) if key in vm["config"]}
        vm["config"] = {k: v for k, v in vm["snapshots"][name].items() if k != "snaptime"} | keep
        vm["running"] = start

    # -- tasks ----------------------------------------------------------------------------------

    def fork(self, kind: str, subject: str, effect: State) -> str:
        """A task; its effect comes when its time is up (`settle`), at once without a delay."""
        self.state["pid"] += 1
        start = self.now
        node = effect.get("node", self.node)
        upid = f"UPID:{node}:{self.state['pid']:08X}:{self.state['pid'] * 16:08X}:{int(start):08X}"
        upid += f":{kind}:{subject}:root@pam:"
        delay = float(self.state["delays"].get(kind, self.state["delays"].get("*", 0.0)))
        task = {"upid": upid, "type": kind, "id": subject, "start": start, "due": start + delay}
        self.state["tasks"].append(dict(task, end=None, exit=None, effect=effect, log=[]))
        self.settle()
        return upid

    def settle(self) -> None:
        """Apply the effects of all tasks that are due."""
        for task in self.state["tasks"]:
            if task["end"] is None and task["due"] <= self.now:
                task["end"] = max(task["due"], task["start"])
                task["exit"] = self.apply(task["effect"])
                task["effect"] = None

    def apply(self, effect: State) -> str:
        do, vmid, params = effect["do"], int(effect.get("vmid") or 0), effect.get("params", {})
        node = effect.get("node", self.node)
        try:
            match do:
                case "create":
                    self.end_create(vmid, params)
                case "destroy":
                    self.vm(node, vmid)
                    return self.end_destroy(vmid, params)
                case "start":
                    self.start(node, vmid)
                case "stop":
                    self.stop(node, vmid)
                case "config":
                    self.update(node, vmid, params)
                case "clone":
                    self.clone(node, vmid, params)
                case "template":
                    self.template(node, vmid)
                case "snapshot":
                    self.snapshot(node, vmid, params["snapname"])
                case "rollback":
                    self.rollback(node, vmid, params["snapname"], bool(params.get("start")))
                case "delsnapshot":
                    self.vm(node, vmid)["snapshots"].pop(params["snapname"], None)
                case "imgdel":
                    self.volumes(node, params["volid"]).pop(params["volid"], None)
                case "download":
                    self.state["volumes"][params["volid"]] = volume("import", "qcow2", 1 << 30, None)
                case "fail":
                    return str(params["text"])
        except ApiError as e:
            return e.text
        return "OK"

    def kill(self, task: State) -> None:
        """The worker is killed: what it left is what the recordings of killed workers show."""
        vm = self.state["vms"].get(task["id"])
        if task["type"] == "qmdestroy" and vm is not None:
            self.drop_volumes(vm)
            vm["config"] = {"lock": "destroyed"}
        elif task["type"] == "qmsnapshot" and vm is not None:
            vm["config"]["lock"] = "snapshot"
        task.update(end=self.now, exit="unexpected status", effect=None)

    def abort(self, task: State) -> None:
        """The task is stopped through the API: it cleans up."""
        if task["type"] == "qmcreate":
            self.state["vms"].pop(task["id"], None)
        task.update(end=self.now, exit="received interrupt", effect=None)


def dict_of(value: Any) -> State:
    assert isinstance(value, dict)
    return value


def volume(content: str, form: str, size: int, vmid: int | None) -> State:
    return {"content": content, "format": form, "size": size, "vmid": vmid}


def volid_of(value: Any) -> str | None:
    """The volume that a disk option names."""
    first = str(value).split(",", 1)[0]
    return first if re.match(r"[A-Za-z][\w-]*:\S", first) else None


def volids(config: State) -> list[str]:
    return [str(volid_of(v)) for k, v in config.items() if DISK.match(k) and volid_of(v)]
