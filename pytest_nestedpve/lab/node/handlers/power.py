# ruff: noqa: ARG001 (every handler has the same signature)
"""/nodes/N/qemu/ID/status: start, stop, shutdown, reboot, reset, suspend, resume, current."""

from __future__ import annotations

import os
from typing import Any

from ..api import validation
from ..api.access import Caller
from ..api.errors import PveFailure, Unsupported
from ..api.tree import api, task
from ..machine import cloudinit, disks, machine
from ..state import clock, guests, locks, output, paths, tasks, vm_options, volumes
from ..state.guests import NETS, Guest
from ..state.store import store

BASE = "/nodes/{node}/qemu/{vmid}/status"


@api("GET", BASE)
def index(caller: Caller, params: dict[str, Any]) -> Any:
    return [
        {"subdir": name} for name in ("current", "start", "stop", "reset", "shutdown", "suspend", "reboot")
    ]


@api("GET", BASE + "/current")
def current(caller: Caller, params: dict[str, Any]) -> Any:
    guest = guests.load(params["vmid"])
    status = guests.status(guest)
    managed = store().get("ha", f"vm:{guest.vmid}")
    status["ha"] = {"managed": 1, "state": None} if managed else {"managed": 0}
    if agent_enabled(guest):
        status["agent"] = 1
    return status


def agent_enabled(guest: Guest) -> bool:
    first = guest.conf.get("agent", "0").split(",")[0].removeprefix("enabled=")
    return validation.as_boolean(first) == "1"


