"""A node of its own in a directory, for tests of the stand-ins: fake machines, real everything else."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve.lab.node.commands import pvecm, pvesh, pvesm, pveum, pveversion, qm
from pytest_nestedpve.lab.node.machine import machine
from pytest_nestedpve.lab.node.state import broadcast

DOORS: dict[str, Callable[[], int]] = {
    "qm": qm.main,
    "pvesh": pvesh.main,
    "pvesm": pvesm.main,
    "pveum": pveum.main,
    "pvecm": pvecm.main,
    "pveversion": pveversion.main,
}


@dataclass(frozen=True)
class Answer:
    rc: int
    stdout: str
    stderr: str


class FakeMachines:
    """Machines that are files: they run from start to stop, whatever process looks."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.agents: dict[int, Callable[[str, dict[str, Any]], Any]] = {}

    def file(self, vmid: int) -> Path:
        return self.place / str(vmid)

    def start(self, spec: machine.MachineSpec) -> None:
        if "refuse" in spec.name:
            raise machine.MachineError("QEMU exited with code 1")
        self.file(spec.vmid).write_text(str(time.time()))
        (self.place / f"{spec.vmid}.spec").write_text(repr(spec))

    def status(self, vmid: int) -> str:
        return "running" if self.file(vmid).exists() else "stopped"

    def pid(self, vmid: int) -> int | None:
        return 4242 if self.file(vmid).exists() else None

    def started_at(self, vmid: int) -> float | None:
        return float(self.file(vmid).read_text()) if self.file(vmid).exists() else None

    def stop(self, vmid: int) -> None:
        self.file(vmid).unlink(missing_ok=True)

    def shutdown(self, vmid: int, timeout: float = 60.0) -> bool:
        del timeout
        deaf = (self.place / f"{vmid}.deaf").exists()
        if not deaf:
            self.stop(vmid)
        return not deaf

    def agent(self, vmid: int, execute: str, arguments: Any = None, timeout: float = 10.0) -> Any:
        del timeout
        if vmid not in self.agents:
            raise machine.AgentError("unreachable", "no agent")
        return self.agents[vmid](execute, dict(arguments or {}))

    def nothing(self, *_: Any, **__: Any) -> None:
        return None


@dataclass
class Node:
    """A node `father`, and its commands."""

    root: Path
    machines: FakeMachines

    def run(self, *argv: str, stdin: str = "") -> Answer:
        """Run a command of the node in this process (its tasks are processes of their own)."""
        out, err = io.StringIO(), io.StringIO()
        before = sys.argv, sys.stdin
        sys.argv, sys.stdin = list(argv), io.StringIO(stdin)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = DOORS[argv[0]]()
        finally:
            sys.argv, sys.stdin = before
        return Answer(code, out.getvalue(), err.getvalue())

    def ok(self, *argv: str) -> str:
        answer = self.run(*argv)
        assert (answer.rc, answer.stderr) == (0, ""), answer
        return answer.stdout

    def tick(self) -> None:
        """pvestatd's next broadcast."""
        broadcast.tick()

    def file(self, path: str) -> Path:
        return self.root / path.lstrip("/")


def make_root(root: Path) -> Path:
    """The directories and files of a node whose cluster file system runs."""
    for folder in (
        "run",
        "dev",
        "sys/class/net/vmbr0/bridge",
        "var/lib/vz/import",
        "var/lib/vz/snippets",
        "etc",
    ):
        (root / folder).mkdir(parents=True)
    (root / "dev/kvm").touch()
    (root / "run/pve-cluster.pid").write_text(f"{os.getpid()}\n")
    (root / "etc/resolv.conf").write_text("nameserver 10.255.255.53\n")
    return root


def fake_machines(machines: FakeMachines, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the node's code use these."""
    for name in ("start", "status", "pid", "started_at", "stop", "shutdown", "agent"):
        monkeypatch.setattr(machine, name, getattr(machines, name))
    for name in ("forget", "leave", "reset", "suspend", "resume", "set_link"):
        monkeypatch.setattr(machine, name, machines.nothing)
    monkeypatch.setattr(machine, "frozen", lambda vmid: contextlib.nullcontext(vmid))


@pytest.fixture(name="node")
def _node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    root = make_root(tmp_path / "node")
    monkeypatch.setenv("NESTEDPVE_NODE_ROOT", str(root))
    monkeypatch.setenv("NESTEDPVE_NODE_NAME", "father")
    monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
    monkeypatch.setenv("TZ", "UTC")
    machines = FakeMachines(root / "machines")
    fake_machines(machines, monkeypatch)
    return Node(root, machines)
