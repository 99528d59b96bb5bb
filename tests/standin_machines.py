"""Machines of a stand-in node that are files: they run from start to stop, whatever process looks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pytest_nestedpve.lab.node.machine import machine
from pytest_nestedpve.lab.node.state import clock, paths

CHANGED = ("start", "status", "pid", "started_at", "stop", "shutdown", "agent")
WITHOUT_EFFECT = ("forget", "leave", "reset", "suspend", "resume", "set_link")


class FakeMachines:
    """The machines of the directory `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)
        self.agents: dict[int, Callable[[str, dict[str, Any]], Any]] = {}

    def file(self, vmid: int) -> Path:
        return self.place / str(vmid)

    def start(self, spec: machine.MachineSpec) -> None:
        if "refuse" in spec.name:
            raise machine.MachineError("QEMU exited with code 1")
        self.file(spec.vmid).write_text(str(clock.now()))
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
        """The answer of `agents`, or that of the file VMID.agent: an object, answers by command."""
        del timeout
        if vmid in self.agents:
            return self.agents[vmid](execute, dict(arguments or {}))
        with contextlib.suppress(FileNotFoundError, KeyError):
            return json.loads((self.place / f"{vmid}.agent").read_text())[execute]
        raise machine.AgentError("unreachable", "no agent")

    def nothing(self, *_: Any, **__: Any) -> None:
        return None


@contextlib.contextmanager
def _frozen(_vmid: int) -> Iterator[None]:
    yield


def of_place() -> FakeMachines:
    """Those of the node that this thread's calls are for."""
    return FakeMachines(paths.at("/machines"))


def _in_process(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def either(*args: Any, **options: Any) -> Any:
        if not paths.in_process():
            return real(*args, **options)
        if name == "frozen":
            return _frozen(*args)
        return getattr(of_place(), name if name in CHANGED else "nothing")(*args, **options)

    return either


for _name in (*CHANGED, *WITHOUT_EFFECT, "frozen"):
    setattr(machine, _name, _in_process(_name, getattr(machine, _name)))