@api("POST", BASE + "/start")
def start(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    skip = params.get("skiplock") == "1"
    if store().get("ha", f"vm:{vmid}") is not None and caller.sync:
        output.line(f"Requesting HA start for VM {vmid}")
    return task(caller, "qmstart", vmid, lambda: start_now(vmid, skip=skip))


def start_now(vmid: int, *, skip: bool = False) -> None:
    """Start a VM, in a worker."""
    with locks.guest(vmid):
        guest = guests.load(vmid)
        if guest.template:
            raise PveFailure("you can't start a vm if it's a template")
        guest.check_lock(skip=skip, but=("suspended",))
        if guests.running(vmid):
            raise PveFailure(f"VM {vmid} already running")
        boot(guest)


def boot(guest: Guest) -> None:
    """Apply pending values, check the machine's requirements and start it (the caller holds the lock)."""
    guests.apply_pending(guest)
    paths.pause("start_s")
    spec = machine_spec(guest)
    if spec.memory * 1024**2 > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        output.line("kvm: cannot set up guest memory 'pc.ram': Cannot allocate memory")
        raise PveFailure("start failed: QEMU exited with code 1")
    try:
        machine.start(spec)
    except machine.MachineError as e:
        raise PveFailure(f"start failed: {e}") from e
    if guest.lock == "suspended":
        del guest.conf["lock"]
        guest.save()
    store().put("runtime", guest.vmid, {"paused": 0, "started": clock.now()})


def machine_spec(guest: Guest) -> machine.MachineSpec:
    """The machine to boot: first disk of the boot order, network cards, cloud-init drive."""
    if guest.conf.get("kvm", "1") != "0" and not paths.at("/dev/kvm").exists():
        raise PveFailure(
            "KVM virtualisation configured, but not available."
            " Either disable in VM configuration or enable in BIOS."
        )
    for value in guest.drives().values():
        volid = value.split(",")[0]
        if ":" in volid and not volumes.path(volid).exists():
            raise PveFailure(f"volume '{volid}' does not exist")
    nics = []
    for key in sorted((k for k in guest.conf if NETS.fullmatch(k)), key=lambda k: int(k[3:])):
        parts = vm_options.net_parts(guest.conf[key])
        bridge = parts.get("bridge", "vmbr0")
        if not paths.at(f"/sys/class/net/{bridge}/bridge").exists():
            raise PveFailure(f"bridge '{bridge}' does not exist")
        link_down = parts.get("link_down") == "1"
        nics.append(machine.Nic(int(key[3:]), parts.get("macaddr", ""), bridge, link_down=link_down))
    seed = None
    if cloudinit.drive(guest) is not None:
        seed = cloudinit.seed(guest)
        output.line("generating cloud-init ISO")
    drive = guests.boot_drive(guest)
    disk = str(volumes.path(guest.conf[drive].split(",")[0])) if drive else None
    if disk is not None and not disks.bootable(disk):
        disk = None
    smbios = validation.split(validation.SMBIOS1, guest.conf.get("smbios1", ""))
    return machine.MachineSpec(
        vmid=guest.vmid,
        name=cloudinit.host_name(guest),
        uuid=smbios.get("uuid", ""),
        memory=guests.memory(guest.conf),
        disk=disk,
        nics=tuple(nics),
        seed=seed,
        agent=agent_enabled(guest),
    )


def mark_stopped(vmid: int) -> None:
    """Delete the runtime state of a stopped machine, and apply pending values."""
    store().drop("runtime", vmid)
    if guests.here(vmid):
        guests.apply_pending(guests.load(vmid))


def _stop_now(vmid: int) -> None:
    paths.pause("stop_s")
    machine.stop(vmid)
    mark_stopped(vmid)


@api("POST", BASE + "/stop")
def stop(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    if store().get("ha", f"vm:{vmid}") is not None and caller.sync:
        output.line(f"Requesting HA stop for VM {vmid}")

    def work() -> None:
        if params.get("overrule-shutdown") == "1":
            others = [t for t in tasks.every() if t.running and t.type == "qmshutdown" and t.id == str(vmid)]
            for other in others:
                tasks.stop(other.upid)
            if others:
                output.line("overruled qmshutdown tasks: " + ", ".join(t.upid for t in others))
        with locks.guest(vmid):
            guest = guests.find(vmid)
            if not guests.running(vmid):
                return
            guest.check_lock(skip=params.get("skiplock") == "1")
            _stop_now(vmid)

    return task(caller, "qmstop", vmid, work)


def _shutdown(vmid: int, timeout: float, *, force: bool) -> None:
    if machine.shutdown(vmid, timeout):
        mark_stopped(vmid)
    elif force:
        _stop_now(vmid)
    else:
        raise PveFailure("VM quit/powerdown failed - got timeout")


@api("POST", BASE + "/shutdown")
def shutdown(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    if guests.here(vmid) and guests.paused(vmid):
        if params.get("forceStop") != "1":
            raise PveFailure("VM is paused - cannot shutdown", rc=29)
        return stop(caller, {**params, "overrule-shutdown": "0"})

    def work() -> None:
        with locks.guest(vmid):
            try:
                guest = guests.find(vmid)
            except PveFailure as e:
                output.error(e.text + "\n")
                raise
            guest.check_lock(skip=params.get("skiplock") == "1")
            if not guests.running(vmid):
                output.error(f"VM {vmid} not running\n")
                return
            _shutdown(vmid, float(params.get("timeout", 60)), force=params.get("forceStop") == "1")

    return task(caller, "qmshutdown", vmid, work)


@api("POST", BASE + "/reboot")
def reboot(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    try:
        _require_running(vmid)
    except PveFailure as e:
        if caller.sync:
            output.error(e.text + "\n")
        raise
    if guests.paused(vmid):
        raise PveFailure("VM is paused - cannot shutdown", rc=29)

    def work() -> None:
        with locks.guest(vmid):
            guest = guests.find(vmid)
            guest.check_lock()
            if not guests.running(vmid):
                raise PveFailure(f"VM {vmid} not running", rc=2)
            _shutdown(vmid, float(params.get("timeout", 60)), force=False)
            boot(guests.load(vmid))

    return task(caller, "qmreboot", vmid, work)


def _require_running(vmid: int) -> Guest:
    guest = guests.find(vmid, rc=2)
    if not guests.running(vmid):
        raise PveFailure(f"VM {vmid} not running", rc=2)
    return guest


@api("POST", BASE + "/reset")
def reset(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    _require_running(vmid)

    def work() -> None:
        with locks.guest(vmid):
            _require_running(vmid).check_lock(skip=params.get("skiplock") == "1")
            machine.reset(vmid)

    return task(caller, "qmreset", vmid, work)


@api("POST", BASE + "/suspend")
def suspend(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    _require_running(vmid)
    if params.get("todisk") == "1":
        raise Unsupported("suspend to disk")

    def work() -> None:
        with locks.guest(vmid):
            _require_running(vmid).check_lock(skip=params.get("skiplock") == "1", but=("backup",))
            machine.suspend(vmid)
            store().put("runtime", vmid, {"paused": 1})

    return task(caller, "qmpause", vmid, work)


@api("POST", BASE + "/resume")
def resume(caller: Caller, params: dict[str, Any]) -> Any:
    vmid = int(params["vmid"])
    _require_running(vmid)

    def work() -> None:
        with locks.guest(vmid):
            _require_running(vmid)
            if guests.paused(vmid):
                machine.resume(vmid)
            store().put("runtime", vmid, {"paused": 0})

    return task(caller, "qmresume", vmid, work)
