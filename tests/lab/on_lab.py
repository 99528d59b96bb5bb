"""Whole pytest sessions on a lab started by hand, and their leftovers as the lab itself lists them."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

CLI = [sys.executable, "-m", "pytest_nestedpve.lab.cli"]
Line = dict[str, Any]
_T = TypeVar("_T")

_numbers = itertools.count()

CONFTEST = """
import dataclasses, os, threading
import pytest
from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.pve.errors import PveError

def pytest_nestedpve_phases(phases, config):
    dropped = os.environ.get("WITHOUT", "").split()
    phases[:] = [wrap(phase) for phase in phases if phase.name not in dropped]
    if "setup_repos" in dropped and "setup_network" not in dropped:
        # The part of setup_repos that later phases need.
        at = [phase.name for phase in phases].index("setup_network") + 1
        phases.insert(at, Phase("allow_content", "allow content", allow_content))

    if os.environ.get("FURTHER"):
        at = [phase.name for phase in phases].index("provision") + 1
        phases.insert(at, Phase("further", "check the lease", lambda environment: environment.check_lease()))

def allow_content(environment):
    environment.inner.api.put("/storage/local", content="images,import,iso,snippets")

def wrap(phase):
    def do(environment):
        facts = phase.do(environment)
        if os.environ.get("FAIL") == phase.name:
            raise PveError(phase.name + " failed on purpose")
        return facts
    return dataclasses.replace(phase, do=do) if os.environ.get("FAIL") == phase.name else phase

@pytest.fixture
def hang(nested_pve_run):
    def hang():
        nested_pve_run.environment.audit.write("call", phase="test", cmd="hanging")
        threading.Event().wait(120)
    return hang

@pytest.fixture
def gate(nested_pve_run):
    def gate():
        nested_pve_run.environment.audit.write("call", phase="test", cmd="waiting")
        with open("gate") as pipe:
            pipe.read()
    return gate

@pytest.fixture
def breaks_before(nested_pve):
    raise RuntimeError("a fixture failed before the test")

@pytest.fixture
def breaks_after(nested_pve):
    yield
    raise RuntimeError("a fixture failed after the test")
"""

STEPS = "from pytest_nestedpve import steps\n"

USERS = """
import pytest

pytestmark = pytest.mark.nested_pve(upto="provision")

def test_good(nested_pve):
    assert nested_pve.name.startswith("nested-pve-")

def test_waits(nested_pve, gate):
    gate()

@pytest.mark.nested_pve(upto="further")
def test_waits_and_more(nested_pve):
    pass

def test_bad(nested_pve):
    assert nested_pve.name == "another"

def test_not_reached(nested_pve, breaks_before):
    pass

def test_breaks_after(nested_pve, breaks_after):
    pass

@pytest.mark.nested_pve(upto="start_vm")
def test_hangs(nested_pve, hang):
    hang()
