"""An environment that is kept, gone on with by further processes, given clean to tests, and ended: on a lab.

Sessions cost minutes, what is to be seen of them are many promises: a fixture runs them one after the other
on one environment, tests judge what it saw.
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

def made(pve):
    return [
        *(user["userid"] for user in pve.inner.api.get("/access/users") if user["userid"] != "root@pam"),
        *(each["storage"] for each in pve.inner.api.get("/storage") if each["storage"] != "local"),
        *(each["vmid"] for each in pve.inner.api.get("/cluster/resources", type="vm") if each["vmid"] == 500),
        *pve.ssh("ls -d /root/of-a-test /srv/store").stdout.split(),
    ]

def test_leaves_much_behind(nested_pve_clean):
    pve = nested_pve_clean
    pve.inner.api.post("/access/users", userid="bob@pve")
    pve.ssh("touch /root/of-a-test; mkdir /srv/store; pvesm add dir store --path /srv/store").check()
    pve.inner.api.post(f"/nodes/{pve.node}/qemu", vmid=500, name="of-a-test")
    assert len(made(pve)) == 5

def test_finds_nothing_of_it(nested_pve_clean):
    assert made(nested_pve_clean) == []
    assert nested_pve_clean.leaf.run("true").ok

@pytest.mark.nested_pve_clean(scope="module")
def test_first_of_the_module(nested_pve_clean):
    nested_pve_clean.ssh("touch /root/of-a-test").check()

@pytest.mark.nested_pve_clean(scope="module")
def test_second_of_the_module(nested_pve_clean):
    assert made(nested_pve_clean) == ["/root/of-a-test"]
"""


@dataclass(frozen=True)
class Session:
    """How one session ended, and its part of the audit log."""

    ret: int
    output: str
    audit: tuple[dict[str, Any], ...]

    def phases(self, status: str) -> list[str]:
        ends = (line for line in self.audit if line["event"] == "phase_end")
        names = ("discover", "cleanup_inner", "destroy")
        return [line["phase"] for line in ends if line["status"] == status and line["phase"] not in names]


@dataclass
class KeptProject:
    """A project whose sessions go on with one environment on a lab that nobody started by hand."""

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
        assert len(logs) < 2, "another environment was made"
        return [json.loads(line) for log in logs for line in log.read_text().splitlines()]

    def nested(self, command: str) -> str:
        """By the ssh_config that the end of a session names."""
        (config,) = (self.path / ".nested-pve" / "runs").glob("*/ssh_config")
        done = subprocess.run(
            ["ssh", "-F", config, "nested", command], capture_output=True, text=True, check=False
        )
        return done.stdout


@dataclass(frozen=True)
class Story:
    """What was seen, in the order in which it happened."""

    project: KeptProject
    first: Session
    outlives: bool
    by_hand: str
    second: Session
    edited: Session
    broken: Session
    half_way: str
    mended: Session
    undone: str
    last: Session
    clean: dict[str, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
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
        outlives = lab in [each.name for each in lifecycle.list_running()]
        by_hand = project.nested("pveversion")
        second = project.run("--nested-keep", "test_steps.py")
        playbook.write_text(text + "# edited\n")
        edited = project.run("--nested-keep", "test_steps.py", "-k", "setup_repos")
        playbook.write_text(text + BREAKS)
        broken = project.run("--nested-keep=on-failure", "test_steps.py", "-k", "setup_repos")
        half_way = project.nested("ls /root")
        playbook.write_text(text + "# mended\n")
        mended = project.run("--nested-keep", "test_steps.py", "-k", "setup_repos")
        undone = project.nested("ls /root")
        last = project.run("test_clean.py", "--junitxml=junit.xml")
        yield Story(
            project, first, outlives, by_hand, second, edited, broken, half_way, mended, undone, last,
            given(path / "junit.xml"),
        )  # fmt: skip
    finally:
        lifecycle.stop(lab)


def given(junit: Path) -> dict[str, str]:
    """How each test was given its clean state."""
    import xml.etree.ElementTree as ElementTree

    return {
        case.attrib["name"]: each.attrib["value"]
        for case in ElementTree.parse(junit).iter("testcase")
        for each in case.iter("property")
        if each.attrib["name"] == "nested_pve_clean"
    }


def test_a_kept_environment_and_its_lab_outlive_their_session(story: Story) -> None:
    assert story.first.ret == 0, story.first.output
    assert "is kept until" in story.first.output
    assert story.outlives
    assert story.by_hand.startswith("pve-manager/")
    taken = [line for line in story.first.audit if line["event"] == "snapshot"]
    assert {line["status"] for line in taken} == {"taken"}
    assert taken[-1]["phase"] == "verify_ssh_chain"  # the clean state, though no test wants it yet


def test_with_nothing_changed_all_is_proved_by_probes(story: Story) -> None:
    assert story.second.ret == 0, story.second.output
    assert story.second.phases("done") == ["preflight", "verify_ssh_chain"]
    assert len(story.second.phases("proved")) == 12
    assert not [line for line in story.second.audit if line["event"] == "playbook"]


def test_after_an_edit_the_chosen_step_runs_and_nothing_else(story: Story) -> None:
    assert story.edited.ret == 0, story.edited.output
    assert story.edited.phases("done") == ["preflight", "setup_repos"]
    played = [line["playbook"] for line in story.edited.audit if line["event"] == "playbook"]
    assert played == ["nested-pve-repos.yml"]


def test_a_failed_session_is_kept_as_it_failed(story: Story) -> None:
    assert story.broken.ret == 1, story.broken.output
    assert "is kept until" in story.broken.output
    assert "half-way" in story.half_way


def test_what_a_phase_left_half_way_is_undone_by_a_rollback(story: Story) -> None:
    assert story.mended.ret == 0, story.mended.output
    assert "setup_repos broke half-way last time: went back to the snapshot after" in story.mended.output
    assert "half-way" not in story.undone
    assert "setup_repos" in story.mended.phases("done")


def test_a_test_gets_the_state_after_set_up_whatever_came_before(story: Story) -> None:
    assert story.last.ret == 0, story.last.output
    assert "4 passed" in story.last.output
    why = story.clean["test_finds_nothing_of_it"]
    assert why.startswith("rolled back: ")
    assert {"/etc/pve", "guests", "/root/of-a-test", "/srv/store"} <= set(why[13:].split(", "))


def test_a_module_can_share_one_clean_state(story: Story) -> None:
    assert "the VM inside, which a test logged in to" in story.clean["test_first_of_the_module"]
    assert "test_second_of_the_module" not in story.clean


def test_a_session_without_keep_ends_it_and_the_lab_goes(story: Story) -> None:
    assert "had been kept; torn down, as --nested-keep was not given" in story.last.output
    assert [line["status"] for line in story.last.audit if line["event"] == "teardown"][-1] == "clean"
    assert not list((story.project.path / "state" / "nested-pve" / "kept").iterdir())
    wait_until(
        lambda: story.project.lab not in [lab.name for lab in lifecycle.list_running()],
        deadline=Deadline(30),
        what="the lab to stop after its last session",
    )
