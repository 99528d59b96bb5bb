"""Environments of runs whose outer host is a stand-in, and the VMs of such a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import Run

Make = Callable[..., Environment]


class Outer(Protocol):
    """An outer host of tests."""

    def connect(self) -> PveHost: ...


@contextmanager
def environments(host: Outer, folder: Path) -> Iterator[Make]:
    """A function that makes them, each with a run of its own below `folder`, by settings."""
    with ExitStack() as stack:

        def make(**settings: Any) -> Environment:
            chosen = replace(Settings(run_dir=folder / "runs"), **settings)
            run = Run.create(chosen, folder)
            audit = AuditLog(run.directory.audit, run.id)
            stack.callback(audit.close)
            return Environment(
                settings=chosen,
                run=run,
                connect=host.connect,
                audit=audit,
                progress=lambda _: None,
                rootdir=folder,
            )

        yield make


def ours(env: Environment, *, running: bool = False) -> int:
    """Make a VM of the run, with a disk; its id."""
    made = create_marked(env.outer, env.run, env.settings)
    qemu.configure(env.outer.api, made.node, made.vmid, scsi0="local:8,format=qcow2")
    if running:
        qemu.start(env.outer.api, made.node, made.vmid)
    return made.vmid
