"""After a failure, terminal and report show known symptoms, and the run's directory has collected files."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from acceptance.conftest import Project

pytestmark = pytest.mark.thorough

# A guest whose agent answers, and a host that can be configured to fail with a message, or to hang.
HOST = """

import html
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost

SECRET = "hunter2-of-the-mirror"
OUTPUTS = {
    "journalctl": "nested systemd[1]: Started ssh\\n" + (HERE / "journal").read_text()
        if (HERE / "journal").exists() else "nested systemd[1]: Started ssh\\n",
    "cloud-init.log": "util.py[DEBUG]: fetched with " + SECRET + "\\n",
    "cloud-init status": "status: done\\n",
    "ip addr": "2: eth0    inet 10.77.7.50/24\\n$6$salt$0123456789abcdefABCDEF\\n",
}

class Guest:
    def __init__(self, api):
        self.api = api
        self.asked = []
        self.lock = threading.Lock()

    def __getattr__(self, name):
        return getattr(self.api, name)

    def _hang(self):
        if os.environ.get("SILENT") and (HERE / "failed").exists() and not (HERE / "ending").exists():
            threading.Event().wait(120)

    def get(self, path, /, **params):
        self._hang()
        if path.endswith("/agent/exec-status"):
            script = self.asked[int(params["pid"]) - 1]
            text = next((output for word, output in OUTPUTS.items() if word in script), "")
            return {"result": {"exited": 1, "exitcode": 0, "out-data": text}}
        return self.api.get(path, **params)

    def post(self, path, /, **params):
        self._hang()
        if path.endswith("/agent/exec"):
            with self.lock:
                self.asked.append(params["command"][-1])
                return {"result": {"pid": len(self.asked)}}
        return self.api.post(path, **params)

    def put(self, path, /, **params):
        return self.api.put(path, **params)

    def delete(self, path, /, **params):
        return self.api.delete(path, **params)

def pytest_nestedpve_host(config, settings):
    host = StandinHost(HERE / "host").connect()
    return PveHost(host.name, host.ssh, Guest(host.api))

def pytest_nestedpve_phases(phases, config):
    def fails(phase):
        def do(environment):
            environment.hide(SECRET)
            facts = phase.do(environment)
            if (HERE / "says").exists():
                (HERE / "failed").touch()
                raise PveError((HERE / "says").read_text())
            return facts
        return dataclasses.replace(phase, do=do)
    name = os.environ.get("BREAKS", "ensure_pve")
    phases[:] = [fails(phase) if phase.name == name else phase for phase in standin_phases()]

def pytest_nestedpve_phase_finished(phase, status, seconds, facts, cause):
    if status == "failed":
        (HERE / "ending").touch()  # from here on the host answers again
