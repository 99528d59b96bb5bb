"""Whole pytest sessions on a lab started by hand, and the lab itself asked about them, not the harness."""

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
    phases[:] = [wrapped(phase) for phase in phases if phase.name not in dropped]
    if "setup_repos" in dropped and "setup_network" not in dropped:
        # What the phase does that those after it need.
        at = [phase.name for phase in phases].index("setup_network") + 1
        phases.insert(at, Phase("allow_content", "allow content", allow_content))

    if os.environ.get("FURTHER"):
        at = [phase.name for phase in phases].index("provision") + 1
        phases.insert(at, Phase("further", "make more", lambda environment: environment.check_lease()))

def allow_content(environment):
    environment.inner.api.put("/storage/local", content="images,import,iso,snippets")

def wrapped(phase):
    def do(environment):
        facts = phase.do(environment)
        if os.environ.get("FAIL") == phase.name:
            raise PveError(phase.name + " went wrong on purpose")
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
    raise RuntimeError("a fixture went wrong before the test")

@pytest.fixture
def breaks_after(nested_pve):
    yield
    raise RuntimeError("a fixture went wrong after the test")
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
    """A lab that stays until it is stopped."""

    name: str
    nodes: tuple[str, ...] = ("father",)

    def ask(self, command: str, *, check: bool = True, node: str = "father") -> str:
        """What root's shell on father, or on another node, says to `command`, by `nestedpve-lab exec`."""
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
        told = self.ask(
            "cd /etc/pve/nodes && for f in */qemu-server/*.conf; do "
            "echo ${f##*/} $(base64 -w0 $f 2>/dev/null); done"
        )
        parts = [line.split() for line in told.splitlines()]
        return {each[0]: each[1] for each in parts if len(each) == 2}

    def comment(self, run: str) -> str:
        """The comment of a run's pool: its lease."""
        pools = json.loads(self.ask("pvesh get /pools --output-format json"))
        (comment,) = [pool["comment"] for pool in pools if pool["poolid"] == f"npve-{run}"]
        return str(comment)

    def lease(self, run: str) -> str:
        """The same without its end, which a renewal moves."""
        return str({**json.loads(self.comment(run)), "expires": None})

    def left(self, low: int, high: int, runs: list[str]) -> list[str]:
        """What the lab has of ids from `low` to `high`, and of runs: by its nodes' own commands."""
        return [line for node in self.nodes for line in self._left(node, low, high, runs)]

    def _left(self, node: str, low: int, high: int, runs: list[str]) -> list[str]:
        told = self.ask(
            "set -e; echo qm; qm list; echo pools; pvesh get /pools --output-format json;"
            "echo images; ls -A /var/lib/vz/images; echo files; ls -A /var/lib/vz/snippets;"
            "echo configurations; ls -A /etc/pve/qemu-server; echo resources;"
            "pvesh get /cluster/resources --type vm --output-format json",
            node=node,
        )
        found = []
        for line in told.splitlines():
            ids = [int(word) for word in re.findall(r"\b\d{3,9}\b", line)]
            if any(low <= vmid <= high for vmid in ids) or any(run in line for run in runs):
                found.append(line)
        return found


def start_by_hand(*nodes: str) -> HandLab:
    """A lab with father, or with these outer nodes."""
    lab = HandLab(f"hand-{os.getpid()}-{next(_numbers)}", nodes or ("father",))
    subprocess.run([*CLI, "start", lab.name, "--nodes", str(len(lab.nodes))], check=True, capture_output=True)
    return lab


def stop_by_hand(lab: HandLab) -> None:
    subprocess.run([*CLI, "stop", lab.name], check=True, capture_output=True)


