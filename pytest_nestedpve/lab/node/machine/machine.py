"""Machines, booted by `qm start` on a node. A machine is a system container with its own systemd.

Every machine has a supervisor, a detached process in place of the `kvm` process: the machine
runs exactly as long as the supervisor. Runtime state is in /run/nestedpve-lab/guests/<vmid>/. Standard
library only; runs on a node's Python (3.11 to 3.13).
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cgroups, disks
from .alive import held

RUN_DIR = Path("/run/nestedpve-lab/guests")
SERIAL_DIR = Path("/run/qemu-server")
LEASES = Path("/var/lib/misc/dnsmasq.leases")
AGENT_SOCKET = "run/qga/qga.sock"
_AGENT_LIMIT = 64 << 20  # bytes of one answer


class MachineError(Exception):
    """A machine cannot be started or stopped; the text is a line for a task log."""


class AgentError(Exception):
    """A command of the guest agent failed.

    `kind` is one of: "not running" (the machine is off), "unreachable" (no agent answers on the
    socket), "timeout", "failed" (the agent answered with an error, which is the text).
    """

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


@dataclass(frozen=True)
class Nic:
    """A network card: the host side is the link `tap<vmid>i<index>` on `bridge`."""

    index: int
    mac: str
    bridge: str
    link_down: bool = False
    inside: str = ""  # name inside the machine; default eth<index>


@dataclass(frozen=True)
class MachineSpec:
    """A machine to start. `memory` is in MiB; `disk` the path of the boot volume, None or not bootable for
    a machine that "runs" without a system; `seed` the files of the cloud-init drive (user-data, meta-data,
    network-config, vendor-data), None without such a drive; `agent` whether the VM has the agent's port."""

    vmid: int
    name: str
    uuid: str = ""
    memory: int = 512
    disk: str | None = None
    nics: tuple[Nic, ...] = ()
    seed: Mapping[str, str] | None = None
    agent: bool = False


def start(spec: MachineSpec) -> None:
    """Start a machine; returns once its first boot has been launched. MachineError otherwise:
    the machine runs already, the bridge is missing, the disk's base is missing."""
    if status(spec.vmid) == "running":
        raise MachineError(f"VM {spec.vmid} already running")
    for nic in spec.nics:
        if not Path("/sys/class/net", nic.bridge, "bridge").is_dir():
            raise MachineError(f"bridge '{nic.bridge}' does not exist")
    run_dir = RUN_DIR / str(spec.vmid)
    shutil.rmtree(run_dir, ignore_errors=True)
    run_dir.mkdir(parents=True, mode=0o700)
    try:
        bootable = spec.disk is not None and disks.bootable(spec.disk)
    except disks.DiskError as e:
        raise MachineError(str(e)) from e
    if not bootable:
        write_state(spec.vmid, {"started": time.time()})
        return
    (run_dir / "spec.json").write_text(json.dumps(asdict(spec)))
    with contextlib.suppress(OSError):
        # In the directory of QEMU's socket, where users expect a log of the serial device.
        SERIAL_DIR.mkdir(parents=True, exist_ok=True)
        serial_log(spec.vmid).unlink(missing_ok=True)
        serial_log(spec.vmid).symlink_to(console_log(spec.vmid))
    package = __package__ or ""
    import_path = Path(__file__).resolve().parents[len(package.split("."))]
    environment = {**os.environ, "PYTHONPATH": str(import_path)}
    with (run_dir / "supervisor.log").open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", f"{package}.supervisor", str(spec.vmid)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    assert supervisor.stdout is not None
    with supervisor.stdout:
        message = supervisor.stdout.readline().decode(errors="replace").strip()
    if message != "running":
        supervisor.wait()
        shutil.rmtree(run_dir, ignore_errors=True)
        raise MachineError(
            message or f"start failed: the supervisor of VM {spec.vmid} ended without a message"
        )


def status(vmid: int) -> str:
    """ "running" or "stopped"."""
    state = read_state(vmid)
    if state is None:
        return "stopped"
    return "running" if "supervisor" not in state or held(lock_file(vmid)) else "stopped"


def pid(vmid: int) -> int | None:
    """The process id that `qm status --verbose` shows: the supervisor's. None for a stopped machine, or one
    without a system."""
    return _live_pid(vmid, "supervisor")


def init_pid(vmid: int) -> int | None:
    """The id on this node of the machine's PID 1: `/proc/<pid>/root` is its file system."""
    return _live_pid(vmid, "init")