"""


@pytest.fixture
def broken(project: Project) -> Project:
    """A project whose host and phases can be configured to fail with a message."""
    path = project.path / "conftest.py"
    text = path.read_text()
    path.write_text(text[: text.index("def pytest_nestedpve_host")] + HOST)
    return project


def fail(project: Project, message: str, **env: str) -> str:
    (project.path / "says").write_text(message)
    result = project.run("test_steps.py", "-o", "console_output_style=classic", **env)
    assert result.ret == 1, result.output
    return result.output


def run_directory(project: Project) -> Path:
    (log,) = (project.path / ".nested-pve" / "runs").glob("*/audit.jsonl")
    return log.parent


def events(project: Project, name: str) -> list[dict[str, Any]]:
    (log,) = project.audits()
    return [line for line in log if line["event"] == name]


#: Messages of PVE 9.2.11: recordings power-038, ownL-035, tasks-025.
RECORDED = {
    "task UPID:father:0000103E:00083967:6B04D31A:qmstart:102:root@pam: ended: bridge 'vmbr9' does not "
    "exist": (
        "the bridge does not exist on that node",
        "-o nested_pve_bridge=NAME",
    ),
    "post /nodes/father/storage/local/download-url: storage 'local' is not configured for content-type "
    "'import'": ("the storage is not configured for that content", "pvesm set local --content"),
    "trying to acquire lock...\ncan't lock file '/var/lock/qemu-server/lock-103.conf' - got timeout": (
        "the VM's lock file was held too long",
        "qm stop 103 --overrule-shutdown 1",
    ),
}


@pytest.mark.parametrize("words", RECORDED, ids=["bridge", "content", "lock"])
def test_a_known_failure_is_explained_at_the_end_and_in_the_report(broken: Project, words: str) -> None:
    title, fix = RECORDED[words]
    output = fail(broken, words)
    end = output[output.index("first cause, in ensure_pve") :]
    assert f"known: {title}" in end
    assert "means: " in end
    assert fix in end
    page = (run_directory(broken) / "report.html").read_text()
    assert title.replace("'", "&#39;") in page
    assert fix in page
    (symptom,) = events(broken, "symptom")
    assert symptom["phase"] == "ensure_pve"
    assert symptom["where"] == "the error itself"


def test_an_unknown_failure_is_given_no_explanation(broken: Project) -> None:
    output = fail(broken, "something that nobody has seen before")
    assert "known: " not in output
    assert events(broken, "symptom") == []


def test_a_symptom_in_the_guests_journal_alone_is_recognised(broken: Project) -> None:
    (broken.path / "journal").write_text(
        "nested pmxcfs[812]: [main] crit: Unable to resolve node name 'nested' to a non-loopback IP address\n"
    )
    output = fail(broken, "playbook pve-install.yml failed (ansible-playbook ended with 2)")
    assert "known: the node's name resolves to a loopback address" in output
    assert "in nested-journal.txt" in output


def test_collected_files_are_masked_and_readable_by_their_owner_only(broken: Project) -> None:
    output = fail(broken, "bridge 'vmbr9' does not exist")
    folder = run_directory(broken) / "artifacts" / "failure-ensure_pve"
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert {
        "nested-config.json",
        "nested-status.json",
        "nested-journal.txt",
        "nested-cloud-init.log",
        "nested-cloud-init.txt",
        "nested-network.txt",
    } <= files.keys()
    assert any(name.startswith("task-") and "qmcreate" in name for name in files)
    assert '"status": "running"' in files["nested-status.json"]
    assert "fetched with ********" in files["nested-cloud-init.log"]
    assert "inet 10.77.7.50/24" in files["nested-network.txt"]
    assert not any("hunter2" in text or "0123456789abcdefABCDEF" in text for text in files.values())
    assert "hunter2" not in output + (run_directory(broken) / "report.html").read_text()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert f"files:    {folder}" in output
    (collected,) = events(broken, "artifacts")
    assert {file["file"] for file in collected["files"]} == files.keys()
    # This host has no screen and no serial console; the report lists them as missing.
    assert {"screen of the nested VM", "serial console of the nested VM"} <= {
        item["what"] for item in collected["missing"]
    }
    page = (run_directory(broken) / "report.html").read_text()
    assert 'href="artifacts/failure-ensure_pve/nested-journal.txt"' in page
    assert "not collected: screen of the nested VM" in page


def test_a_host_that_stops_answering_delays_the_end_by_no_more_than_the_limit(broken: Project) -> None:
    started = time.monotonic()
    output = fail(broken, "bridge 'vmbr9' does not exist", SILENT="1", NESTED_PVE_TIMEOUT_SCALE="0.1")
    assert "known: the bridge does not exist on that node" in output
    (collected,) = events(broken, "artifacts")
    assert collected["files"] == []
    assert collected["ms"] < 3500, "more than the 30 s for everything, scaled to a tenth"
    assert time.monotonic() - started < 30


def test_files_are_collected_after_a_failed_test_without_explanation(broken: Project) -> None:
    (broken.path / "test_mine.py").write_text("def test_mine(nested_pve):\n    assert nested_pve.vmid == 0\n")
    result = broken.run("test_mine.py")
    assert result.ret == 1
    folder = run_directory(broken) / "artifacts" / "failure-tests"
    assert (folder / "nested-journal.txt").exists()
    assert "logs and states after tests" in result.output
    assert events(broken, "symptom") == []
    # The run was set up and torn down, but its verdict is not "passed".
    assert "set up, tests failed, no leftovers" in result.output
    assert "set up, tests failed, no leftovers" in (run_directory(broken) / "report.html").read_text()


def test_a_run_without_failure_collects_nothing(broken: Project) -> None:
    result = broken.run("test_steps.py")
    assert result.ret == 0, result.output
    assert os.listdir(run_directory(broken) / "artifacts") == []
    assert events(broken, "artifacts") == events(broken, "symptom") == []


def test_leftovers_of_a_teardown_are_explained_too(project: Project) -> None:
    """A VM that somebody protects during the session remains; the summary has the reason and the fix."""
    (project.path / "test_mine.py").write_text(
        "def test_mine(nested_pve):\n"
        "    path = f'/nodes/{nested_pve.host.node}/qemu/{nested_pve.vmid}/config'\n"
        "    nested_pve.host.api.put(path, protection=1)\n"
    )
    result = project.run("test_mine.py")
    assert result.ret == 1, result.output
    assert "the teardown left something behind" in result.output
    assert "known (after destroy): the VM is protected" in result.output, result.output
    assert "--protection 0" in result.output
    folder = run_directory(project) / "artifacts" / "failure-destroy"
    assert '"protection": 1' in next(folder.glob("left-*-config.json")).read_text()
    for vmid in project.host().vms():
        project.host().edit_vm(vmid, protection=None)
    assert project.run("--nested-destroy-only").ret == 0
