"""A lab whose outer host is a cluster of two: where the nested PVE is put, found again and removed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab.on_lab import CLI, HandLab, Project, start_by_hand, stop_by_hand

LOW = 96800
FOREIGN = LOW + 5  # somebody's VM, on father2, of an id that sessions may draw

USERS = """
import pytest

@pytest.mark.nested_pve(upto="provision")
def test_waits(nested_pve, gate):
    gate()

@pytest.mark.nested_pve(upto="wait_ip")
def test_goes_on(nested_pve):
    pass
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[HandLab]:
    """A lab of father and father2. Father's memory is fuller; both have a storage that is shared."""
    lab = start_by_hand("father", "father2")
    lab.ask("qm create 105 --memory 3000 --name fills && qm start 105")
    lab.ask("pvesm add dir common --path /mnt/shared --shared 1 --content images,snippets")
    lab.ask(
        f"qm create {FOREIGN} --name nested-pve-of-somebody --tags theirs --scsi0 local:1", node="father2"
    )
    yield lab
    stop_by_hand(lab)


@pytest.fixture
def project(pair: HandLab, tmp_path: Path) -> Iterator[Project]:
    """A project; what is left of its sessions is nothing, and somebody's VM is as it was."""
    made = Project(tmp_path / "project", pair, LOW, LOW + 9, tmp_path / "state")
    made.write()
    (made.path / "test_users.py").write_text(USERS)
    before = made.configurations(), volumes(pair)
    yield made
    assert (made.configurations(), volumes(pair)) == before
    assert list(before[0]) == [f"{FOREIGN}.conf"]
    assert [line for line in made.left() if str(FOREIGN) not in line] == []


def volumes(lab: HandLab) -> list[str]:
    """The files of both nodes' storages, and of the shared one."""
    find = "find /var/lib/vz/images /var/lib/vz/snippets /mnt/shared -type f -not -path '*/.*'"
    return [f"{node}{file}" for node in lab.nodes for file in sorted(lab.ask(find, node=node).split())]


def power(lab: HandLab, state: str) -> None:
    subprocess.run([*CLI, "power", lab.name, "father2", state], check=True, capture_output=True)


def waiting(project: Project, *args: str) -> tuple[subprocess.Popen[bytes], int]:
    """A session whose VM was made on father2, and is off; and the VM's id."""
    process = project.start("test_users.py", *args)
    project.wait_for(process, lambda line: line.get("cmd") == "waiting")
    return process, made_on(project, "father2")


def made_on(project: Project, node: str) -> int:
    """The id of the one VM that the sessions made, which is on this node."""
    found = json.loads(project.lab.ask("pvesh get /cluster/resources --type vm --output-format json"))
    (vm,) = [each for each in found if LOW <= each["vmid"] < LOW + 10 and each["vmid"] != FOREIGN]
    assert vm["node"] == node
    return int(vm["vmid"])


def test_a_whole_environment_is_on_the_node_with_more_memory_and_leaves_nothing(project: Project) -> None:
    status = project.run("-v", "test_steps.py", env={"WITHOUT": "setup_repos sync_repos"})
    assert status == 0, project.output()
    posted = [line["cmd"] for line in project.audit() if line.get("cmd", "").endswith("/qemu")]
    assert "post /nodes/father2/qemu" in posted
    assert "post /nodes/father/qemu" not in posted
    assert "test_verify_ssh_chain PASSED" in project.output()


@pytest.mark.parametrize("storage", ["local", "common"])
def test_a_vm_that_is_moved_between_two_phases_goes_on_and_goes_where_it_is(
    project: Project, storage: str
) -> None:
    process, vmid = waiting(project, "-o", f"nested_pve_storage={storage}")
    project.lab.ask(f"qm migrate {vmid} father", node="father2")
    project.open_gate()
    assert project.end(process) == 0, project.output()
    assert f"VM {vmid} was moved from father2 to father" in project.output()


def test_what_a_killed_session_left_is_found_where_an_administrator_moved_it(project: Project) -> None:
    process, vmid = waiting(project)
    process.send_signal(signal.SIGKILL)
    process.wait()
    project.lab.ask(f"qm migrate {vmid} father", node="father2")
    assert made_on(project, "father") == vmid
    assert project.run("--nested-destroy-only") == 0, project.output()


def test_a_vm_on_a_node_that_is_off_is_named_and_goes_when_the_node_is_back(project: Project) -> None:
    process, vmid = waiting(project, "-k", "waits")
    power(project.lab, "off")
    project.open_gate()
    assert project.end(process, limit=90) != 0
    assert f"VM {vmid} on father2: its node father2 is offline" in project.output()
    assert made_on(project, "father2") == vmid
    power(project.lab, "on")
    assert project.run("--nested-destroy-only") == 0, project.output()
