"""A lab whose outer host is a cluster of two nodes: placement, migration and deletion of the nested PVE."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.on_lab import CLI, HandLab, Project, start_by_hand, stop_by_hand

LOW = 96800
FOREIGN = LOW + 5  # a foreign VM on father2, with an id from the range of the sessions

USERS = """
import pytest

@pytest.mark.nested_pve(upto="provision")
def test_waits(nested_pve, gate):
    gate()

@pytest.mark.nested_pve(upto="wait_ip")
def test_continues(nested_pve):
    pass
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[HandLab]:
    """A lab of father and father2. More memory is used on father; both share a storage."""
    lab = start_by_hand("father", "father2")
    lab.run("qm create 105 --memory 3000 --name fills && qm start 105")
    lab.run("pvesm add dir common --path /mnt/shared --shared 1 --content images,snippets")
    lab.run(
        f"qm create {FOREIGN} --name nested-pve-of-somebody --tags theirs --scsi0 local:1", node="father2"
    )
    yield lab
    stop_by_hand(lab)


@pytest.fixture
def project(pair: HandLab, tmp_path: Path) -> Iterator[Project]:
    """A project whose sessions must leave nothing behind, and the foreign VM unchanged."""
    project = Project(tmp_path / "project", pair, LOW, LOW + 9, tmp_path / "state")
    project.create()
    (project.path / "test_users.py").write_text(USERS)
    before = project.configurations(), volumes(pair)
    yield project
    assert (project.configurations(), volumes(pair)) == before
    assert list(before[0]) == [f"{FOREIGN}.conf"]
    assert [line for line in project.leftovers() if str(FOREIGN) not in line] == []


def volumes(lab: HandLab) -> list[str]:
    """The files on the storages of both nodes, and on the shared one."""
    find = "find /var/lib/vz/images /var/lib/vz/snippets /mnt/shared -type f -not -path '*/.*'"
    return [f"{node}{file}" for node in lab.nodes for file in sorted(lab.run(find, node=node).split())]


def power(lab: HandLab, state: str) -> None:
    subprocess.run([*CLI, "power", lab.name, "father2", state], check=True, capture_output=True)


def start_waiting(project: Project, *args: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start a session whose VM is created on father2, and off; return it and the VM's id."""
    process = project.start("test_users.py", *args)
    project.wait_for_line(process, lambda line: line.get("cmd") == "waiting")
    return process, vm_on(project, "father2")


def vm_on(project: Project, node: str) -> int:
    """The id of the only VM of the sessions, which has to be on `node`."""
    vms = json.loads(project.lab.run("pvesh get /cluster/resources --type vm --output-format json"))
    (vm,) = [vm for vm in vms if LOW <= vm["vmid"] < LOW + 10 and vm["vmid"] != FOREIGN]
    assert vm["node"] == node
    return int(vm["vmid"])


def test_an_environment_is_created_on_the_node_with_more_memory_and_removed_completely(
    project: Project,
) -> None:
    status = project.run("-v", "test_steps.py", env={"WITHOUT": "setup_repos sync_repos"})
    assert status == 0, project.output()
    posted = [line["cmd"] for line in project.audit() if line.get("cmd", "").endswith("/qemu")]
    assert "post /nodes/father2/qemu" in posted
    assert "post /nodes/father/qemu" not in posted
    assert "test_verify_ssh_chain PASSED" in project.output()


@pytest.mark.parametrize("storage", ["local", "common"])
def test_a_vm_that_was_migrated_between_two_phases_is_used_and_destroyed_on_its_new_node(
    project: Project, storage: str
) -> None:
    process, vmid = start_waiting(project, "-o", f"nested_pve_storage={storage}")
    project.lab.run(f"qm migrate {vmid} father", node="father2")
    project.open_gate()
    assert project.wait_for_exit(process) == 0, project.output()
    assert f"VM {vmid} was moved from father2 to father" in project.output()


def test_a_migrated_vm_of_a_killed_session_is_destroyed_on_its_new_node(project: Project) -> None:
    process, vmid = start_waiting(project)
    process.send_signal(signal.SIGKILL)
    process.wait()
    project.lab.run(f"qm migrate {vmid} father", node="father2")
    assert vm_on(project, "father") == vmid
    assert project.run("--nested-destroy-only") == 0, project.output()


def test_a_vm_on_an_offline_node_is_reported_and_destroyed_when_the_node_is_back(project: Project) -> None:
    process, vmid = start_waiting(project, "-k", "waits")
    power(project.lab, "off")
    project.open_gate()
    assert project.wait_for_exit(process, limit=90) != 0
    assert f"VM {vmid} on father2: its node father2 is offline" in project.output()
    assert vm_on(project, "father2") == vmid
    power(project.lab, "on")
    assert project.run("--nested-destroy-only") == 0, project.output()
