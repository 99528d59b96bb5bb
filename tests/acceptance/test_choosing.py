"""Selecting, ordering and repeating tests with pytest: earlier phases are probed, and done if necessary."""

from __future__ import annotations

import pytest
from acceptance.conftest import Project, Result
from standin_phases import PHASES

pytestmark = pytest.mark.thorough

# Each phase gets a probe that notes its name and succeeds for the names in PROVED.
PROBES = """
    names = os.environ.get("PROVED", "").split()
    def probed(phase):
        def probe(environment):
            with (HERE / "probed").open("a") as out:
                out.write(phase.name + "\\n")
            return {} if phase.name in names else None
        return dataclasses.replace(phase, probe=probe)
    phases[:] = [probed(phase) for phase in phases]
"""

DESELECTED = "8 steps, skipped last time because an earlier one had failed, are not in this run"


def add(project: Project, text: str) -> None:
    """Append to the project's conftest.py; indented text continues the hook of the phases."""
    path = project.path / "conftest.py"
    path.write_text(path.read_text() + text)


def done_by(project: Project, *args: str, **env: str) -> tuple[Result, list[str]]:
    """A run, and the phases whose action ran in it."""
    before = len(project.done())
    result = project.run("-v", *args, **env)
    return result, project.done()[before:]


def probed(project: Project) -> list[str]:
    return (project.path / "probed").read_text().split()


# -- earlier phases ----------------------------------------------------------------------------------


def test_an_earlier_phase_is_probed_and_done_only_if_the_probe_fails(project: Project) -> None:
    add(project, PROBES)
    result, done = done_by(project, "-k", "setup_ssh", PROVED="ensure_pve setup_network setup_ssh")
    assert result.ret == 0, result.output
    assert result.outcomes() == {"test_setup_ssh": "PASSED"}
    # The selected step is executed, although its probe would succeed.
    assert done == ["preflight", "provision", "start_vm", "wait_ip", "setup_ssh"]
    assert probed(project) == list(PHASES[:6])


def test_a_user_of_the_fixture_proves_what_is_done(project: Project) -> None:
    add(project, PROBES)
    result, done = done_by(project, "test_users.py::test_whole", PROVED=" ".join(PHASES[4:]))
    assert result.ret == 0, result.output
    assert done == list(PHASES[:4])
    assert probed(project) == list(PHASES)


def test_a_step_that_is_not_selected_is_probed_once_for_all_that_need_it(project: Project) -> None:
    add(project, PROBES)
    result, done = done_by(project, "test_steps.py", "--deselect", "test_steps.py::test_wait_ip")
    assert result.ret == 0, result.output
    assert done == list(PHASES)
    assert probed(project) == ["wait_ip"]


def test_a_step_that_the_project_skips_is_done_for_the_later_ones(project: Project) -> None:
    add(
        project,
        """

def pytest_collection_modifyitems(items):
    for item in items:
        if item.name == "test_setup_network":
            item.add_marker(pytest.mark.skipif(True, reason="seen elsewhere"))
""",
    )
    result, done = done_by(project, "test_steps.py")
    assert result.ret == 0, result.output
    outcomes = result.outcomes()
    assert outcomes.pop("test_setup_network") == "SKIPPED"
    assert set(outcomes.values()) == {"PASSED"}
    assert done == list(PHASES)


def test_a_step_that_failed_in_a_fixture_of_the_project_is_named_by_those_it_skips(project: Project) -> None:
    add(
        project,
        """

@pytest.fixture(autouse=True)
def of_the_project(request):
    if request.node.name == "test_setup_network":
        raise ValueError("no licence")
""",
    )
    result, done = done_by(project, "test_steps.py")
    assert result.ret == 1
    assert result.outcomes()["test_setup_ssh"] == "SKIPPED"
    assert (
        "test_setup_ssh depends on test_setup_network, which failed: ValueError: no licence" in result.output
    )
    assert done == list(PHASES[:5])


# -- the last failure -------------------------------------------------------------------------------------


def test_lf_reports_how_many_skipped_steps_are_not_in_its_run(project: Project) -> None:
    assert project.run(FAIL="setup_network").ret == 1
    repeated, done = done_by(project, "--lf", FAIL="setup_network")
    assert repeated.ret == 1
    assert repeated.outcomes() == {"test_setup_network": "FAILED", "test_whole": "ERROR"}
    assert f"nested-pve: {DESELECTED}: pytest without --lf runs them" in repeated.output
    assert done == list(PHASES[:6])
    fixed = project.run("-v", "--lf")
    assert fixed.ret == 0, fixed.output
    assert fixed.outcomes() == {"test_setup_network": "PASSED", "test_whole": "PASSED"}
    assert DESELECTED in fixed.output
    # No failure is recorded now: all tests run, and the line is not printed.
    everything = project.run("-v", "--lf")
    assert len(everything.outcomes()) == 17
    assert "skipped last time" not in everything.output