def started_at(vmid: int) -> float | None:
    """Unix time of the (last) start, None when stopped."""
    state = read_state(vmid) if status(vmid) == "running" else None
    return float(state["started"]) if state else None


def stop(vmid: int) -> None:
    """Power off at once; returns when all processes have ended. No error if the machine is off."""
    place = RUN_DIR / str(vmid)
    state = read_state(vmid)
    if state is not None and "supervisor" in state:
        (place / "stop").touch()
        with _ended(int(state["supervisor"])) as ended:
            cgroups.kill(machine_group(vmid))
            ended(20.0)
        cgroups.remove(supervisor_group(vmid))
        cgroups.remove(machine_group(vmid))
    clear(vmid)


def shutdown(vmid: int, timeout: float = 60.0) -> bool:
    """Ask the machine to power off and wait at most `timeout` seconds; whether it is off now."""
    state = read_state(vmid)
    if state is None:
        return True
    if "supervisor" not in state:
        return False  # without a system nothing handles the request
    with _ended(int(state["supervisor"])) as ended:
        _signal_init(vmid, signal.SIGRTMIN + 4)  # systemd: power off
        return ended(timeout)


def reboot(vmid: int, timeout: float = 60.0) -> bool:
    """Ask the machine to reboot and wait at most `timeout` seconds for its shutdown; whether it shut down.
    (PVE's reboot applies pending configuration: use `shutdown`, and `start` with the new spec.)"""
    init = init_pid(vmid)
    if init is None:
        return False
    with _ended(init) as ended:
        _signal_init(vmid, signal.SIGRTMIN + 5)  # systemd: reboot
        return ended(timeout)


def reset(vmid: int) -> None:
    """Reset: the machine boots again at once, with the same spec. MachineError when off."""
    if status(vmid) != "running":
        raise MachineError(f"VM {vmid} not running")
    if init_pid(vmid) is None:
        return
    (RUN_DIR / str(vmid) / "again").touch()
    cgroups.kill(machine_group(vmid))


@contextlib.contextmanager
def frozen(vmid: int) -> Iterator[None]:
    """Freeze the machine's processes inside the block (for a snapshot); no effect when off."""
    group = machine_group(vmid)
    if not group.is_dir() or init_pid(vmid) is None or cgroups.event(group, "frozen"):
        yield
        return
    cgroups.freeze(group, True)
    try:
        yield
    finally:
        cgroups.freeze(group, False)


def suspend(vmid: int) -> None:
    """Freeze until `resume` (qm suspend)."""
    if init_pid(vmid) is not None:
        cgroups.freeze(machine_group(vmid), True)


def resume(vmid: int) -> None:
    """Undo `suspend`."""
    if init_pid(vmid) is not None:
        cgroups.freeze(machine_group(vmid), False)


def set_link(vmid: int, index: int, *, up: bool) -> None:
    """Set the link of NIC `index` up or down while the machine runs."""
    link = ["ip", "link", "set", f"tap{vmid}i{index}", "up" if up else "down"]
    subprocess.run(link, capture_output=True, check=False)


def agent(vmid: int, execute: str, arguments: Mapping[str, Any] | None = None, timeout: float = 10.0) -> Any:
    """One command of the guest agent (`guest-ping`, …); the `return` value. AgentError otherwise."""
    if status(vmid) != "running":
        raise AgentError("not running", f"VM {vmid} is not running")
    init = init_pid(vmid)
    if init is None:
        raise AgentError("unreachable", "QEMU guest agent is not running")
    request: dict[str, Any] = {"execute": execute}
    if arguments:
        request["arguments"] = dict(arguments)
    deadline = time.monotonic() + timeout
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as port:
            port.settimeout(timeout)
            port.connect(f"/proc/{init}/root/{AGENT_SOCKET}")
            port.sendall(json.dumps(request).encode() + b"\n")
            answer = json.loads(_line(port, deadline))
    except TimeoutError as e:
        raise AgentError("timeout", "QEMU guest agent is not running") from e
    except (OSError, ValueError) as e:
        raise AgentError("unreachable", "QEMU guest agent is not running") from e
    if "error" in answer:
        raise AgentError("failed", str(answer["error"].get("desc", answer["error"])))
    return answer.get("return")


def console_log(vmid: int) -> Path:
    """The file with the machine's console output."""
    return RUN_DIR / str(vmid) / "console.log"


def serial_log(vmid: int) -> Path:
    """A link to the console log, named after the VM's first serial device."""
    return SERIAL_DIR / f"{vmid}.serial0.log"


