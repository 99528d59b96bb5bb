# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/migrate: a VM that is off goes to another node, its local disks are copied."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Iterator
from typing import Any

from .. import disks, forward, guests, locks, machine, members, options, paths, volumes
from ..access import Caller
from ..errors import BadParameters, PveFailure, Unsupported
from ..guests import Guest
from ..members import Member
from ..tree import api, task

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
            guest = guests.settle(guests.load(vmid))
            guest.check_lock()
            guest.conf["lock"] = "migrate"
            guest.save()
            _say(f"starting migration of VM {vmid} to node '{target}' ({member.address})")
            try:
                _reach(member)
                copied = _copy(guest, member)
            except BaseException as e:
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
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}", flush=True)


def _since(begin: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(time.monotonic() - begin))


def _reach(member: Member) -> None:
    done = subprocess.run(
        [*forward.login(member), "--", "true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        for line in done.stderr.splitlines():
            _say(line)
        raise PveFailure("Can't connect to destination address using public key")


def _local(guest: Guest) -> Iterator[str]:
    """The guest's volumes on storages that the other nodes do not have."""
    seen: set[str] = set()
    for conf in (guest.conf, *guest.snapshots.values()):
        for volid in options.volids(conf):
            name, _ = volumes.split(volid)
            if volid not in seen and not volumes.shared(name) and volumes.owner(volid) == guest.vmid:
                seen.add(volid)
                yield volid


def _copy(guest: Guest, member: Member) -> list[str]:
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
        _say(f"successfully imported '{volid}'")
        _say(f"volume '{volid}' is '{volid}' on the target")
    return found


def _across(folder: str, names: list[str], member: Member) -> None:
    """Copy files and directories to the same place there, with all that an overlay needs of them."""
    whole = ["--xattrs", "--xattrs-include=*", "--numeric-owner"]
    pack = ["tar", "-C", folder, *whole, "--sparse", "-cf", "-", "--", *names]
    unpack = f"mkdir -p {shlex.quote(folder)} && tar -C {shlex.quote(folder)} {shlex.join(whole)} -xpf -"
    with subprocess.Popen(pack, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as source:
        done = subprocess.run(
            [*forward.login(member), "--", unpack],
            stdin=source.stdout,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode or source.returncode:
        raise PveFailure(f"copying {names[0]} failed: {done.stderr.strip() or source.returncode}")


def _hand_over(guest: Guest, target: str) -> None:
    machine.leave(guest.vmid)
    guests.remove(guest.vmid, guest.node)
    guest.node = target
    del guest.conf["lock"]
    guest.save()
