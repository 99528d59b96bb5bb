# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/migrate: a stopped VM is moved to another node, its local disks are copied."""

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

BASE = "/nodes/{node}/qemu/{vmid}/migrate"


@api("GET", BASE)
def conditions(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    disks_on_node = [{"volid": volid, "cdrom": 0} for volid in _local_volumes(guest)]
    return {"local_disks": disks_on_node, "local_resources": [], "running": int(guests.running(guest.vmid))}


@api("POST", BASE)
def migrate(caller: Caller, params: dict[str, Any]) -> Any:
    vmid, target = int(params["vmid"]), params["target"]
    if target == paths.node():
        raise BadParameters({"target": "target is local node."}, rc=255)
    member = members.find(target)
    if member is None:
        # The exit code depends on the cluster [basic-129, cluster-057].
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
            _log(f"starting migration of VM {vmid} to node '{target}' ({member.address})")
            copied: list[str] = []
            try:
                _check_connection(member)
                _copy_volumes(guest, member, copied)
            except BaseException as e:
                _remove_copies(copied, member)
                del guest.conf["lock"]
                guest.save()
                if isinstance(e, PveFailure):
                    _log(f"ERROR: migration aborted (duration {_duration(begin)}): {e.text}")
                    raise PveFailure("migration aborted") from e
                raise
            _move_configuration(guest, target)
            for volid in copied:
                volumes.free(volid)
            _log(f"migration finished successfully (duration {_duration(begin)})")

    return task(caller, "qmigrate", vmid, work)


def _log(text: str) -> None:
    output.line(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")


def _duration(begin: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - begin))


def _run_on(
    member: Member, command: str, stdin: IO[bytes] | int | None = subprocess.DEVNULL
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*forward.login(member), "--", command], stdin=stdin, capture_output=True, text=True, check=False
    )


def _check_connection(member: Member) -> None:
    process = _run_on(member, "true")
    if process.returncode:
        for line in process.stderr.splitlines():
            _log(line)
        raise PveFailure("Can't connect to destination address using public key")


def _local_volumes(guest: Guest) -> Iterator[str]:
    """The guest's volumes on storages that are not shared."""
    yielded: set[str] = set()
    for conf in (guest.conf, *guest.snapshots.values()):
        for volid in vm_options.volids(conf):
            name, _ = volumes.split(volid)
            if volid not in yielded and not volumes.shared(name) and volumes.owner(volid) == guest.vmid:
                yielded.add(volid)
                yield volid


def _copy_volumes(guest: Guest, member: Member, copied: list[str]) -> None:
    volids = list(_local_volumes(guest))
    for volid in volids:
        name, _ = volumes.split(volid)
        if member.name not in volumes.nodes(name):
            raise PveFailure(f"storage '{name}' is not available on node '{member.name}'")
        if base := disks.info(volumes.path(volid))["parent"]:
            raise PveFailure(f"can't migrate '{volid}' as it's a clone of '{base}'")
        _log(f"found local disk '{volid}' (attached)")
    if volids:
        _log("copying local disk images")
    for volid in volids:
        file = volumes.path(volid)
        names = [file.name, *([state.name] if (state := disks.state_dir(file)).is_dir() else [])]
        _transfer(str(file.parent), names, member)
        copied.append(volid)
        _log(f"successfully imported '{volid}'")
        _log(f"volume '{volid}' is '{volid}' on the target")


def _remove_copies(copied: list[str], member: Member) -> None:
    for volid in copied:
        _run_on(member, shlex.join(["pvesm", "free", volid]))


def _transfer(folder: str, names: list[str], member: Member) -> None:
    """Copy files and directories to the same path on the member, with an overlay's attributes."""
    whole = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    pack = ["tar", "-C", folder, *whole, "--sparse", "-cf", "-", "--", *names]
    # Existing files on the target may belong to another guest.
    tar = shlex.join(["tar", "-C", folder, *whole, "--keep-old-files", "-xpf", "-"])
    unpack = f"mkdir -p {shlex.quote(folder)} && {tar}"
    with subprocess.Popen(pack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as source:
        process = _run_on(member, unpack, source.stdout)
    if process.returncode or source.returncode:
        raise PveFailure(f"copying {names[0]} failed: {process.stderr.strip() or source.returncode}")


def _move_configuration(guest: Guest, target: str) -> None:
    """Move the configuration in one transaction: at any moment the VM is on exactly one node."""
    machine.leave(guest.vmid)
    source, guest.node = guest.node, target
    del guest.conf["lock"]
    with store().change() as db:
        db.drop("runtime", guest.vmid)
        guest.save()
    cluster_fs.hide(f"nodes/{source}/qemu-server/{guest.vmid}.conf")
