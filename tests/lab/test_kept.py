"""A kept environment on a lab: resumed by further sessions, reset to a clean state for tests, and destroyed.

Sessions take minutes and many tests check them: a fixture runs them one after another on one environment and
records the results, tests check the records.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_nestedpve.lab import lifecycle
from pytest_nestedpve.pve.deadline import Deadline, wait_until

PLAYBOOKS = Path(__file__).parents[2] / "playbooks"
BREAKS = """\
  post_tasks:
    - ansible.builtin.command: touch /root/half-way
    - ansible.builtin.command: /bin/false
"""
CLEAN = """
import pytest

def changes(pve):
    return [
        *(user["userid"] for user in pve.inner.api.get("/access/users") if user["userid"] != "root@pam"),
        *(s["storage"] for s in pve.inner.api.get("/storage") if s["storage"] != "local"),
        *(vm["vmid"] for vm in pve.inner.api.get("/cluster/resources", type="vm") if vm["vmid"] == 500),
        *pve.ssh("ls -d /root/of-a-test /srv/store").stdout.split(),
    ]

def test_makes_many_changes(nested_pve_clean):
    pve = nested_pve_clean
    pve.inner.api.post("/access/users", userid="bob@pve")
    pve.ssh("touch /root/of-a-test; mkdir /srv/store; pvesm add dir store --path /srv/store").check()
    pve.inner.api.post(f"/nodes/{pve.node}/qemu", vmid=500, name="of-a-test")
    assert len(changes(pve)) == 5

def test_finds_no_changes(nested_pve_clean):
    assert changes(nested_pve_clean) == []
    assert nested_pve_clean.leaf.run("true").ok

@pytest.mark.nested_pve_clean(scope="module")
def test_first_of_the_module(nested_pve_clean):
    nested_pve_clean.ssh("touch /root/of-a-test").check()

@pytest.mark.nested_pve_clean(scope="module")
def test_second_of_the_module(nested_pve_clean):
    assert changes(nested_pve_clean) == ["/root/of-a-test"]
"""


@dataclass(frozen=True)
class Session:
    """Exit status and output of a session, and its lines of the audit log."""

    ret: int
    output: str
    audit: tuple[dict[str, Any], ...]

    def phases(self, status: str) -> list[str]:
        ends = (line for line in self.audit if line["event"] == "phase_end")
        names = ("discover", "cleanup_inner", "destroy")
        return [line["phase"] for line in ends if line["status"] == status and line["phase"] not in names]


@dataclass
class KeptProject:
    """A project whose sessions resume one environment on a lab that the first session started."""

    path: Path
    lab: str

    def run(self, *args: str) -> Session:
        before = len(self._lines())
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        if "NESTED_PVE_CACHE" in os.environ:
            clean["NESTED_PVE_CACHE"] = os.environ["NESTED_PVE_CACHE"]
        pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:randomly"]
        done = subprocess.run(
            [*pytest, "--pve-host", f"lab:{self.lab}", *args],
            cwd=self.path,
            env={**clean, "XDG_STATE_HOME": str(self.path / "state"), "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            start_new_session=True,
        )
        return Session(done.returncode, done.stdout + done.stderr, tuple(self._lines()[before:]))

    def _lines(self) -> list[dict[str, Any]]:
        logs = sorted((self.path / ".nested-pve" / "runs").glob("*/audit.jsonl"))
        assert len(logs) < 2, "another environment was created"
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    def nested(self, command: str) -> str:
        """Run a command on the nested PVE by the ssh_config that the session's summary names."""
        (config,) = (self.path / ".nested-pve" / "runs").glob("*/ssh_config")
        done = subprocess.run(
            ["ssh", "-F", config, "nested", command], capture_output=True, text=True, check=False
        )
        return done.stdout


