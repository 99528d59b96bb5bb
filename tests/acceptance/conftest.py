"""Whole pytest runs on the stand-in host: a project of one sentinel, its phases from the hook."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from standin_host import StandinHost

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

CONFTEST = f"""
import dataclasses, os, sys, threading
from pathlib import Path
import pytest
sys.path.insert(0, {str(TESTS)!r})
from standin_host import StandinHost
from standin_phases import standin_phases
from pytest_nestedpve.pve.errors import PveError

HERE = Path(__file__).parent

def pytest_nestedpve_host(config, settings):
    return StandinHost(HERE / "host").connect()

def wrapped(phase):
    def do(environment):
        with (HERE / "done").open("a") as out:
            out.write(phase.name + "\\n")
        if os.environ.get("FAIL") == phase.name and not (HERE / "mended").exists():
            raise PveError(phase.name + " went wrong on purpose")
        if os.environ.get("FAULT") == phase.name:
            raise KeyError("a fault in " + phase.name)
        facts = phase.do(environment)
        if os.environ.get("HANG") == phase.name:
            environment.audit.write("call", phase=phase.name, cmd="hanging")
            threading.Event().wait(60)
        return facts
    return dataclasses.replace(phase, do=do)

def pytest_nestedpve_phases(phases, config):
    phases[:] = [wrapped(phase) for phase in standin_phases()]
"""

STEPS = "from pytest_nestedpve import steps\n"
USERS = """
import os, threading
import pytest

def test_unrelated():
    pass

@pytest.mark.nested_pve(upto="wait_ip")
def test_part(nested_pve):
    assert nested_pve.vmid

def test_whole(nested_pve_run, nested_pve):
    assert nested_pve.name.endswith(nested_pve_run.environment.run.id)
    if os.environ.get("HANG") == "test":
        nested_pve_run.environment.audit.write("call", phase="test", cmd="hanging")
        threading.Event().wait(60)
"""


@dataclass
class Project:
    """A directory with a test project, whose outer host is the directory `host` beside it."""

    path: Path
    env: dict[str, str] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()  # beside this one and pytest-dependency: few plugins start fast

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / f"{name}.py").write_text(text)

    def command(self, *args: str) -> list[str]:
        plugins = ("pytest_nestedpve.plugin", "pytest_dependency", *self.plugins)
        loads = [word for plugin in plugins for word in ("-p", plugin)]
        return [sys.executable, "-m", "pytest", *loads, "-rsfE", *args]

    def environ(self, **env: str) -> dict[str, str]:
        """The environment variables of a run."""
        # CI: with it pytest cuts no line of its summary, so the output differs.
        ci = ("CI", "BUILD_NUMBER")
        inherited = {k: v for k, v in os.environ.items() if k not in ci}
        clean = {k: v for k, v in inherited.items() if not k.startswith(("NESTED_PVE_", "PYTEST_"))}
        state = {"XDG_STATE_HOME": str(self.path / "state"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return {**clean, **state, **self.env, **env}

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        """A run in the background, its output in one pipe."""
        return subprocess.Popen(
            self.command(*args),
            cwd=self.path,
            env=self.environ(**env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A run started from a background shell would inherit an ignored INT.
            preexec_fn=_default_signals,
        )

    def run(self, *args: str, **env: str) -> Result:
        from acceptance import forked

        _, _, _, *arguments = self.command(*args)
        output = self.path.parent / f"{self.path.name}.out"
        status = forked.run(arguments, self.path, self.environ(**env), output, limit=120)
        return Result(status, output.read_text())

    def done(self) -> list[str]:
        """The phases whose action ran, in order, over all runs so far."""
        path = self.path / "done"
        return path.read_text().split() if path.exists() else []

    def audits(self) -> list[list[dict[str, Any]]]:
        """The audit logs of all runs."""
        logs = []
        for path in sorted((self.path / ".nested-pve" / "runs").glob("*/audit.jsonl")):
            logs.append([json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")])
        return logs

    def wait_for(self, process: subprocess.Popen[str], limit: float = 60.0, **fields: str) -> None:
        """Wait until an audit log has a line with these fields. AssertionError if the process ends first."""
        pause = threading.Event()
        for _ in range(int(limit / 0.02)):
            if any(all(line.get(k) == v for k, v in fields.items()) for log in self.audits() for line in log):
                return
            if process.poll() is not None:
                raise AssertionError(f"the run ended before {fields}: {process.communicate()[0]}")
            pause.wait(0.02)
        process.kill()
        raise AssertionError(f"no line {fields} within {limit} s: {process.communicate()[0]}")

    def host(self) -> StandinHost:
        """The outer host of this project."""
        from standin_host import StandinHost

        return StandinHost(self.path / "host")

    def slow(self, **seconds: float) -> None:
        """Have the host's tasks of these types take so many seconds."""
        self.host().slow(**seconds)

    def left(self) -> list[str]:
        """Objects of runs that are left over on the host: VMs, pools, volumes, snippets."""
        api = self.host().connect().api
        leftovers = [f"vm {vm['vmid']}" for vm in api.get("/cluster/resources", type="vm")]
        leftovers += [f"pool {pool['poolid']}" for pool in api.get("/pools") if "npve-" in pool["poolid"]]
        node = api.get("/nodes")[0]["node"]
        for storage in api.get(f"/nodes/{node}/storage"):
            for volume in api.get(f"/nodes/{node}/storage/{storage['storage']}/content"):
                if volume.get("vmid") or "npve-" in volume["volid"]:
                    leftovers.append(f"volume {volume['volid']}")
        return leftovers


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    ret: int
    output: str

    def outcomes(self) -> dict[str, str]:
        """PASSED, FAILED, … by test; needs -v."""
        words = {"PASSED", "FAILED", "SKIPPED", "ERROR"}
        outcomes = {}
        for line in self.output.splitlines():
            parts = line.split()
            if len(parts) >= 2 and "::" in parts[0] and parts[1] in words:
                outcomes[parts[0].split("::")[1]] = parts[1]
        return outcomes


def _default_signals() -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def make_project(path: Path) -> Project:
    """The project of these tests in an empty directory."""
    path.mkdir(parents=True, exist_ok=True)
    project = Project(path)
    project.write(conftest=CONFTEST, test_steps=STEPS, test_users=USERS)
    (path / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers\n")
    return project


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    """A project; after the test, no object of a run may be left over on its host."""
    project = make_project(tmp_path / "project")
    yield project
    try:
        assert project.left() == []
    finally:
        project.host().close()
