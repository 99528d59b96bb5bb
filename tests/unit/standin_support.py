"""A stand-in node in a directory, with fake machines and everything else real."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from standin_connections import COMMANDS
from standin_machines import CHANGED, WITHOUT_EFFECT, FakeMachines

from pytest_nestedpve.lab.node.machine import machine
from pytest_nestedpve.lab.node.state import broadcast


@dataclass(frozen=True)
class Answer:
    rc: int
    stdout: str
    stderr: str


@dataclass
class Node:
    """A node `father`, and its commands."""

    root: Path
    machines: FakeMachines

    def run(self, *argv: str, stdin: str = "") -> Answer:
        """Run a command of the node in this process (its tasks are separate processes)."""
        out, err = io.StringIO(), io.StringIO()
        before = sys.argv, sys.stdin
        sys.argv, sys.stdin = list(argv), io.StringIO(stdin)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = COMMANDS[argv[0]]()
        finally:
            sys.argv, sys.stdin = before
        return Answer(code, out.getvalue(), err.getvalue())

    def ok(self, *argv: str) -> str:
        answer = self.run(*argv)
        assert (answer.rc, answer.stderr) == (0, ""), answer
        return answer.stdout

    def tick(self) -> None:
        """Broadcast once, as pvestatd does."""
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
    """Replace the functions of `machine` by those of `machines`."""
    for name in CHANGED:
        monkeypatch.setattr(machine, name, getattr(machines, name))
    for name in WITHOUT_EFFECT:
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