"""


@dataclass(frozen=True)
class HandLab:
    """A lab that runs until it is stopped."""

    name: str
    nodes: tuple[str, ...] = ("father",)

    def run(self, command: str, *, check: bool = True, node: str = "father") -> str:
        """Run `command` in root's shell on a node by `nestedpve-lab exec` and return its output."""
        done = subprocess.run(
            [*CLI, "exec", self.name, "--node", node, "--", "sh", "-c", command],
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def configurations(self) -> dict[str, str]:
        """The configuration files of all VMs, in base64."""
        output = self.run(
            "cd /etc/pve/nodes && for f in */qemu-server/*.conf; do "
            "echo ${f##*/} $(base64 -w0 $f 2>/dev/null); done"
        )
        fields = [line.split() for line in output.splitlines()]
        return {words[0]: words[1] for words in fields if len(words) == 2}

    def comment(self, run: str) -> str:
        """The comment of a run's pool: its lease."""
        pools = json.loads(self.run("pvesh get /pools --output-format json"))
        (comment,) = [pool["comment"] for pool in pools if pool["poolid"] == f"npve-{run}"]
        return str(comment)

    def lease(self, run: str) -> str:
        """The lease without its expiry, which a renewal changes."""
        return str({**json.loads(self.comment(run)), "expires": None})

    def leftovers(self, low: int, high: int, runs: list[str]) -> list[str]:
        """Output lines of the nodes' own commands with an id from `low` to `high` or one of `runs`."""
        return [line for node in self.nodes for line in self._node_leftovers(node, low, high, runs)]

    def _node_leftovers(self, node: str, low: int, high: int, runs: list[str]) -> list[str]:
        output = self.run(
            "set -e; echo qm; qm list; echo pools; pvesh get /pools --output-format json;"
            "echo images; ls -A /var/lib/vz/images; echo files; ls -A /var/lib/vz/snippets;"
            "echo configurations; ls -A /etc/pve/qemu-server; echo resources;"
            "pvesh get /cluster/resources --type vm --output-format json",
            node=node,
        )
        lines = []
        for line in output.splitlines():
            ids = [int(word) for word in re.findall(r"\b\d{3,9}\b", line)]
            if any(low <= vmid <= high for vmid in ids) or any(run in line for run in runs):
                lines.append(line)
        return lines


def start_by_hand(*nodes: str) -> HandLab:
    """Start a lab with these outer nodes; default: father alone."""
    lab = HandLab(f"hand-{os.getpid()}-{next(_numbers)}", nodes or ("father",))
    subprocess.run([*CLI, "start", lab.name, "--nodes", str(len(lab.nodes))], check=True, capture_output=True)
    return lab


def stop_by_hand(lab: HandLab) -> None:
    subprocess.run([*CLI, "stop", lab.name], check=True, capture_output=True)


@dataclass
class Project:
    """A directory with a test project whose sessions use ids from `low` to `high` of a lab.

    `watched`, `directories`: descendants of a session and their directories, recorded by `watch`.
    """

    path: Path
    lab: HandLab
    low: int
    high: int
    state: Path
    watched: dict[int, str] = field(default_factory=dict)
    directories: set[Path] = field(default_factory=set)

    def create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "tmp").mkdir(exist_ok=True)
        os.mkfifo(self.path / "gate")
        (self.path / "conftest.py").write_text(CONFTEST)
        (self.path / "test_steps.py").write_text(STEPS)
        (self.path / "test_users.py").write_text(USERS)
        (self.path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")

    def start(self, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start a session in the background; its output is written to a file."""
        return self.start_with(["--pve-host", f"lab:{self.lab.name}"], *args, env=env)

    def start_with(
        self, host: list[str], *args: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a session whose host is given by the options `host`."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST_"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        plugins = ["-p", "pytest_nestedpve.plugin", "-p", "pytest_dependency", "-p", "no:cacheprovider"]
        host = [*host, "-o", f"nested_pve_vmid_range={self.low}-{self.high}"]
        size = ["-o", "nested_pve_memory=1024", "-o", "nested_pve_disk=8"]
        with (self.path / "output").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", *plugins, *host, *size, "-rsfE", *args],
                cwd=self.path,
                env={
                    **clean,
                    "XDG_STATE_HOME": str(self.state),
                    "TMPDIR": str(self.path / "tmp"),
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                    **(env or {}),
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # A process group as in a terminal, and no signals ignored as in a background shell.
                start_new_session=True,
                preexec_fn=_reset_signals,
            )

    def open_gate(self) -> None:
        """Let the waiting test continue."""
        (self.path / "gate").write_text("")

    def wait_for_exit(self, process: subprocess.Popen[bytes], limit: float = 300.0) -> int:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the session did not end within {limit} s: {self.output()}") from e

    def run(self, *args: str, env: dict[str, str] | None = None) -> int:
        return self.wait_for_exit(self.start(*args, env=env))

    def output(self) -> str:
        return (self.path / "output").read_text(errors="replace")

    def runs(self) -> list[str]:
        return sorted(path.name for path in self._runs().glob("*") if (path / "audit.jsonl").exists())

    def _runs(self) -> Path:
        return self.path / ".nested-pve" / "runs"

    def audit(self) -> list[Line]:
        """The lines of the project's audit logs, in the order of their runs' ids."""
        lines = []
        for run in self.runs():
            for text in (self._runs() / run / "audit.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def wait_for_line(
        self, process: subprocess.Popen[bytes], matches: Callable[[Line], bool], limit: float = 300.0
    ) -> Line:
        """Wait for a line of an audit log that `matches`, and return the first."""
        return self._wait(process, lambda: next((x for x in self.audit() if matches(x)), None), limit)

    def wait_for_trigger(
        self, process: subprocess.Popen[bytes], trigger: Callable[[Line], bool] | str
    ) -> None:
        """Wait for a matching line of an audit log, or until Ansible runs the playbook of that name."""
        if isinstance(trigger, str):
            self.wait_for_task(process, trigger)
        else:
            self.wait_for_line(process, trigger)

    def wait_for_task(self, process: subprocess.Popen[bytes], playbook: str, limit: float = 300.0) -> str:
        """Wait until Ansible runs a task of `playbook`; return its output so far."""

        def read_output() -> str | None:
            for path in self._runs().glob(f"*/artifacts/*-{playbook}/stdout"):
                if "TASK [" in (text := path.read_text(errors="replace")):
                    return text
            return None

        return self._wait(process, read_output, limit)

    def wait_for_output(self, process: subprocess.Popen[bytes], text: str, limit: float = 60.0) -> None:
        """Wait until the session's output contains `text`."""
        self._wait(process, lambda: text if text in self.output() else None, limit)

    def _wait(self, process: subprocess.Popen[bytes], check: Callable[[], _T | None], limit: float) -> _T:
        pause = threading.Event()
        for _ in range(int(limit / 0.01)):
            if (result := check()) is not None:
                return result
            if process.poll() is not None:
                raise AssertionError(f"the session ended before the awaited event: {self.output()}")
            pause.wait(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"the awaited event did not occur within {limit} s: {self.output()}")

    def configurations(self) -> dict[str, str]:
        """The configuration files of the VMs with the project's ids, in base64."""
        return {
            name: text
            for name, text in self.lab.configurations().items()
            if self.low <= int(name.partition(".")[0]) <= self.high
        }

    # -- leftovers ------------------------------------------------------------------------------

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Record the descendants of the session, and the private directories in their command lines."""
        for pid in descendants(process.pid):
            command = command_line(pid)
            if command:
                self.watched[pid] = command
            self.directories |= {Path(p) for p in re.findall(r"(/[^ =\0]*/npve-[a-z0-9_]{8})/", command)}

    def local_leftovers(self) -> list[str]:
        """Leftovers of the sessions on this machine: processes and temporary files."""
        return [
            *(f"process {pid}: {text}" for pid, text in self.watched.items() if command_line(pid) == text),
            *(f"process {pid}: {command_line(pid)}" for pid in processes_mentioning(str(self.path))),
            *(f"directory {path}" for path in self.directories if path.exists()),
            *(f"file {path}" for path in (self.path / "tmp").iterdir()),
        ]

    def leftovers(self) -> list[str]:
        """Leftovers on the lab and on this machine."""
        return self.lab.leftovers(self.low, self.high, self.runs()) + self.local_leftovers()


def descendants(pid: int) -> list[int]:
    """PIDs of all descendants of `pid`, in other process groups too."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    pids: list[int] = []
    generation = [pid]
    while generation:
        generation = [child for child, parent in parents.items() if parent in generation]
        pids += generation
    return pids


def command_line(pid: int) -> str:
    """The command line of a process; empty if it has exited."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return ""


def processes_mentioning(text: str) -> list[int]:
    """PIDs of other processes whose command or environment contains `text`."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            data = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if re.search(re.escape(text.encode()) + rb"(?![0-9A-Za-z-])", data):
                pids.append(int(path.name))
    return pids


def _reset_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
