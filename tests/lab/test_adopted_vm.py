"""The nested VM is created on a lab by a project's own tool, with `qm`, and adopted by the run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Project

LOW = 96500

CONFTEST = """
import os
from pytest_nestedpve import replace_provision

def tool(environment, request):
    if os.environ.get("NAMES"):
        return {"node": request.node, "vmid": int(os.environ["NAMES"])}
    create = ["qm", "create", str(request.vmid), "--name", request.name, "--memory", "512"]
    described = ["--description", "created by hand", "--tags", "ours"]
    environment.outer.run([*create, *described, "--net0", "virtio,bridge=vmbr0"]).check()
    environment.outer.run(["qm", "set", str(request.vmid), "--scsi0", "local:1"]).check()
    if os.environ.get("RUNS"):
        environment.outer.run(["qm", "start", str(request.vmid)]).check()
    return {"node": request.node, "vmid": request.vmid}

def pytest_nestedpve_phases(phases):
    replace_provision(phases, tool)
"""


@pytest.fixture
def project(hand_lab: HandLab, tmp_path: Path) -> Project:
    project = Project(tmp_path / "project", hand_lab, LOW, LOW + 9, tmp_path / "state")
    project.create()
    (project.path / "conftest.py").write_text(CONFTEST)
    return project


@pytest.mark.parametrize("runs", ["", "yes"])
def test_the_vm_is_adopted_proved_and_destroyed(project: Project, runs: str) -> None:
    status = project.run("-v", "test_steps.py", "-k", "start_vm", env={"RUNS": runs})
    assert status == 0, project.output()
    (adopted,) = [line for line in project.audit() if line["event"] == "adopted"]
    destroyed = [line["vmid"] for line in project.audit() if line.get("status") == "gone"]
    assert destroyed == [adopted["vmid"]]
    assert project.leftovers() == []


def test_a_foreign_vm_is_not_touched(project: Project, hand_lab: HandLab) -> None:
    hand_lab.run(f"qm create {LOW + 3} --name nested-pve-of-somebody --net0 virtio,bridge=vmbr0")
    before = project.configurations()
    assert project.run("-v", "test_steps.py", "-k", "start_vm", env={"NAMES": str(LOW + 3)}) == 1
    assert re.search(rf"VM {LOW + 3} on \w+ is not adopted into the run", project.output())
    assert project.configurations() == before
    assert len(before) == 1
    hand_lab.run(f"qm destroy {LOW + 3}")
