"""Runs of pytest in processes forked from one that has imported pytest and the host's stand-ins alone.

Half of what a short run takes is those imports. Each run is a process of its own, as `python -m pytest` is,
and ends as one.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

# What stands for a machine of its own: not the plugin, which each run imports by itself.
STANDINS = (
    *(f"handlers.{name}" for name in ("cluster", "nodes", "qemu", "config", "power", "agent", "snapshot")),
    *(f"handlers.{name}" for name in ("clone", "migrate", "storage", "transfers", "pools", "users")),
    *(f"commands.{name}" for name in ("pvecm", "pvesh", "pvesm", "pveum", "pveversion", "qm")),
)
_server: subprocess.Popen[str] | None = None


def run(arguments: Sequence[str], cwd: Path, env: dict[str, str], output: Path, limit: float) -> int:
    """`python -m pytest ARGUMENTS`, both streams into the file `output`; its status, as Popen gives it.

    Raises TimeoutError, and has killed it then, after `limit` seconds.
    """
    server = _started()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([list(arguments), str(cwd), env, str(output)]) + "\n")
    server.stdin.flush()
    pid = int(_line(server.stdout, 20))
    try:
        return int(_line(server.stdout, limit))
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        _line(server.stdout, 20)
        raise


def _line(stream: IO[str], limit: float) -> str:
    if not select.select([stream], [], [], limit)[0]:
        raise TimeoutError(f"a run of pytest did not end within {limit:g} s")
    return stream.readline()


def _started() -> subprocess.Popen[str]:
    """The one that forks; it ends with the process that started it."""
    global _server
    if _server is None:
        command = [sys.executable, __file__]
        _server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        atexit.register(_end, _server)
    return _server


def _end(server: subprocess.Popen[str]) -> None:
    server.communicate()


def _serve() -> None:
    """Fork for each line; returns in the child, with the line's run as this process's."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(*json.loads(line))
            return
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
    os._exit(0)


def _become(arguments: list[str], cwd: str, env: dict[str, str], output: str) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for fd, number in ((nothing, 0), (out, 1), (out, 2)):
        os.dup2(fd, number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # As Python itself does for its variables and for `-m`.
    sys.dont_write_bytecode = bool(env.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:1] = [cwd, *filter(None, env.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv[1:] = arguments


def _import() -> None:
    from importlib import import_module

    from _pytest.config import default_plugins

    for name in default_plugins:
        import_module(f"_pytest.{name}")
    for name in STANDINS:
        import_module(f"pytest_nestedpve.lab.node.{name}")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    _import()
    _serve()
    runpy.run_module("pytest", run_name="__main__", alter_sys=True)
