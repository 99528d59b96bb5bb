# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/migrate: a VM that is off goes to another node, its local disks are copied."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Iterator
from typing import IO, Any

from ..api import forward
from ..api.access import Caller
from ..api.errors import BadParameters, PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import disks, machine
from ..state import cluster_fs, guests, locks, members, output, paths, vm_options, volumes
from ..state.guests import Guest
from ..state.members import Member
from ..state.store import store

HERE = "/nodes/{node}/qemu/{vmid}/migrate"


@api("GET", HERE)
def conditions(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    found = [{"volid": volid, "cdrom": 0} for volid in _local(guest)]
    return {"local_disks": found, "local_resources": [], "running": int(guests.running(guest.vmid))}


@api("POST", HERE)
def migrate(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, target = int(params["vmid"]), params["target"]
    if target == paths.node():
        raise BadParameters({"target": "target is local node."}, rc=255)
    member = members.find(target)
    if member is None:
        # The exit code is that of the moment [basic-129, cluster-057].
        raise PveFailure(f"no such cluster node '{target}'", rc=255 if members.several() else 2)
    guest = guests.load(vmid)
    guest.check_lock()
    if guests.running(vmid):
        if params.get("online") != "1":
            raise PveFailure("can't migrate running VM without --online", rc=25)
        raise Unsupported("migrating a running VM")
    if "targetstorage" in params:
        raise Unsupported("migrating to another storage")

    def work() -> None:
        begin = time.monotonic()
        with locks.guest(vmid):
            guest = guests.apply_pending(guests.load(vmid))
            guest.check_lock()
            guest.conf["lock"] = "migrate"
            guest.save()
            _say(f"starting migration of VM {vmid} to node '{target}' ({member.address})")
            copied: list[str] = []
            try:
                _reach(member)
                _copy(guest, member, copied)
            except BaseException as e:
                _take_back(copied, member)
                del guest.conf["lock"]
                guest.save()
                if isinstance(e, PveFailure):
                    _say(f"ERROR: migration aborted (duration {_since(begin)}): {e.text}")
                    raise PveFailure("migration aborted") from e
                raise
            _hand_over(guest, target)
            for volid in copied:
                volumes.free(volid)
            _say(f"migration finished successfully (duration {_since(begin)})")

    return task(caller, "qmigrate", vmid, work)


def _say(text: str) -> None:
    output.line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def _since(begin: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - begin))


def _there(
    member: Member, command: str, stdin: IO[bytes] | int | None = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*forward.login(member), "--", command], stdin=stdin, capture_output=True, text=True, check=False
    )


def _reach(member: Member) -> None:
    done = _there(member, "true")
    if done.returncode:
        for line in done.stderr.splitlines():
            _say(line)
        raise PveFailure("Can't connect to destination address using public key")


def _local(guest: Guest) -> Iterator[str]:
    """The guest's volumes on storages that the other nodes do not have."""
    seen: set[str] = set()
    for conf in (guest.conf, *guest.snapshots.values()):
        for volid in vm_options.volids(conf):
            name, _ = volumes.split(volid)
            if volid not in seen and not volumes.shared(name) and volumes.owner(volid) == guest.vmid:
                seen.add(volid)
                yield volid


def _copy(guest: Guest, member: Member, copied: list[str]) -> None:
    found = list(_local(guest))
    for volid in found:
        name, _ = volumes.split(volid)
        if member.name not in volumes.nodes(name):
            raise PveFailure(f"storage '{name}' is not available on node '{member.name}'")
        if base := disks.info(volumes.path(volid))["parent"]:
            raise PveFailure(f"can't migrate '{volid}' as it's a clone of '{base}'")
        _say(f"found local disk '{volid}' (attached)")
    if found:
        _say("copying local disk images")
    for volid in found:
        file = volumes.path(volid)
        names = [file.name, *([state.name] if (state := disks.state_dir(file)).is_dir() else [])]
        _across(str(file.parent), names, member)
        copied.append(volid)
        _say(f"successfully imported '{volid}'")
        _say(f"volume '{volid}' is '{volid}' on the target")


def _take_back(copied: list[str], member: Member) -> None:
    for volid in copied:
        _there(member, shlex.join(["pvesm", "free", volid]))


def _across(folder: str, names: list[str], member: Member) -> None:
    """Copy files and directories to the same place there, with all that an overlay needs of them."""
    whole = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    pack = ["tar", "-C", folder, *whole, "--sparse", "-cf", "-", "--", *names]
    # What is there already is somebody's.
    tar = shlex.join(["tar", "-C", folder, *whole, "--keep-old-files", "-xpf", "-"])
    unpack = f"mkdir -p {shlex.quote(folder)} && {tar}"
    with subprocess.Popen(pack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as source:
        done = _there(member, unpack, source.stdout)
    if done.returncode or source.returncode:
        raise PveFailure(f"copying {names[0]} failed: {done.stderr.strip() or source.returncode}")


def _hand_over(guest: Guest, target: str) -> None:
    """At once: whoever looks for the VM meanwhile finds it on one node or the other."""
    machine.leave(guest.vmid)
    source, guest.node = guest.node, target
    del guest.conf["lock"]
    with store().change() as db:
        db.drop("runtime", guest.vmid)
        guest.save()
    cluster_fs.hide(f"nodes/{source}/qemu-server/{guest.vmid}.conf")
