"""Time of a command over an open connection: ours, and OpenSSH's ControlMaster, to one sshd on loopback."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.rows import Row

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "unit"))

ROUNDS = 40
LIMIT_MS = 10.0
LIMIT_RATIO = 0.5


def _measure_all(*contenders: Callable[[], object]) -> list[tuple[float, ...]]:
    """Milliseconds of each contender, in turn within each round, so that load on the machine affects all."""
    durations: list[list[float]] = [[] for _ in contenders]
    for number in range(ROUNDS + 1):
        for times, contender in zip(durations, contenders, strict=True):
            started = time.perf_counter()
            contender()
            if number:  # the first round opens the connections
                times.append(round(1000 * (time.perf_counter() - started), 2))
    return [tuple(times) for times in durations]


def measure() -> list[Row]:
    """Two rows: the limit in milliseconds, and the ratio."""
    from sshd import Sshd  # the sshd of the unit tests

    from pytest_nestedpve.pve.ssh.connection import SshConnection

    # A control socket's path is at most about 100 characters long.
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bench") as name:
        folder = Path(name)
        server = Sshd(folder / "sshd").start()
        try:
            config = folder / "ssh_config"
            config.write_text(
                server.config_block(
                    "bench", "ControlMaster auto", f"ControlPath {folder}/m", "ControlPersist 60"
                )
            )
            openssh = ["ssh", "-F", str(config), "bench"]
            with SshConnection(server.target()) as connection:
                ours, baseline = _measure_all(
                    lambda: connection.run("true"),
                    lambda: subprocess.run([*openssh, "true"], check=True, capture_output=True),
                )
            subprocess.run([*openssh[:-1], "-O", "exit", "bench"], check=False, capture_output=True)
        finally:
            server.stop()
    return [
        Row("warm_command", "ms", ours, (), LIMIT_MS),
        Row("warm_command_against_controlmaster", "ms", ours, baseline, LIMIT_RATIO, "ratio"),
    ]