@dataclass(frozen=True)
class History:
    """Sessions and states, in the order in which they happened."""

    project: KeptProject
    first: Session
    lab_runs_after_first: bool
    by_hand: str
    second: Session
    edited: Session
    broken: Session
    half_way: str
    fixed: Session
    undone: str
    last: Session
    clean: dict[str, str]


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> Iterator[History]:
    path = tmp_path_factory.mktemp("kept")
    lab = f"kept-{os.getpid()}"
    project = KeptProject(path, lab)
    (path / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    (path / "test_clean.py").write_text(CLEAN)
    (path / "pytest.ini").write_text("[pytest]\nnested_pve_playbook_dir = playbooks\n")
    shutil.copytree(PLAYBOOKS, path / "playbooks", ignore=shutil.ignore_patterns("__pycache__"))
    playbook = path / "playbooks" / "nested-pve-repos.yml"
    text = playbook.read_text()
    try:
        first = project.run("--nested-keep", "test_steps.py")
        lab_runs = lab in [info.name for info in lifecycle.list_running()]
        by_hand = project.nested("pveversion")
        second = project.run("--nested-keep", "test_steps.py")
        playbook.write_text(text + "# edited\n")
        edited = project.run("--nested-keep", "test_steps.py", "-k", "setup_repos")
        playbook.write_text(text + BREAKS)
        broken = project.run("--nested-keep=on-failure", "test_steps.py", "-k", "setup_repos")
        half_way = project.nested("ls /root")
        playbook.write_text(text + "# fixed\n")
        fixed = project.run("--nested-keep", "test_steps.py", "-k", "setup_repos")
        undone = project.nested("ls /root")
        last = project.run("test_clean.py", "--junitxml=junit.xml")
        yield History(
            project, first, lab_runs, by_hand, second, edited, broken, half_way, fixed, undone, last,
            read_clean_states(path / "junit.xml"),
        )  # fmt: skip
    finally:
        lifecycle.stop(lab)


def read_clean_states(junit: Path) -> dict[str, str]:
    """The value of the property nested_pve_clean by test: how its clean state was reached."""
    import xml.etree.ElementTree as ElementTree

    return {
        case.attrib["name"]: item.attrib["value"]
        for case in ElementTree.parse(junit).iter("testcase")
        for item in case.iter("property")
        if item.attrib["name"] == "nested_pve_clean"
    }


def test_a_kept_environment_and_its_lab_outlive_their_session(history: History) -> None:
    assert history.first.ret == 0, history.first.output
    assert "is kept until" in history.first.output
    assert history.lab_runs_after_first
    assert history.by_hand.startswith("pve-manager/")
    snapshots = [line for line in history.first.audit if line["event"] == "snapshot"]
    assert {line["status"] for line in snapshots} == {"taken"}
    assert snapshots[-1]["phase"] == "verify_ssh_chain"  # the clean state, though no test uses it yet


def test_without_changes_all_phases_are_proved_by_probes(history: History) -> None:
    assert history.second.ret == 0, history.second.output
    assert history.second.phases("done") == ["preflight", "verify_ssh_chain"]
    assert len(history.second.phases("proved")) == 12
    assert not [line for line in history.second.audit if line["event"] == "playbook"]


def test_after_an_edit_only_the_selected_step_runs(history: History) -> None:
    assert history.edited.ret == 0, history.edited.output
    assert history.edited.phases("done") == ["preflight", "setup_repos"]
    played = [line["playbook"] for line in history.edited.audit if line["event"] == "playbook"]
    assert played == ["nested-pve-repos.yml"]


def test_the_environment_of_a_failed_session_is_kept_unchanged(history: History) -> None:
    assert history.broken.ret == 1, history.broken.output
    assert "is kept until" in history.broken.output
    assert "half-way" in history.half_way


def test_partial_changes_of_a_failed_phase_are_undone_by_a_rollback(history: History) -> None:
    assert history.fixed.ret == 0, history.fixed.output
    assert "setup_repos broke half-way last time: rolled back to the snapshot after" in history.fixed.output
    assert "half-way" not in history.undone
    assert "setup_repos" in history.fixed.phases("done")


def test_a_test_gets_the_state_after_set_up_after_any_earlier_test(history: History) -> None:
    assert history.last.ret == 0, history.last.output
    assert "4 passed" in history.last.output
    why = history.clean["test_finds_no_changes"]
    assert why.startswith("rolled back: ")
    assert {"/etc/pve", "guests", "/root/of-a-test", "/srv/store"} <= set(why[13:].split(", "))


def test_a_module_can_share_one_clean_state(history: History) -> None:
    assert "the VM inside, which a test logged in to" in history.clean["test_first_of_the_module"]
    assert "test_second_of_the_module" not in history.clean


def test_a_session_without_keep_destroys_the_environment_and_the_lab_stops(history: History) -> None:
    assert "had been kept; torn down, as --nested-keep was not given" in history.last.output
    assert [line["status"] for line in history.last.audit if line["event"] == "teardown"][-1] == "clean"
    assert not list((history.project.path / "state" / "nested-pve" / "kept").iterdir())
    wait_until(
        lambda: history.project.lab not in [lab.name for lab in lifecycle.list_running()],
        deadline=Deadline(30),
        what="the lab to stop after its last session",
    )
