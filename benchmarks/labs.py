"""Labs for benchmarks, with the delays of a real host, and runs on them without a pytest session."""

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
REAL_DELAY = 1.3
"""Seconds that a start of `pvesh` or `qm` takes on a real host, Proxmox VE 9.2 over SSH."""


@contextlib.contextmanager
def lab(name: str) -> Iterator[str]:
    """Start a lab, yield its name, stop it. Raises RuntimeError."""
    from pytest_nestedpve.lab import lifecycle
    from pytest_nestedpve.lab.names import LabError

    lab_name = f"{PREFIX}-{name}"
    try:
        lifecycle.start(lab_name, hand=True, report=lambda _text: None)
    except LabError as e:
        raise RuntimeError(str(e)) from e
    try:
        yield lab_name
    finally:
        lifecycle.stop(lab_name)


def set_delays(name: str, **seconds: float) -> None:
    """Set the lab's delays by key; delays without a value are 0."""
    from pytest_nestedpve.lab import speed

    speed.change(name, dict.fromkeys(speed.KEYS, 0.0) | seconds)


def run_on(name: str, *words: str, node: str = "father") -> str:
    """Run a command on a node of the lab and return its output; raises RuntimeError when it fails."""
    from pytest_nestedpve.lab import lifecycle, programs
    from pytest_nestedpve.lab.enter import namespace_command

    argv = namespace_command(lifecycle.get(name).pids, node, words)
    done = subprocess.run(
        argv, capture_output=True, text=True, env={"PATH": programs.search_path()}, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} on {node}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def run_by_ssh(name: str, *words: str) -> None:
    """Run a command on father over a new SSH connection, as a shell script does."""
    from pytest_nestedpve.lab import lifecycle

    lab = lifecycle.get(name)
    subprocess.run(["ssh", "-F", lab.ssh_config, lab.host, *words], check=True, capture_output=True)


@contextlib.contextmanager
def session(name: str) -> Iterator[tuple[PveHost, Settings, Run]]:
    """A run on the lab with its pool and an open connection, as in the middle of a pytest session."""
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


def create_guests(
    host: PveHost, settings: Settings, run: Run, count: int, *, running: bool
) -> list[Candidate]:
    """Create `count` guests of the run without an operating system; return them as `discover` does.

    Raises PveError, RuntimeError.
    """
    from pytest_nestedpve.ownership.create import create_marked
    from pytest_nestedpve.ownership.discover import discover
    from pytest_nestedpve.pve import qemu
    from pytest_nestedpve.pve.parallel import in_parallel

    def create(_number: int) -> int:
        vm = create_marked(host, run, settings, memory=64)
        if running:
            qemu.start(host.api, vm.node, vm.vmid)
        return vm.vmid

    in_parallel(create, range(count), 4)
    candidates = discover(host, settings, run.id)
    if len(candidates) != count:
        raise RuntimeError(f"expected {count} guests of the run, found {len(candidates)}")
    return candidates


def seconds_since(begin: float) -> float:
    """Seconds since `begin` (time.perf_counter), for a row."""
    return round(time.perf_counter() - begin, 3)
