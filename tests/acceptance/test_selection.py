"""Selected steps run with their prerequisites, and none is skipped for a missing selection of another."""

from __future__ import annotations

import json

import pytest
from acceptance.conftest import Project
from standin_phases import PHASES

ALL = {f"test_{name}": "PASSED" for name in PHASES}


def test_the_fourteen_steps_run_in_order_and_leave_nothing(project: Project) -> None:
    result = project.run("-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert result.outcomes() == ALL
    assert project.done() == list(PHASES)


def test_a_single_step_does_what_it_needs_first(project: Project) -> None:
    result = project.run("-v", "-k", "setup_network")
    assert result.ret == 0, result.output
    assert result.outcomes() == {"test_setup_network": "PASSED"}
    assert project.done() == list(PHASES[:6])


def test_a_node_id_chooses_a_step(project: Project) -> None:
    result = project.run("-v", "test_steps.py::test_wait_ip")
    assert result.ret == 0, result.output
    assert result.outcomes() == {"test_wait_ip": "PASSED"}
    assert project.done() == list(PHASES[:4])


def test_ids_in_reverse_run_in_the_order_of_the_phases(project: Project) -> None:
    result = project.run("-v", "test_steps.py::test_start_vm", "test_steps.py::test_provision")
    assert list(result.outcomes()) == ["test_provision", "test_start_vm"]
    assert result.ret == 0
    assert project.done() == list(PHASES[:3])


def test_a_deselected_step_is_done_for_the_later_ones(project: Project) -> None:
    result = project.run(
        "-v", "test_steps.py", "--deselect", "test_steps.py::test_provision", "-k", "not leaf"
    )
    assert result.ret == 0, result.output
    assert "test_provision" not in result.outcomes()
    assert set(result.outcomes().values()) == {"PASSED"}
    assert project.done()[:2] == ["preflight", "provision"]


def test_random_order_changes_nothing_for_the_steps(project: Project) -> None:
    project.plugins = ("randomly",)
    result = project.run("-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert list(result.outcomes()) == list(ALL)


def test_a_failed_step_skips_what_needs_it_and_names_the_first_cause(project: Project) -> None:
    result = project.run("-v", FAIL="setup_network")
    assert result.ret == 1, result.output
    outcomes = result.outcomes()
    assert [outcomes[f"test_{name}"] for name in PHASES] == ["PASSED"] * 5 + ["FAILED"] + ["SKIPPED"] * 8
    assert outcomes["test_unrelated"] == outcomes["test_part"] == "PASSED"
    assert outcomes["test_whole"] == "ERROR"
    assert "test_verify_ssh_chain depends on test_setup_network, which failed: " in result.output
    assert "needs setup_network, which failed: setup_network went wrong on purpose" in result.output
    assert "Traceback" not in result.output
    assert project.done().count("setup_network") == 1


def test_a_prerequisite_that_fails_is_an_error_of_the_first_and_a_skip_of_the_next(project: Project) -> None:
    result = project.run("-v", "-k", "wait_ip or ensure_pve", "test_steps.py", FAIL="provision")
    assert result.ret == 1
    assert result.outcomes() == {
        "test_wait_ip": "ERROR",
        "test_ensure_pve": "SKIPPED",
        "test_leaf_wait_ip": "SKIPPED",
    }
    assert (
        "test_ensure_pve depends on the phase provision, which failed: provision went wrong" in result.output
    )
    assert project.done() == ["preflight", "provision"]


def test_exitfirst_stops_and_leaves_nothing(project: Project) -> None:
    result = project.run("-x", "-v", FAIL="leaf_provision")
    assert result.ret == 1
    assert result.outcomes()["test_leaf_provision"] == "FAILED"
    assert "test_leaf_start" not in result.outcomes()


def test_after_a_failure_lf_runs_the_failed_step_with_what_it_needs(project: Project) -> None:
    assert project.run("test_steps.py", FAIL="ensure_pve").ret == 1
    (project.path / "done").unlink()
    result = project.run("-v", "--lf", "test_steps.py")
    assert result.ret == 0, result.output
    assert result.outcomes() == {"test_ensure_pve": "PASSED"}
    assert project.done() == list(PHASES[:5])


def test_a_fault_in_a_phase_shows_its_own_traceback(project: Project) -> None:
    result = project.run("-v", "-k", "start_vm", FAULT="provision")
    assert result.ret == 1
    assert "KeyError: 'a fault in provision'" in result.output
    assert 'raise KeyError("a fault in "' in result.output


def test_a_marked_test_sets_up_only_as_far_as_it_says(project: Project) -> None:
    result = project.run("-v", "-k", "test_part", "test_users.py")
    assert result.ret == 0, result.output
    assert project.done() == list(PHASES[:4])


def test_a_marker_with_no_such_phase_names_those_there_are(project: Project) -> None:
    project.write(
        test_wrong="import pytest\n@pytest.mark.nested_pve(upto='x')\ndef test_x(nested_pve): pass\n"
    )
    result = project.run("test_wrong.py")
    assert result.ret == 1
    assert "expected the name of a phase: preflight, provision" in result.output


def test_a_test_that_comes_first_does_the_phases_and_the_steps_say_so(project: Project) -> None:
    project.write(test_a="def test_a(nested_pve): pass\n")
    result = project.run("-v", "test_a.py", "test_steps.py", "--junitxml", "out.xml")
    assert result.ret == 0, result.output
    assert next(iter(result.outcomes())) == "test_preflight"
    assert project.done() == list(PHASES)
    assert 'name="nested_pve_phase" value="provision"' in (project.path / "out.xml").read_text()


def test_a_run_in_which_nothing_was_verified_is_not_green(project: Project) -> None:
    project.write(test_skips="import pytest\ndef test_s(nested_pve): pytest.skip('not today')\n")
    result = project.run("-k", "test_s", "test_skips.py")
    assert result.ret == 1, result.output
    assert "the only selected test that uses the nested PVE did not pass" in result.output


def test_a_failing_preflight_alone_is_status_4(project: Project) -> None:
    result = project.run("-v", FAIL="preflight")
    assert result.ret == 4, result.output
    assert result.outcomes()["test_unrelated"] == "PASSED"
    assert project.done() == ["preflight"]
    assert project.run("-k", "leaf_start", FAIL="preflight").ret == 4


def test_a_failing_preflight_beside_another_failure_is_status_1(project: Project) -> None:
    project.write(test_bad="def test_bad(): assert False\n")
    assert project.run(FAIL="preflight").ret == 1


def test_phases_from_the_hook_are_steps_and_can_be_removed(project: Project) -> None:
    text = (project.path / "conftest.py").read_text()
    text += """
    from pytest_nestedpve.environment.phases import Phase
    phases[:] = phases[:3]
    phases.insert(1, Phase("own_check", "a check of ours", lambda environment: {"did": "looked"}))
"""
    project.write(conftest=text)
    result = project.run("-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert list(result.outcomes()) == ["test_preflight", "test_own_check", "test_provision", "test_start_vm"]


def test_a_dry_run_prints_the_phases_and_touches_nothing(project: Project) -> None:
    result = project.run("--nested-dry-run", "--nested-json", "plan.json", "-k", "start_vm")
    assert result.ret == 0, result.output
    rows = json.loads((project.path / "plan.json").read_text())
    assert [row["phase"] for row in rows] == ["preflight", "provision", "start_vm"]
    assert project.done() == []
    assert project.audits() == []


def test_the_header_says_host_run_and_what_will_be_made(project: Project) -> None:
    result = project.run("--pve-host", "father", "test_users.py::test_part")
    assert result.ret == 0
    (run,) = (path.name for path in (project.path / ".nested-pve" / "runs").glob("????????????"))
    assert f"nested-pve: host father (--pve-host); run {run}" in result.output
    made = f"creates one VM nested-pve-{run} (2 cores, 8 GiB memory, 64 GiB disk; id: 99900-99999)"
    assert made in result.output


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["load", "loadscope", "worksteal"])
def test_under_xdist_each_worker_does_what_its_steps_need(project: Project, mode: str) -> None:
    project.plugins = ("xdist",)
    result = project.run("-n2", "--dist", mode, "test_steps.py", "test_users.py")
    assert result.ret == 0, result.output
    assert "17 passed" in result.output
    assert project.done().count("provision") <= 2


@pytest.mark.thorough
def test_a_short_pytest_timeout_does_not_cut_the_set_up_off(project: Project) -> None:
    project.plugins = ("timeout",)
    text = (
        (project.path / "conftest.py")
        .read_text()
        .replace(
            "facts = phase.do(environment)", "threading.Event().wait(0.15); facts = phase.do(environment)"
        )
    )
    project.write(conftest=text)
    for method in ("signal", "thread"):
        result = project.run("--timeout", "1.5", "--timeout-method", method, "test_users.py")
        assert result.ret == 0, result.output
    project.write(test_slow="import threading\ndef test_slow(nested_pve): threading.Event().wait(30)\n")
    result = project.run("--timeout", "1", "--timeout-method", "signal", "test_slow.py")
    assert result.ret == 1
    assert "Timeout" in result.output


def test_the_context_file_gets_what_earlier_tools_read_and_keeps_the_rest(project: Project) -> None:
    context = project.path / "ctx.json"
    context.write_text('{"mine": [1, 2], "other_vm_id": 4711}')
    project.write(
        test_context="""
        import json, pathlib
        def test_it(nested_pve):
            found = json.loads(pathlib.Path("ctx.json").read_text())
            assert found["inner_ip"] == found["node_ip"] == nested_pve.ip
            assert found["nested-pve_vm_id"] == found[nested_pve.name + "_vm_id"] == nested_pve.vmid
            assert found["provisioned_vms"] == [{"name": nested_pve.name, "vmid": nested_pve.vmid}]
            assert found["mine"] == [1, 2]
        """.replace("\n        ", "\n")
    )
    result = project.run("--context-file", "ctx.json", "test_context.py")
    assert result.ret == 0, result.output
    assert json.loads(context.read_text()) == {"mine": [1, 2], "other_vm_id": 4711, "provisioned_vms": []}


def test_a_setup_plan_touches_nothing(project: Project) -> None:
    result = project.run("--setup-plan", "test_steps.py")
    assert result.ret == 0, result.output
    assert "test_verify_ssh_chain" in result.output
    assert "skipped" not in result.output
    assert project.audits() == []


@pytest.mark.parametrize("option", ["--ff", "--nf", "--sw"])
def test_options_that_reorder_or_stop_go_on_where_it_failed(project: Project, option: str) -> None:
    assert project.run("test_steps.py", option, FAIL="setup_ssh").ret in (1, 2)
    result = project.run("-v", "test_steps.py", option)
    assert result.ret == 0, result.output
    assert set(result.outcomes().values()) == {"PASSED"}
    assert "test_setup_ssh" in result.outcomes()


def test_a_phase_that_hangs_is_interrupted_at_its_limit(project: Project) -> None:
    text = (project.path / "conftest.py").read_text()
    project.write(
        conftest=text.replace(
            "(phase, do=do)", '(phase, do=do, timeout=0.5 if phase.name == "start_vm" else 30)'
        )
    )
    result = project.run("-v", "test_steps.py", HANG="start_vm")
    assert result.ret == 1, result.output
    assert "the phase start_vm did not end within its limit of 0.5 s" in result.output
    assert result.outcomes()["test_wait_ip"] == "SKIPPED"
