"""Whole sessions of a project that creates the nested VM with its own tool."""

from __future__ import annotations

import pytest
from acceptance.conftest import Project

OWN = """

from pytest_nestedpve import replace_provision

def tool(environment, request):
    api, vmid = environment.outer.api, int(os.environ.get("NAMES") or request.vmid)
    if not os.environ.get("NAMES"):
        options = {"name": request.name, "net0": "virtio,bridge=vmbr0", "cores": request.cores}
        api.post("/nodes/father/qemu", vmid=vmid, **options)
        api.post(f"/nodes/father/qemu/{vmid}/config", scsi0="local:1")
    if os.environ.get("TOOL_FAILS"):
        raise PveError("apply failed")
    return {"node": "father", "vmid": vmid, "did": "made by tofu"}

_of_standin = pytest_nestedpve_phases

def pytest_nestedpve_phases(phases, config):
    _of_standin(phases, config)
    replace_provision(phases, tool, inputs=lambda environment: os.environ.get("PLAN", "one"))
"""


@pytest.fixture
def own(project: Project) -> Project:
    path = project.path / "conftest.py"
    path.write_text(path.read_text() + OWN)
    return project


def test_the_projects_vm_is_the_nested_one_and_is_destroyed(own: Project) -> None:
    result = own.run("-v")
    assert result.ret == 0, result.output
    assert len(result.outcomes()) == 17
    (log,) = own.audits()
    (adoption,) = [line for line in log if line["event"] == "adopted"]
    assert str(adoption["vmid"]) in str([line for line in log if line["event"] == "teardown"])


def test_an_existing_vm_fails_the_phase_and_outlives_the_session(own: Project) -> None:
    api = own.host().connect().api
    api.post("/nodes/father/qemu", vmid=99950, name="nested-pve-production", net0="virtio,bridge=vmbr0")
    before = own.host().configuration(99950)
    result = own.run("-v", NAMES="99950")
    assert result.ret == 1, result.output
    assert result.outcomes()["test_provision"] == "FAILED"
    assert result.outcomes()["test_start_vm"] == "SKIPPED"
    assert "VM 99950 on father is not adopted into the run" in result.output
    assert own.left() == ["vm 99950"]
    assert own.host().configuration(99950) == before
    api.delete("/nodes/father/qemu/99950")


def test_a_tool_that_fails_leaves_nothing(own: Project) -> None:
    result = own.run("-k", "provision", TOOL_FAILS="1")
    assert result.ret == 1, result.output
    assert "apply failed" in result.output
    assert "has the run's name: adopted into the run" in result.output


def test_a_kept_vm_is_proved_and_created_again_when_the_plan_changes(own: Project) -> None:
    assert own.run("-k", "start_vm", "--nested-keep").ret == 0
    (first,) = [line for line in own.left() if line.startswith("vm")]
    assert own.run("-k", "start_vm", "--nested-keep").ret == 0
    assert [line for line in own.left() if line.startswith("vm")] == [first]
    changed = own.run("-v", "-k", "start_vm", "--nested-keep", PLAN="two")
    assert changed.ret == 0, changed.output
    (second,) = [line for line in own.left() if line.startswith("vm")]
    assert second != first
    assert own.run("-k", "start_vm", PLAN="two").ret == 0
