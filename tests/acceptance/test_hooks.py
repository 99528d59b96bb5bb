"""A project's hooks are called for phases and for the teardown, and cannot break either."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest
from acceptance.conftest import Project
from standin_phases import PHASES

HOOKS = """

import json

pytestmark = pytest.mark.thorough

def record(**fields):
    with (HERE / "calls").open("a") as out:
        out.write(json.dumps(fields) + "\\n")

def wrong(where):
    how = os.environ.get("RAISES_" + where)
    if how == "exit":
        pytest.exit("enough")
    if how == "fail":
        pytest.fail("not good")
    if how == "hang":
        threading.Event().wait(60)
    if how:
        raise ValueError(f"{how} in " + where)

def pytest_nestedpve_phase_started(phase, environment):
    record(hook="started", phase=phase.name, run=environment.run.id)
    if phase.name == "wait_ip":
        wrong("STARTED")

def pytest_nestedpve_phase_finished(phase, status, seconds, facts, cause):
    record(hook="finished", phase=phase.name, status=status, seconds=seconds, facts=dict(facts), cause=cause)
    facts["ip"] = "of the hook"
    if phase.name == "wait_ip":
        wrong("FINISHED")

def pytest_nestedpve_teardown_finished(report, environment):
    record(hook="teardown", destroyed=report.destroyed, left=report.left, run=environment.run.id)
    wrong("TEARDOWN")
"""


@pytest.fixture
def hooked(project: Project) -> Project:
    """The project with all three hooks."""
    path = project.path / "conftest.py"
    path.write_text(path.read_text() + HOOKS)
    return project


def recorded(project: Project) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (project.path / "calls").read_text().splitlines()]


def test_the_hooks_are_called_for_each_phase_and_for_the_teardown(hooked: Project) -> None:
    result = hooked.run("test_steps.py")
    assert result.ret == 0, result.output
    lines = recorded(hooked)
    expected = [(hook, name) for name in PHASES for hook in ("started", "finished")]
    assert [(line["hook"], line["phase"]) for line in lines[:-1]] == expected
    finished = {line["phase"]: line for line in lines if line["hook"] == "finished"}
    assert {line["status"] for line in finished.values()} == {"done"}
    assert all(0 <= line["seconds"] < 30 for line in finished.values())
    assert finished["wait_ip"]["facts"] == {"ip": "10.77.7.50", "host_keys": []}
    assert lines[-1]["hook"] == "teardown"
    assert lines[-1]["left"] == []
    assert lines[-1]["destroyed"] == [f"VM {finished['provision']['facts']['vmid']}"]
    assert {line["run"] for line in lines if "run" in line} == {lines[0]["run"]}


def test_a_hook_cannot_change_the_facts_of_the_environment(hooked: Project) -> None:
    hooked.write(test_ip="def test_ip(nested_pve): assert nested_pve.ip == '10.77.7.50'\n")
    assert hooked.run("test_ip.py").ret == 0


def test_the_hook_of_a_failed_phase_gets_the_cause_without_secrets(hooked: Project) -> None:
    path = hooked.path / "conftest.py"
    path.write_text(
        path.read_text().replace(
            'raise PveError(phase.name + " went wrong on purpose")',
            'environment.hide("geheim-4711"); raise PveError("the token geheim-4711 was refused")',
        )
    )
    assert hooked.run(FAIL="ensure_pve").ret == 1
    assert "geheim" not in (hooked.path / "calls").read_text()
    failed = [line for line in recorded(hooked) if line.get("status") == "failed"]
    assert [(line["phase"], line["cause"]) for line in failed] == [
        ("ensure_pve", "the token ******** was refused")
    ]


@pytest.mark.parametrize("where", ["STARTED", "FINISHED", "TEARDOWN"])
@pytest.mark.parametrize("how", ["oops", "fail"])
def test_a_hook_that_raises_breaks_neither_phase_nor_teardown(hooked: Project, where: str, how: str) -> None:
    env = {f"RAISES_{where}": how}
    result = hooked.run("-v", **env)
    assert set(result.outcomes().values()) == {"PASSED"}
    assert len(result.outcomes()) == 17
    assert result.ret == 1, result.output
    hook = {"STARTED": "phase_started", "FINISHED": "phase_finished", "TEARDOWN": "teardown_finished"}[where]
    place = "after the teardown" if where == "TEARDOWN" else "wait_ip"
    what = f"ValueError: oops in {where}, at conftest.py:" if how == "oops" else "Failed: not good"
    assert f"nested-pve: pytest_nestedpve_{hook} ({place}) raised {what}" in result.output
    assert "nested-pve: a hook of the project raised" in result.output
    assert "INTERNALERROR" not in result.output
    assert any(line["event"] == "hook" for line in hooked.audits()[0])


def test_a_hook_that_raises_does_not_hide_the_phases_cause(hooked: Project) -> None:
    result = hooked.run("-v", "test_steps.py", FAIL="wait_ip", RAISES_FINISHED="oops")
    assert result.ret == 1
    assert result.outcomes()["test_wait_ip"] == "FAILED"
    assert "wait_ip: wait_ip went wrong on purpose" in result.output
    assert "raised ValueError: oops in FINISHED" in result.output


@pytest.mark.parametrize("where", ["STARTED", "FINISHED"])
def test_a_hook_may_end_the_session_and_the_environment_is_destroyed(hooked: Project, where: str) -> None:
    env = {f"RAISES_{where}": "exit"}
    result = hooked.run("-v", **env)
    assert result.ret == 2, result.output
    assert "enough" in result.output
    assert "test_ensure_pve" not in result.outcomes()
    assert recorded(hooked)[-1]["hook"] == "teardown"
    assert recorded(hooked)[-1]["left"] == []


def test_pytest_exit_after_the_teardown_is_named_like_any_error(hooked: Project) -> None:
    result = hooked.run("test_steps.py", RAISES_TEARDOWN="exit")
    assert result.ret == 1, result.output
    assert "pytest_nestedpve_teardown_finished (after the teardown) raised Exit: enough" in result.output


def test_a_hook_that_hangs_is_ended_at_the_phases_limit(hooked: Project) -> None:
    path = hooked.path / "conftest.py"
    path.write_text(path.read_text().replace("(phase, do=do)", "(phase, do=do, timeout=1.0)"))
    result = hooked.run("-v", "test_steps.py", RAISES_FINISHED="hang")
    assert result.ret == 1
    assert set(result.outcomes().values()) == {"PASSED"}
    assert "did not end within its limit of 1 s" in result.output


def test_the_hook_of_the_teardown_gets_the_leftovers(hooked: Project) -> None:
    hooked.write(
        test_protected="""
