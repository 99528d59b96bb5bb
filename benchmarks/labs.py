"""Labs of the benchmarks' own, as slow as a real host, and runs in them without a session of pytest."""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.ownership.discover import Candidate
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.run.identity import Run

PREFIX = "bench"
SLOW = 1.3
"""Seconds that a start of `pvesh` or `qm` takes on a real host, Proxmox VE 9.2 over SSH."""


@contextlib.contextmanager
def lab(name: str) -> Iterator[str]:
    """The name of a lab that was started for this and is stopped afterwards. Raises RuntimeError."""
    from pytest_nestedpve.lab import lifecycle
    from pytest_nestedpve.lab.names import LabError

    full = f"{PREFIX}-{name}"
    try:
        lifecycle.start(full, hand=True, report=lambda _text: None)
    except LabError as e:
        raise RuntimeError(str(e)) from e
    try:
        yield full
    finally:
        lifecycle.stop(full)


def pace(name: str, **seconds: float) -> None:
    """Make the lab that slow; what is not named is fast."""
    from pytest_nestedpve.lab import speed

    speed.change(name, dict.fromkeys(speed.KEYS, 0.0) | seconds)


def ask(name: str, *words: str, node: str = "father") -> str:
    """What a command on a node of the lab says; raises RuntimeError when it fails."""
    from pytest_nestedpve.lab import lifecycle, programs
    from pytest_nestedpve.lab.enter import namespace_command

    argv = namespace_command(lifecycle.get(name).pids, node, words)
    done = subprocess.run(
        argv, capture_output=True, text=True, env={"PATH": programs.search_path()}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} on {node}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def by_ssh(name: str, *words: str) -> None:
    """A command on father over a new SSH connection, as a shell script does it."""
    from pytest_nestedpve.lab import lifecycle

    lab = lifecycle.get(name)
    subprocess.run(["ssh", "-F", lab.ssh_config, lab.host, *words], check=True, capture_output=True)


@contextlib.contextmanager
def session(name: str) -> Iterator[tuple[PveHost, Settings, Run]]:
    """A run on the lab with its pool, its connection open as a session's is in the middle of its work."""
    from pytest_nestedpve.config.hosts import connect, resolve
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.ownership.pool import create_pool, host_clock, pool_name
    from pytest_nestedpve.run.identity import Run

    with tempfile.TemporaryDirectory(prefix="bench-run-") as folder:
        settings = Settings(host=f"lab:{name}", vmid_ranges=((90000, 90999),), run_dir=Path(folder))
        host = connect(resolve(f"lab:{name}"))
        try:
            run = Run.create(settings, Path(folder))
            create_pool(host.api, run, settings, host_clock(host))
            yield host.within(lambda: pool_name(settings, run)), settings, run
        finally:
            host.close()


def with_guests(host: PveHost, settings: Settings, run: Run, count: int, *, running: bool) -> list[Candidate]:
    """Guests of the run without an operating system, as `discover` finds them. Raises PveError."""
    from pytest_nestedpve.ownership.create import create_marked
    from pytest_nestedpve.ownership.discover import discover
    from pytest_nestedpve.pve import qemu
    from pytest_nestedpve.pve.parallel import in_parallel

    def make(_number: int) -> int:
        made = create_marked(host, run, settings, memory=64)
        if running:
            qemu.start(host.api, made.node, made.vmid)
        return made.vmid

    in_parallel(make, range(count), 4)
    found = discover(host, settings, run.id)
    if len(found) != count:
        raise RuntimeError(f"expected {count} guests of the run, found {len(found)}")
    return found


def seconds(begin: float) -> float:
    """Seconds since `begin` (time.perf_counter), for a row."""
    return round(time.perf_counter() - begin, 3)