@dataclass
class Project:
    """A directory with a test project whose sessions take ids from `low` to `high` of a lab.

    `watched`: processes below a session, and their private directories, seen when it was about to be ended.
    """

    path: Path
    lab: HandLab
    low: int
    high: int
    state: Path
    watched: dict[int, str] = field(default_factory=dict)
    directories: set[Path] = field(default_factory=set)

    def write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "tmp").mkdir(exist_ok=True)
        os.mkfifo(self.path / "gate")
        (self.path / "conftest.py").write_text(CONFTEST)
        (self.path / "test_steps.py").write_text(STEPS)
        (self.path / "test_users.py").write_text(USERS)
        (self.path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")

    def start(self, *args: str, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A session in the background; its output goes to a file."""
        return self.start_with(["--pve-host", f"lab:{self.lab.name}"], *args, env=env)

    def start_with(
        self, host: list[str], *args: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """The same, with the host named by these options."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST_"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        plugins = ["-p", "pytest_nestedpve.plugin", "-p", "pytest_dependency", "-p", "no:cacheprovider"]
        host = [*host, "-o", f"nested_pve_vmid_range={self.low}-{self.high}"]
        shape = ["-o", "nested_pve_memory=1024", "-o", "nested_pve_disk=8"]
        with (self.path / "output").open("wb") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", *plugins, *host, *shape, "-rsfE", *args],
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
                # A group of its own, as in a terminal; a background shell would have it ignore signals.
                start_new_session=True,
                preexec_fn=_default_signals,
            )

    def open_gate(self) -> None:
        """Have the test that waits go on."""
        (self.path / "gate").write_text("")

    def end(self, process: subprocess.Popen[bytes], limit: float = 300.0) -> int:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired as e:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise AssertionError(f"the session did not end within {limit} s: {self.output()}") from e

    def run(self, *args: str, env: dict[str, str] | None = None) -> int:
        return self.end(self.start(*args, env=env))

    def output(self) -> str:
        return (self.path / "output").read_text(errors="replace")

    def runs(self) -> list[str]:
        return sorted(path.name for path in self._runs().glob("*") if (path / "audit.jsonl").exists())

    def _runs(self) -> Path:
        return self.path / ".nested-pve" / "runs"

    def audit(self) -> list[Line]:
        """The lines of all audit logs here, in the order of their runs' ids."""
        lines = []
        for run in self.runs():
            for text in (self._runs() / run / "audit.jsonl").read_text(errors="replace").splitlines():
                with contextlib.suppress(ValueError):
                    lines.append(json.loads(text))
        return lines

    def wait_for(
        self, process: subprocess.Popen[bytes], wanted: Callable[[Line], bool], limit: float = 300.0
    ) -> Line:
        """The first line of an audit log that is `wanted`, as soon as it is there."""
        return self._wait(process, lambda: next((line for line in self.audit() if wanted(line)), None), limit)

    def wait_until(self, process: subprocess.Popen[bytes], what: Callable[[Line], bool] | str) -> None:
        """Until such a line of an audit log is there, or Ansible is at work on the playbook of that name."""
        if isinstance(what, str):
            self.wait_for_task(process, what)
        else:
            self.wait_for(process, what)

    def wait_for_task(self, process: subprocess.Popen[bytes], playbook: str, limit: float = 300.0) -> str:
        """Until Ansible is at work on a task of `playbook`."""

        def at_work() -> str | None:
            for path in self._runs().glob(f"*/artifacts/*-{playbook}/stdout"):
                if "TASK [" in (text := path.read_text(errors="replace")):
                    return text
            return None

        return self._wait(process, at_work, limit)

    def wait_for_output(self, process: subprocess.Popen[bytes], text: str, limit: float = 60.0) -> None:
        """Until the session has said so."""
        self._wait(process, lambda: text if text in self.output() else None, limit)

    def _wait(self, process: subprocess.Popen[bytes], check: Callable[[], _T | None], limit: float) -> _T:
        pause = threading.Event()
        for _ in range(int(limit / 0.01)):
            if (found := check()) is not None:
                return found
            if process.poll() is not None:
                raise AssertionError(f"the session ended before what was waited for: {self.output()}")
            pause.wait(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"not within {limit} s: {self.output()}")

    def configurations(self) -> dict[str, str]:
        """The configuration files of the VMs with our ids, byte by byte."""
        return {
            name: text
            for name, text in self.lab.configurations().items()
            if self.low <= int(name.partition(".")[0]) <= self.high
        }

    # -- what is left ---------------------------------------------------------------------------

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """Remember the processes below the session, and the private directories they work in."""
        for pid in below(process.pid):
            said = command_of(pid)
            if said:
                self.watched[pid] = said
            self.directories |= {Path(each) for each in re.findall(r"(/[^ =\0]*/npve-[a-z0-9_]{8})/", said)}

    def left_here(self) -> list[str]:
        """What is left of the sessions on this machine: processes and temporary files."""
        found = [f"process {pid}: {said}" for pid, said in self.watched.items() if command_of(pid) == said]
        found += [f"process {pid}: {command_of(pid)}" for pid in mentioning(str(self.path))]
        found += [f"directory {each}" for each in self.directories if each.exists()]
        found += [f"file {each}" for each in (self.path / "tmp").iterdir()]
        return found

    def left(self) -> list[str]:
        """What is left on the lab and on this machine."""
        return self.lab.left(self.low, self.high, self.runs()) + self.left_here()


def below(pid: int) -> list[int]:
    """All processes below `pid`, those that left its session too."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError):
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
    found: list[int] = []
    front = [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def command_of(pid: int) -> str:
    """The command line of a process; empty when it is gone or dead."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()
    return ""


def mentioning(text: str) -> list[int]:
    """Living processes other than this one whose command or environment has `text`."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        if int(path.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            data = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
            if re.search(re.escape(text.encode()) + rb"(?![0-9A-Za-z-])", data):
                found.append(int(path.name))
    return found


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