def leave(vmid: int) -> None:
    """After a migration (the VM is off): remove the runtime state, keep the DHCP leases."""
    clear(vmid)
    (RUN_DIR / f"{vmid}.macs").unlink(missing_ok=True)


def forget(vmid: int) -> None:
    """After a destroy: remove the runtime state, release the DHCP leases (if this node serves DHCP)."""
    macs = []
    with contextlib.suppress(OSError, ValueError):
        macs = json.loads((RUN_DIR / f"{vmid}.macs").read_text())
    clear(vmid)
    (RUN_DIR / f"{vmid}.macs").unlink(missing_ok=True)
    release(macs)


# -- shared with the supervisor


def machine_group(vmid: int) -> Path:
    """The cgroup of the machine's own processes, directly below the node's root group."""
    return cgroups.root() / f"machine-{vmid}"


def supervisor_group(vmid: int) -> Path:
    """The supervisor's cgroup: outside the service or session in which `start` was called."""
    return cgroups.root() / f"guest-{vmid}"


def read_state(vmid: int) -> dict[str, Any] | None:
    """The state written by `start` and the supervisor; None when the machine is off."""
    try:
        loaded: dict[str, Any] = json.loads((RUN_DIR / str(vmid) / "state.json").read_text())
    except (OSError, ValueError):
        return None
    return loaded


def write_state(vmid: int, state: Mapping[str, Any]) -> None:
    """Write the state file; atomic."""
    place = RUN_DIR / str(vmid)
    temporary = place / f"state.{os.getpid()}"
    temporary.write_text(json.dumps(state))
    temporary.rename(place / "state.json")


def lock_file(vmid: int) -> Path:
    """The lock file that the supervisor holds as long as it runs."""
    return RUN_DIR / str(vmid) / "lock"


def clear(vmid: int) -> None:
    """Remove the runtime state."""
    shutil.rmtree(RUN_DIR / str(vmid), ignore_errors=True)
    with contextlib.suppress(OSError):
        serial_log(vmid).unlink(missing_ok=True)


def release(macs: list[str]) -> None:
    """Release DHCP leases at this node's dnsmasq, which otherwise keeps them until they expire."""
    try:
        lines = [line.split() for line in LEASES.read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        if len(line) >= 4 and line[1].lower() in [mac.lower() for mac in macs]:
            client = line[4] if len(line) > 4 and line[4] != "*" else None
            command = ["dhcp_release", _bridge_of(line[2]), line[2], line[1], *([client] if client else [])]
            with contextlib.suppress(OSError):
                subprocess.run(command, capture_output=True, check=False)


def _bridge_of(address: str) -> str:
    route = subprocess.run(["ip", "-o", "route", "get", address], capture_output=True, text=True, check=False)
    words = route.stdout.split()
    return words[words.index("dev") + 1] if "dev" in words else "vmbr0"


def _live_pid(vmid: int, key: str) -> int | None:
    state = read_state(vmid)
    if state is None or key not in state or not held(lock_file(vmid)):
        return None
    return int(state[key])


@contextlib.contextmanager
def _ended(process: int) -> Iterator[Callable[[float], bool]]:
    """A function that waits at most `limit` seconds for the end of the process; whether it ended."""
    try:
        handle = os.pidfd_open(process)
    except ProcessLookupError:
        yield lambda _limit: True
        return
    try:
        poller = select.poll()
        poller.register(handle, select.POLLIN)
        yield lambda limit: bool(poller.poll(limit * 1000))
    finally:
        os.close(handle)


def _signal_init(vmid: int, number: int) -> None:
    init = init_pid(vmid)
    if init is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(init, number)


def _line(port: socket.socket, deadline: float) -> bytes:
    received = bytearray()
    while b"\n" not in received:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        port.settimeout(remaining)
        chunk = port.recv(1 << 16)
        if not chunk or len(received) > _AGENT_LIMIT:
            raise OSError("the agent closed the connection")
        received += chunk
    # 0xFF precedes the answer to a guest-sync-delimited; none is sent here, but skip it.
    return bytes(received).lstrip(b"\xff").split(b"\n", 1)[0]


__all__ = [
    "RUN_DIR",
    "AgentError",
    "MachineError",
    "MachineSpec",
    "Nic",
    "agent",
    "console_log",
    "forget",
    "frozen",
    "init_pid",
    "leave",
    "pid",
    "reboot",
    "reset",
    "resume",
    "set_link",
    "shutdown",
    "start",
    "started_at",
    "status",
    "stop",
    "suspend",
]