def test_a_step_that_ran_since_is_not_counted_any_more(project: Project) -> None:
    project.write(test_bad="def test_bad(): assert False\n")
    assert project.run(FAIL="leaf_wait_ip").ret == 1
    assert project.run("-k", "sync_repos").ret == 0
    assert "1 step, skipped last time" in project.run("--lf").output
    assert project.run().ret == 1
    assert "skipped last time" not in project.run("--lf", "test_users.py", "test_bad.py").output


def test_without_an_earlier_failure_lf_reports_no_steps(project: Project) -> None:
    assert project.run().ret == 0
    assert "skipped last time" not in project.run("--lf").output


def test_under_xdist_the_controller_reports_the_steps_that_lf_deselects(project: Project) -> None:
    project.plugins = ("xdist",)
    assert project.run("-n1", FAIL="setup_network").ret == 1
    result = project.run("-n2", "--lf")
    assert result.ret == 0, result.output
    assert result.output.count(DESELECTED) == 1


def test_without_a_cache_nothing_is_remembered(project: Project) -> None:
    assert project.run("-p", "no:cacheprovider", FAIL="setup_network").ret == 1
    assert not (project.path / ".pytest_cache").exists()
    result, done = done_by(project, "-p", "no:cacheprovider", "-k", "wait_ip and not leaf")
    assert result.ret == 0, result.output
    assert done == list(PHASES[:4])
    assert "skipped last time" not in project.run("--lf").output


# -- order and stops --------------------------------------------------------------------------------------


def test_ff_keeps_the_steps_in_their_order_and_does_each_phase_once(project: Project) -> None:
    assert project.run(FAIL="setup_ssh").ret == 1
    result, done = done_by(project, "--ff")
    assert result.ret == 0, result.output
    assert list(result.outcomes())[:14] == [f"test_{name}" for name in PHASES]
    assert done == list(PHASES)


def test_nf_runs_new_tests_first_after_the_steps_if_they_use_the_fixture(project: Project) -> None:
    assert project.run("--nf").ret == 0
    project.write(test_zz_new="def test_new(): pass\ndef test_new_user(nested_pve): pass\n")
    result, done = done_by(project, "--nf")
    assert result.ret == 0, result.output
    names = list(result.outcomes())
    assert names[:16] == ["test_new", *(f"test_{name}" for name in PHASES), "test_new_user"]
    assert done == list(PHASES)


def test_sw_continues_at_the_failed_step_with_its_earlier_phases(project: Project) -> None:
    first, _ = done_by(project, "--sw", "test_steps.py", FAIL="setup_ssh")
    assert list(first.outcomes().items())[-1] == ("test_setup_ssh", "FAILED")
    result, done = done_by(project, "--sw", "test_steps.py")
    assert result.ret == 0, result.output
    assert list(result.outcomes()) == [f"test_{name}" for name in PHASES[6:]]
    assert set(result.outcomes().values()) == {"PASSED"}
    assert done == list(PHASES)


def test_maxfail_counts_the_failure_and_not_the_skipped_steps(project: Project) -> None:
    project.write(test_bad="def test_bad(): assert False\ndef test_after(): pass\n")
    result = project.run("-v", "--maxfail=2", "test_steps.py", "test_bad.py", FAIL="leaf_start")
    assert result.ret == 1
    outcomes = result.outcomes()
    assert outcomes["test_leaf_start"] == outcomes["test_bad"] == "FAILED"
    assert outcomes["test_verify_ssh_chain"] == "SKIPPED"
    assert "test_after" not in outcomes


def test_exitfirst_at_a_prerequisite_leaves_nothing(project: Project) -> None:
    result, done = done_by(project, "-x", "-k", "ensure_pve or setup_repos", FAIL="start_vm")
    assert result.ret == 1
    assert result.outcomes() == {"test_ensure_pve": "ERROR"}
    assert done == list(PHASES[:3])


@pytest.mark.parametrize("seed", ["1", "2"])
def test_in_random_order_a_selection_of_steps_and_tests_does_each_phase_once(
    project: Project, seed: str
) -> None:
    project.plugins = ("randomly",)
    result, done = done_by(project, f"--randomly-seed={seed}", "-k", "setup or part or whole")
    assert result.ret == 0, result.output
    steps = [name for name in result.outcomes() if name.startswith("test_setup")]
    assert steps == ["test_setup_network", "test_setup_ssh", "test_setup_repos"]
    assert set(result.outcomes().values()) == {"PASSED"}
    assert done == list(PHASES)


