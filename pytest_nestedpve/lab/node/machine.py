"""Machines: what `qm start` boots on a node. A machine is a system container with its own systemd.

Each machine has a supervisor, a detached process that plays the part of the `kvm` process: the machine
lives exactly as long as it does. Runtime state lies in /run/nestedpve-lab/guests/<vmid>/. Standard
library only; runs on a node's Python (3.11 to 3.13).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN_DIR = Path("/run/nestedpve-lab/guests")


class MachineError(Exception):
    """A machine cannot be started or stopped; the text is fit to stand in a task log."""


class AgentError(Exception):
    """The guest agent did not do what was asked.

    `kind` is one of: "not running" (the machine is off), "unreachable" (no agent answers on the
    socket), "timeout", "failed" (the agent itself said no: its words are the text).
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
    """What is started. `memory` is in MiB; `disk` the path of the boot volume, None or not bootable for
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
    """Start a machine; returns once its first boot has been launched. MachineError says what is wrong:
    it runs already, the bridge is missing, the disk's base is missing."""
    raise NotImplementedError


def status(vmid: int) -> str:
    """ "running" or "stopped"."""
    raise NotImplementedError


def pid(vmid: int) -> int | None:
    """The process id that `qm status --verbose` shows: the supervisor's (for a machine without a system
    a made-up one is not given: None). None when stopped."""
    raise NotImplementedError


def init_pid(vmid: int) -> int | None:
    """The machine's own PID 1, as seen on this node: `/proc/<pid>/root` is its file system."""
    raise NotImplementedError


def started_at(vmid: int) -> float | None:
    """Unix time of the (last) start, None when stopped."""
    raise NotImplementedError


def stop(vmid: int) -> None:
    """Pull the plug; returns when nothing of the machine is left. No error if it is off."""
    raise NotImplementedError


def shutdown(vmid: int, timeout: float = 60.0) -> bool:
    """Ask the machine to power off and wait at most `timeout` seconds; whether it is off now."""
    raise NotImplementedError


def reboot(vmid: int, timeout: float = 60.0) -> bool:
    """Ask the machine to reboot and wait at most `timeout` seconds until it went down; whether it did.
    (PVE's reboot applies pending configuration: stop it with `shutdown` and start it with the new spec.)"""
    raise NotImplementedError


def reset(vmid: int) -> None:
    """The reset button: the machine boots anew at once, with the same spec. MachineError when off."""
    raise NotImplementedError


@contextlib.contextmanager
def frozen(vmid: int) -> Iterator[None]:
    """The machine's processes stand still inside the block (for a snapshot); nothing happens when off."""
    raise NotImplementedError
    yield


def suspend(vmid: int) -> None:
    """Freeze until `resume` (qm suspend)."""
    raise NotImplementedError


def resume(vmid: int) -> None:
    """Undo `suspend`."""
    raise NotImplementedError


def set_link(vmid: int, index: int, *, up: bool) -> None:
    """Plug the cable of NIC `index` in or out while the machine runs."""
    raise NotImplementedError


def agent(
    vmid: int, execute: str, arguments: Mapping[str, Any] | None = None, timeout: float = 10.0
) -> Any:
    """One command of the guest agent (`guest-ping`, …); the `return` value. AgentError otherwise."""
    raise NotImplementedError


def console_log(vmid: int) -> Path:
    """Where the machine's console output goes."""
    return RUN_DIR / str(vmid) / "console.log"


def forget(vmid: int) -> None:
    """After a destroy: runtime state away, DHCP leases of its cards given back (where this node serves DHCP)."""
    raise NotImplementedError


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