def test_protected(nested_pve):
    path = f"/nodes/{nested_pve.host.node}/qemu/{nested_pve.vmid}/config"
    nested_pve.host.api.put(path, protection=1)
"""
    )
    result = hooked.run("test_protected.py")
    assert result.ret == 1, result.output
    lines = recorded(hooked)[-1]["left"]
    assert any("protected" in line for line in lines), lines
    for vmid in hooked.host().vms():
        hooked.host().edit_vm(vmid, protection=None)
    assert hooked.run("--nested-destroy-only", "--nested-yes").ret == 0


def test_the_hook_of_the_teardown_is_not_called_for_a_kept_environment(hooked: Project) -> None:
    assert hooked.run("-k", "start_vm", "--nested-keep").ret == 0
    assert recorded(hooked)[-1]["hook"] == "finished"
    assert hooked.run("--nested-destroy-only").ret == 0


def test_under_xdist_the_controller_reports_failed_hooks_of_workers(hooked: Project) -> None:
    hooked.plugins = ("xdist",)
    result = hooked.run("-n1", "test_steps.py", RAISES_FINISHED="oops", RAISES_TEARDOWN="oops")
    assert result.ret == 1, result.output
    assert "14 passed" in result.output
    assert "pytest_nestedpve_phase_finished (wait_ip) raised ValueError: oops in FINISHED" in result.output
    assert "(after the teardown) raised ValueError: oops in TEARDOWN" in result.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_hook_of_the_teardown_is_called_in_an_interrupted_session(
    hooked: Project, number: signal.Signals
) -> None:
    process = hooked.start("test_steps.py", HANG="start_vm")
    hooked.wait_for(process, cmd="hanging")
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number, output
    *_, failed, ended = recorded(hooked)
    assert (failed["phase"], failed["status"]) == ("start_vm", "failed")
    assert (ended["hook"], ended["left"]) == ("teardown", [])


def test_the_controller_calls_the_hook_of_the_teardown_after_a_worker_crashed(hooked: Project) -> None:
    hooked.plugins = ("xdist",)
    hooked.write(
        test_dies="""
import os
import pytest

@pytest.mark.nested_pve(upto="start_vm")
def test_dies(nested_pve): os._exit(3)
"""
    )
    result = hooked.run("-n1", "--max-worker-restart=0", "test_dies.py")
    assert result.ret == 1, result.output
    ended = [line for line in recorded(hooked) if line["hook"] == "teardown"]
    assert [line["left"] for line in ended] == [[]]
    assert len(ended[0]["destroyed"]) == 1