@pytest.mark.parametrize("how", [("-x",), ("--maxfail=1",), ("--sw",), ("-x", "-n1")])
def test_a_stop_at_a_preflight_that_fails_is_status_4(project: Project, how: tuple[str, ...]) -> None:
    project.plugins = ("xdist",)
    result, done = done_by(project, *how, "test_steps.py", FAIL="preflight")
    assert result.ret == 4, result.output
    assert "preflight is the only failure" in result.output
    assert done == ["preflight"]


# -- reruns -----------------------------------------------------------------------------------------------


def test_a_rerun_does_not_do_a_broken_phase_again(project: Project) -> None:
    project.plugins = ("pytest_rerunfailures",)
    result, done = done_by(project, "--reruns=2", "test_steps.py", FAIL="setup_network")
    assert result.ret == 1, result.output
    assert "1 failed, 5 passed, 8 skipped, 2 rerun" in result.output
    assert done == list(PHASES[:6])
    # Also if the failed phase is only an earlier one of the selected steps.
    result, done = done_by(project, "--reruns=1", "-k", "wait_ip or ensure_pve", FAIL="provision")
    assert result.ret == 1, result.output
    assert "2 skipped, 14 deselected, 1 error, 1 rerun" in result.output
    assert done == list(PHASES[:2])


def test_a_rerun_uses_the_existing_environment(project: Project) -> None:
    project.plugins = ("pytest_rerunfailures",)
    project.write(
        test_flaky="""
import pytest
tries = []

@pytest.fixture
def flaky(nested_pve):
    tries.append("set-up")
    assert len(tries) > 1
    return nested_pve

def test_flaky(flaky):
    tries.append("call")
    assert len(tries) > 3
    assert flaky.vmid
"""
    )
    result, done = done_by(project, "--reruns=2", "test_flaky.py", "test_users.py")
    assert result.ret == 0, result.output
    assert "4 passed, 2 rerun" in result.output
    assert done == list(PHASES)


def test_a_preflight_that_fails_is_status_4_however_often_it_is_tried(project: Project) -> None:
    project.plugins = ("pytest_rerunfailures",)
    result, done = done_by(project, "--reruns=2", "test_steps.py", FAIL="preflight")
    assert result.ret == 4, result.output
    assert done == ["preflight"]


# -- xdist ------------------------------------------------------------------------------------------------

MODES = {
    mode: ("-n2", "--dist", mode) for mode in ("load", "loadscope", "loadfile", "loadgroup", "worksteal")
} | {"each": ("--dist", "each", "--tx", "2*popen")}


@pytest.mark.parametrize("mode", MODES)
def test_in_every_mode_of_xdist_a_selected_step_executes_and_nothing_is_skipped(
    project: Project, mode: str
) -> None:
    project.plugins = ("xdist",)
    add(project, PROBES)
    result, done = done_by(project, *MODES[mode], "-k", "setup_network or leaf_start", "test_steps.py")
    assert result.ret == 0, result.output
    assert f"{4 if mode == 'each' else 2} passed" in result.output
    assert "skipped" not in result.output
    for name in ("setup_network", "leaf_start"):
        assert 1 <= done.count(name) <= 2
    assert "setup_ssh" in done


@pytest.mark.parametrize("mode", ["load", "loadfile", "each"])
def test_under_xdist_a_failed_phase_fails_the_run_and_leaves_nothing(project: Project, mode: str) -> None:
    project.plugins = ("xdist",)
    result, done = done_by(project, *MODES[mode], "test_steps.py", "test_users.py", FAIL="setup_network")
    assert result.ret == 1, result.output
    assert "setup_network went wrong on purpose" in result.output
    assert 1 <= done.count("setup_network") <= 2
    assert "setup_ssh" not in done


# -- green ------------------------------------------------------------------------------------------------

SKIPS = (
    "import pytest\n@pytest.mark.parametrize('n', range(4))\ndef test_s(nested_pve, n): pytest.skip('no')\n"
)


@pytest.mark.parametrize("how", [(), ("-p", "no:cacheprovider"), MODES["load"], MODES["each"]])
def test_a_run_in_any_mode_that_verified_nothing_is_not_green(project: Project, how: tuple[str, ...]) -> None:
    project.plugins = ("xdist",)
    project.write(test_skips=SKIPS)
    result = project.run(*how, "test_skips.py", "test_users.py::test_unrelated")
    assert result.ret == 1, result.output
    line = "nested-pve: 4 tests that use the nested PVE were selected and none passed: nothing was verified"
    assert line in result.output


def test_a_selection_of_no_test_is_not_green(project: Project) -> None:
    result, done = done_by(project, "-k", "no_such_step")
    assert result.ret == 5
    assert done == []


def test_a_selection_without_the_nested_pve_creates_nothing(project: Project) -> None:
    result, done = done_by(project, "-k", "unrelated")
    assert result.ret == 0
    assert done == []
    assert not (project.path / ".nested-pve").exists()
