"""A PVE host for the test process: the lab's own stand-in of PVE in a directory, and verbs that arrange it.

Several processes and threads may share one host: all its data is in its directory.

    nodes/NAME/   the root directory of a node
    cluster/      data common to all nodes: the state, /etc/pve, the fault rules
    shared/       storages common to all nodes
    calls         the calls of the API, a line for each; `commands`: those of logins
    login.json    properties of the login: `uid`, `installed`, `sshd`
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import standin_machines
from standin_connections import StandinApi, StandinSsh

from pytest_nestedpve.lab.node.api import faults
from pytest_nestedpve.lab.node.api.errors import PveFailure
from pytest_nestedpve.lab.node.handlers import pools, users
from pytest_nestedpve.lab.node.machine import disks
from pytest_nestedpve.lab.node.machine.alive import holding
from pytest_nestedpve.lab.node.state import (
    broadcast,
    clock,
    cluster_fs,
    guests,
    members,
    paths,
    reported,
    tasks,
    vm_options,
    volumes,
)
from pytest_nestedpve.lab.node.state.store import store
from pytest_nestedpve.pve.host import PveHost

GIB = 1 << 30
IMAGE_SIZE = 3 << 20  # small, so that a host is quickly copied
IMAGE = "local:import/debian-13-genericcloud-amd64.qcow2"
NESTED = "/sys/module/kvm_intel/parameters/nested"
CONTENT = "vztmpl,iso,backup,rootdir,snippets,images,import"
ADDRESS = "10.77.7.10"
# A host with free memory and space: results do not depend on the machine that runs the tests.
MEASURED: dict[str, Any] = {
    "address": ADDRESS,
    "memory": {"total": 64 * GIB, "available": 48 * GIB, "free": 40 * GIB, "used": 16 * GIB},
    "cpuinfo": {"cpus": 16},
    "node": {"maxmem": 64 * GIB, "mem": 16 * GIB},
    "storage": {"local": {"total": 252 * GIB, "used": 181 * GIB, "avail": 71 * GIB}},
}
_READS_BROADCAST = re.compile(r"/cluster/resources|/nodes|/pools(?:/.*)?")
_CREATES_VM = re.compile(r"/nodes/[^/]+/qemu(?:/\d+/clone)?")


class StandinHost:
    """The host in the directory `path`; created at first use: a node that can nest, with a Debian image."""

    def __init__(self, path: Path, node: str = "father") -> None:
        self.path = path
        self.name = node
        self._before: list[tuple[str, re.Pattern[str], Callable[[], None]]] = []
        self._changes: list[tuple[str, re.Pattern[str], Callable[[Any], Any]]] = []
        with holding(path / ".lock"):
            if not (path / "cluster").exists():
                self._make_node(node)
                self.volume(IMAGE, IMAGE_SIZE)

    # -- connections

    def connect(self) -> PveHost:
        """The host as an object of the package."""
        return PveHost(self.name, StandinSsh(self), StandinApi(self), self.name)

    @contextlib.contextmanager
    def on(self, node: str | None = None) -> Iterator[None]:
        """Calls of the stand-ins in this block are calls on that node, by default the first one."""
        name = node or self.name
        with paths.placed(paths.Place(self.path / "nodes" / name, name)):
            yield

    def note_call(self, verb: str, path: str, values: Mapping[str, Any]) -> None:
        """A call of the API arrives."""
        self._append("calls", f"{verb} {path} {' '.join(sorted(values))}".strip())
        for rule in [rule for rule in self._before if rule[0] == verb and rule[1].fullmatch(path)][:1]:
            self._before.remove(rule)
            rule[2]()
        if verb == "POST" and _CREATES_VM.fullmatch(path):
            with self.on():
                _replace(self.path / "created", str(clock.now()))
        elif verb == "GET" and _READS_BROADCAST.fullmatch(path):
            self._broadcast_if_due()

    def note_command(self, text: str) -> None:
        """A command of a login arrives."""
        self._append("commands", json.dumps(text))

    def calls(self) -> list[str]:
        """The calls of the API so far: verb, path, names of parameters."""
        return self._lines("calls")

    def commands(self) -> list[str]:
        """The commands of logins so far, and `put FILE` for each file written."""
        return [json.loads(line) for line in self._lines("commands")]

    def forget_calls(self) -> None:
        for name in ("calls", "commands"):
            (self.path / name).unlink(missing_ok=True)

    def _append(self, name: str, line: str) -> None:
        with (self.path / name).open("a") as file:
            file.write(line + "\n")

    def _lines(self, name: str) -> list[str]:
        file = self.path / name
        return file.read_text().splitlines() if file.exists() else []

    def login(self, **changed: Any) -> dict[str, Any]:
        """The login's properties after changes: `uid`, `installed` (PVE's commands), `sshd` (its output)."""
        file = self.path / "login.json"
        known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        if changed:
            known |= changed
            _replace(file, json.dumps(known))
        return known

    def close(self) -> None:
        """End the workers of tasks that still run."""
        with self.on():
            for task in tasks.everywhere():
                if task.running and task.pstart:
                    _kill(task)
            store().close()

    # -- failures

    def fault(
        self,
        method: str | None = None,
        path: str | None = None,
        *,
        do: str = "fail",
        text: str = "",
        times: int = 1,
        seconds: float = 0.0,
        **on: Any,
    ) -> None:
        """Add a fault rule (`lab/node/api/faults.py`): for calls, or by `task`, `volume`, `vmid`."""
        conditions = {"method": method, "path": path, **on}
        rule = {"on": {name: value for name, value in conditions.items() if value is not None}, "do": do}
        with self.on():
            faults.add(faults.parse({**rule, "text": text, "times": times, "seconds": seconds}))

    def faults(self) -> list[dict[str, Any]]:
        """The fault rules that still apply."""
        with self.on():
            return [faults.as_object(rule) for rule in faults.rules()]

    def clear_faults(self) -> None:
        with self.on():
            faults.clear()

    def before(self, method: str, path: str, action: Callable[[], None]) -> None:
        """Call `action` at the next call whose path matches the regular expression; in this process."""
        self._before.append((method, re.compile(path), action))

    def change_answers(self, method: str, path: str, change: Callable[[Any], Any]) -> None:
        """Put `change(answer)` in place of each answer of calls that match; for this object alone."""
        self._changes.append((method, re.compile(path), change))

    def changed_answer(self, verb: str, path: str, answer: Any) -> Any:
        """The answer of a call, with the changes of `change_answers`."""
        for method, pattern, change in self._changes:
            if method == verb and pattern.fullmatch(path):
                answer = change(answer)
        return answer

    def slow(self, **seconds: float) -> None:
        """Have tasks of these types take so long, until `clear_faults`; `all` is for every type."""
        for kind, duration in seconds.items():
            self.fault(task="*" if kind == "all" else kind, do="delay", seconds=duration, times=1000)

    def kill_task(self, upid: str | None = None) -> None:
        """Kill a task's worker, by default the newest one's; the leftovers are those of the recordings."""
        with self.on():
            running = [task for task in tasks.everywhere() if task.running and upid in (None, task.upid)]
        task = running[0]
        with self.on(task.node):
            _kill(task)
            if task.type in ("qmdestroy", "qmsnapshot") and guests.here(task.id):
                guest = guests.load(task.id)
                if task.type == "qmdestroy":
                    for volid in vm_options.volids(guest.conf):
                        volumes.free(volid)
                    guest.conf = {}
                guest.conf["lock"] = "destroyed" if task.type == "qmdestroy" else "snapshot"
                guest.save()
            tasks.find(task.upid)  # ends it with "unexpected status"

    # -- guests

    def vms(self) -> list[int]:
        """The ids of all VMs."""
        with self.on():
            return [guest.vmid for guest in guests.everywhere()]

    def guest(self, vmid: int) -> guests.Guest:
        """The VM's record; a change of it takes effect after `save`, inside of `on`."""
        with self.on():
            return next(guest for guest in guests.everywhere() if guest.vmid == vmid)

    def config(self, vmid: int) -> dict[str, str]:
        """The values of a VM's configuration file."""
        return self.guest(vmid).conf

    def configuration(self, vmid: int) -> str:
        """The configuration file of a VM, for comparisons."""
        return self.guest(vmid).text()

    def create_vm(self, vmid: int, node: str | None = None, **options: Any) -> None:
        """A VM of somebody else, through the API."""
        self.connect().api.post(f"/nodes/{node or self.name}/qemu", vmid=vmid, **options)

    def edit_vm(self, vmid: int, **options: Any) -> None:
        """Set values in a VM's configuration past the API, None deletes one."""
        guest = self.guest(vmid)
        guest.conf |= {name: str(value) for name, value in options.items() if value is not None}
        for name in [name for name, value in options.items() if value is None]:
            guest.conf.pop(name, None)
        self._save(guest)

    def replace_config(self, vmid: int, conf: Mapping[str, Any]) -> None:
        """Give a VM this configuration and no other value; its volumes are as they were."""
        guest = self.guest(vmid)
        guest.conf = {name: str(value) for name, value in conf.items()}
        self._save(guest)

    def _save(self, guest: guests.Guest) -> None:
        with self.on(guest.node):
            guest.save()

    def is_running(self, vmid: int) -> bool:
        with self.on(self.guest(vmid).node):
            return guests.running(vmid)

    def set_running(self, vmid: int, running: bool) -> None:
        """Switch a machine on or off past the API, without a task."""
        with self.on(self.guest(vmid).node):
            file = standin_machines.of_place().file(vmid)
            file.write_text(str(clock.now())) if running else file.unlink(missing_ok=True)

    def answer_agent(self, vmid: int, **answers: Any) -> None:
        """Set the guest agent's answers, by command with `_` for `-`."""
        with self.on(self.guest(vmid).node):
            file = standin_machines.of_place().place / f"{vmid}.agent"
        file.write_text(json.dumps({name.replace("_", "-"): value for name, value in answers.items()}))

    def drop_snapshots(self, vmid: int, prefix: str = "") -> None:
        """Delete the VM's snapshots whose names begin so, with their data on the storage."""
        guest = self.guest(vmid)
        with self.on(guest.node):
            for name in [name for name in guest.snapshots if name.startswith(prefix)]:
                for volid in vm_options.volids(guest.snapshots.pop(name)):
                    with contextlib.suppress(disks.DiskError):
                        disks.delete_snapshot(volumes.path(volid), name)
            guest.save()

    def clear(self) -> None:
        """All VMs with their volumes and all pools disappear."""
        for vmid in self.vms():
            guest = self.guest(vmid)
            self.forget_vm(vmid)
            for volid in vm_options.volids(guest.conf):
                self.remove_volume(volid, guest.node)
        with self.on():
            for name in store().all("pool"):
                store().drop("pool", name)
            users.render()

    def forget_vm(self, vmid: int) -> None:
        """The VM's configuration disappears, and with it its pool membership; the volumes are left over."""
        self.set_running(vmid, False)
        node = self.guest(vmid).node
        with self.on(node):
            pools.remove_guest(vmid)
            guests.remove(vmid)

    def migrate(self, vmid: int, target: str) -> None:
        """Move a VM with its local volumes, at once and without a task."""
        guest = self.guest(vmid)
        source = guest.node
        for volid in vm_options.volids(guest.conf):
            with self.on(source):
                old, local = volumes.path(volid), not volumes.shared(volumes.split(volid)[0])
            with self.on(target):
                new = volumes.path(volid)
            if local and old.exists():
                new.parent.mkdir(parents=True, exist_ok=True)
                disks.rename(old, new)
        machine = Path("machines") / str(vmid)
        if (self._root(source) / machine).exists():
            (self._root(target) / "machines").mkdir(exist_ok=True)
            (self._root(source) / machine).rename(self._root(target) / machine)
        with self.on(target):
            cluster_fs.hide(f"nodes/{source}/qemu-server/{vmid}.conf")
            guest.node = target
            guest.save()

    def container(self, vmid: int, pool: str | None = None, **conf: Any) -> None:
        """A container, as far as the stand-ins know one."""
        with self.on():
            text = "".join(f"{name}: {value}\n" for name, value in conf.items())
            cluster_fs.show(f"nodes/{self.name}/lxc/{vmid}.conf", text)
            if pool is not None:
                pools.add_guest(pool, vmid)

    def containers(self) -> list[int]:
        with self.on():
            return sorted(guests.containers())

    # -- pools, tokens, jobs

    def pools(self) -> dict[str, tuple[str, list[int]]]:
        """Comment and VM ids of all pools."""
        with self.on():
            bodies = store().all("pool")
            return {name: (body.get("comment", ""), store().members(name)) for name, body in bodies.items()}

    def pool_of(self, vmid: int) -> str | None:
        with self.on():
            return store().pool_of(vmid)

    def set_pool(self, name: str, comment: str = "", vms: Iterable[int] | None = None) -> None:
        """Create or change a pool past the API; `vms` may be ids that no VM has, None keeps the members."""
        with self.on():
            with store().change() as db:
                db.put("pool", name, {"storages": [], **(db.get("pool", name) or {}), "comment": comment})
                if vms is not None:
                    db.run("DELETE FROM member WHERE pool=?", name)
                for vmid in vms or ():
                    db.run("INSERT OR REPLACE INTO member VALUES (?, ?)", vmid, name)
            users.render()

    def token(self, name: str, **options: Any) -> None:
        """A token of root."""
        self.connect().api.post(f"/access/users/root@pam/token/{name}", **options)

    def tokens(self) -> list[str]:
        """The names of root's tokens."""
        return [row["tokenid"] for row in self.connect().api.get("/access/users/root@pam/token")]

    def manage_by_ha(self, vmid: int) -> None:
        self.connect().api.post("/cluster/ha/resources", sid=f"vm:{vmid}")

    def backup_job(self, name: str, **body: Any) -> None:
        """A backup job with exactly these fields."""
        self._put("job", name, body)

    def replication_job(self, name: str, **body: Any) -> None:
        """A replication job with exactly these fields."""
        self._put("replication", name, body)

    def _put(self, kind: str, key: str, body: dict[str, Any]) -> None:
        with self.on():
            store().put(kind, key, body)

    # -- storages, volumes, files

    def storage(self, name: str, kind: str = "dir", content: str = CONTENT, **options: Any) -> None:
        """Define a storage, or define it anew. A `dir` is at /srv/NAME unless there is a `path`."""
        body = {"type": kind, "content": content, **options}
        if kind == "dir" and name != "local":
            body.setdefault("path", f"/srv/{name}")
        elif name == "local":
            body.setdefault("path", "/var/lib/vz")
        for node in self.nodes():
            with self.on(node):
                store().put("storage", name, body)
                self._make_folder(name, shared=str(body.get("shared", 0)) == "1")
            self.report(node, storage={name: MEASURED["storage"]["local"]})

    def _make_folder(self, name: str, *, shared: bool) -> None:
        try:
            place = volumes.folder(name)
        except PveFailure:  # the storage is disabled, or restricted to other nodes
            return
        if shared and not place.exists():
            (self.path / "shared" / name).mkdir(parents=True, exist_ok=True)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(self.path / "shared" / name, place.parent))
        for folder in ("images", "import", "snippets", "template/iso"):
            (place / folder).mkdir(parents=True, exist_ok=True)

    def volumes(self, node: str | None = None) -> list[str]:
        """The ids of all volumes that a node has, snippets too."""
        with self.on(node):
            return sorted(row["volid"] for name in volumes.storages() for row in volumes.listing(name))

    def volume(self, volid: str, size: int = GIB, node: str | None = None) -> None:
        """A volume, empty, or a linked clone of its base; an image or a snippet is a file of that size."""
        base, _, clone = volid.rpartition("/vm-")[0].rpartition("/")
        with self.on(node):
            file = volumes.path(volid)
            file.parent.mkdir(parents=True, exist_ok=True)
            if clone and "/base-" in base:
                disks.linked_clone(volumes.path(base), file)
            elif volumes.kind(volid) == "images":
                disks.create(file, size, volumes.file_format(file.name))
            else:
                with file.open("wb") as opened:
                    opened.truncate(size)

    def remove_volume(self, volid: str, node: str | None = None) -> None:
        with self.on(node):
            disks.free(volumes.path(volid))

    def file(self, path: str, node: str | None = None) -> Path:
        """A file of a node, to be read, written or removed."""
        return self._root(node or self.name) / path.lstrip("/")

    # -- tasks

    def tasks(self, kind: str | None = None) -> list[tasks.Task]:
        """All tasks, the newest first."""
        with self.on():
            return [task for task in tasks.everywhere() if kind in (None, task.type)]

    def add_task(self, kind: str, ident: str | int, status: str | None = "OK", **fields: Any) -> str:
        """Add a task that starts now; its UPID. `status` None: a running task."""
        with self.on():
            now = int(fields.get("starttime", clock.now()))
            number = len(tasks.everywhere()) + 0xA000
            node, user = fields.get("node", self.name), fields.get("user", "root@pam")
            upid = f"UPID:{node}:{number:08X}:{number << 4:08X}:{now:08X}:{kind}:{ident}:{user}:"
            end = None if status is None else fields.get("endtime", now)
            row = (upid, node, os.getpid(), 0, now, kind, str(ident), user, end, status)
            store().run("INSERT INTO task VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", *row)
        return upid

    def edit_task(self, upid: str, /, **fields: Any) -> None:
        """Change fields of a task in the list: `status`, `starttime`, `endtime`, `id`, `type`."""
        with self.on(), store().change() as db:
            for name, value in fields.items():
                db.run(f"UPDATE task SET {name}=? WHERE upid=?", value, upid)

    def shift_task(self, upid: str, seconds: float) -> str:
        """Set a task's start later by `seconds`. Returns the new UPID, which contains the start."""
        parts = upid.split(":")
        start = int(parts[4], 16) + int(seconds)
        shifted = ":".join([*parts[:4], f"{start:08X}", *parts[5:]])
        with self.on(parts[1]):
            if (log := tasks.log_file(upid)).exists():
                new = tasks.log_file(shifted)
                new.parent.mkdir(parents=True, exist_ok=True)
                log.rename(new)
        self.edit_task(upid, starttime=start, upid=shifted)
        return shifted

    # -- nodes, clocks, measured values

    def nodes(self) -> list[str]:
        """All nodes, the first one first."""
        names = sorted(folder.name for folder in (self.path / "nodes").iterdir())
        return sorted(names, key=lambda name: name != self.name)

    def join(self, node: str, *, online: bool = True) -> None:
        """A further node of the cluster `lab`, with the same storages and bridges as the first one."""
        self._make_node(node)
        others = {name: f"10.77.7.{number}" for number, name in enumerate(self.nodes()[1:], start=12)}
        addresses = {self.name: ADDRESS, **others}
        cluster_dir = self.path / "cluster"
        (cluster_dir / "fs/corosync.conf").write_text(members.config("lab", addresses))
        for name in self.nodes():
            self.set_online(name, True)
        self.set_online(node, online)
        for storage in self._definitions():
            with self.on(node):
                self._make_folder(storage, shared=volumes.shared(storage))
            self.report(node, storage=dict.fromkeys(self._definitions(), MEASURED["storage"]["local"]))
        self.volume(IMAGE, IMAGE_SIZE, node)
        with self.on(node):
            broadcast.tick()

    def _definitions(self) -> list[str]:
        with self.on():
            return list(volumes.storages())

    def set_online(self, node: str, online: bool) -> None:
        """Set whether the node runs."""
        file = self.path / "cluster/online" / node
        file.parent.mkdir(exist_ok=True)
        file.touch() if online else file.unlink(missing_ok=True)

    def is_online(self, node: str) -> bool:
        return node == self.name or (self.path / "cluster/online" / node).exists()

    def set_logins(self, node: str, accepted: bool) -> None:
        """Set whether SSH between the nodes reaches this node."""
        others = {*self.login().get("refused", [])} - {node}
        self.login(refused=sorted(others if accepted else others | {node}))

    def accepts_logins(self, node: str) -> bool:
        return self.is_online(node) and node not in self.login().get("refused", [])

    def node_at(self, address: str) -> str:
        """The node with this address."""
        with self.on():
            return next(member.name for member in members.every() if member.address == address)

    def report(self, node: str | None = None, /, **changed: Any) -> None:
        """Have a node report these values in place of measured ones (`lab/node/state/reported.py`)."""
        with self.on(node):
            known = dict(reported.everything())
            for name, value in changed.items():
                known[name] = {**known.get(name, {}), **value} if isinstance(value, Mapping) else value
            _replace(reported.file(), json.dumps(known))

    def now(self) -> float:
        """The host's clock, epoch seconds."""
        with self.on():
            return clock.now()

    def advance(self, seconds: float) -> None:
        """Set the clocks of all nodes ahead."""
        for node in self.nodes():
            with self.on(node):
                offset = reported.clock_offset() + seconds
            self.report(node, clock_offset_s=offset)

    def broadcast(self) -> None:
        """Update /cluster/resources, as PVE does within ten seconds after a change."""
        for node in filter(self.is_online, self.nodes()):
            with self.on(node):
                broadcast.tick()

    def _broadcast_if_due(self) -> None:
        with self.on():
            last_broadcast = store().get("broadcast", self.name) or {"time": 0}
            created = self.path / "created"
            last = max(last_broadcast["time"], float(created.read_text()) if created.exists() else 0.0)
            due = not 0 <= clock.now() - last < broadcast.CYCLE
        if due:
            self.broadcast()

    def bridges(self, node: str | None = None, /, **addresses: str) -> None:
        """The bridges of a node, by their names, each with its address or with none."""
        self._interfaces(node or self.name, addresses)

    def _interfaces(self, node: str, addresses: Mapping[str, str]) -> None:
        root = self._root(node)
        shutil.rmtree(root / "sys/class/net", ignore_errors=True)
        text = "auto lo\niface lo inet loopback\n\nauto eno1\niface eno1 inet manual\n"
        for name, address in addresses.items():
            (root / "sys/class/net" / name / "bridge").mkdir(parents=True)
            how = f"static\n\taddress {address}" if address else "manual"
            text += f"\nauto {name}\niface {name} inet {how}\n\tbridge-ports none\n"
        (root / "etc/network").mkdir(exist_ok=True)
        (root / "etc/network/interfaces").write_text(text)

    # -- the whole

    def state(self) -> dict[str, Any]:
        """Objects that a run can change, for comparisons: guests, pools, tokens, volumes, files."""
        with self.on():
            state: dict[str, Any] = {"guests": {guest.vmid: guest.text() for guest in guests.everywhere()}}
            kinds = ("token", "storage", "ha", "job", "replication")
            state |= {kind: store().all(kind) for kind in kinds}
            state["acl"] = sorted(store().rows("SELECT path, kind, who, role FROM acl"))
        state |= {"pools": self.pools(), "containers": self.containers()}
        state["running"] = [vmid for vmid in self.vms() if self.is_running(vmid)]
        state["volumes"] = {node: self.volumes(node) for node in self.nodes()}
        return state

    def save(self, copy: Path) -> None:
        """Copy the whole host, for `restore`."""
        with self.on():
            store().close()
        shutil.copytree(self.path, copy, symlinks=True)

    def restore(self, copy: Path) -> None:
        """Restore the copy of `save`."""
        with self.on():
            store().close()
        shutil.rmtree(self.path)
        shutil.copytree(copy, self.path, symlinks=True)

    # -- creation of a node

    def _root(self, node: str) -> Path:
        return self.path / "nodes" / node

    def _make_node(self, node: str) -> None:
        root, cluster = self._root(node), self.path / "cluster"
        for folder in ("dev", "run", "etc", "var/lib/vz", "var/log", "sys/module/kvm_intel/parameters"):
            (root / folder).mkdir(parents=True)
        first = not cluster.exists()
        (cluster / "fs").mkdir(parents=True, exist_ok=True)
        # Relative: a host can be copied.
        (root / "var/lib/pve-cluster").symlink_to("../../../../cluster")
        (root / "etc/pve").symlink_to("../../../cluster/fs")
        (root / "dev/kvm").touch()
        (root / NESTED.lstrip("/")).write_text("Y\n")
        (root / "run/pve-cluster.pid").write_text("1\n")
        (root / "etc/resolv.conf").write_text("nameserver 10.77.7.1\n")
        (root / "etc/nestedpve-node.json").write_text(json.dumps(MEASURED))
        self._interfaces(node, {"vmbr0": f"{ADDRESS}/24"})
        with self.on(node):
            if first:
                store().put("storage", "local", {"type": "dir", "path": "/var/lib/vz", "content": CONTENT})
                users.render()
                broadcast.tick()
            (cluster / f"fs/nodes/{node}/qemu-server").mkdir(parents=True, exist_ok=True)
            self._make_folder("local", shared=False)


def _replace(file: Path, text: str) -> None:
    temporary = file.with_name(f"{file.name}.{os.getpid()}.{threading.get_ident()}")
    temporary.write_text(text)
    temporary.replace(file)


def _kill(task: tasks.Task) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(task.pid, signal.SIGKILL)
    for _ in range(500):
        if tasks.process_start(task.pid) != task.pstart:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"the worker of {task.upid} does not end")
