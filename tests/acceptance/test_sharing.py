"""One environment for all workers of xdist: set up once, taken down by the last one out."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.conftest import Project, make_project
from acceptance.test_keeping import CONFTEST, pool_comment
from lab.on_lab import processes_mentioning
from standin_phases import PHASES

from pytest_nestedpve.pve.deadline import Deadline, wait_until

pytestmark = pytest.mark.thorough

SHARE = ("-n2", "-o", "nested_pve_scope=run")
USERS = """
import os, pytest

@pytest.mark.parametrize("number", range(8))
def test_user(nested_pve, nested_pve_run, number):
    assert nested_pve.vmid
    with open("seen", "a") as out:
        out.write(f"{nested_pve_run.environment.run.id} {nested_pve.vmid} {os.getpid()}\\n")
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    project = make_project(tmp_path / "project")
    project.write(conftest=CONFTEST.format(tests=str(Path(__file__).parents[1])), test_users=USERS)
    (project.path / "playbooks").mkdir()
    project.plugins = ("xdist",)
    yield project
    assert project.left() == []
    assert not list((project.path / "state" / "nested-pve" / "locks").glob("*"))


def seen(project: Project) -> list[set[str]]:
    """The runs, VMs and processes that the tests recorded."""
    rows = [line.split() for line in (project.path / "seen").read_text().splitlines()]
    return [set(column) for column in zip(*rows, strict=True)]


def test_the_workers_share_one_vm_that_is_set_up_once(project: Project) -> None:
    result = project.run(*SHARE, "test_users.py")
    assert result.ret == 0, result.output
    runs, vms, workers = seen(project)
    assert (len(runs), len(vms), len(workers)) == (1, 1, 2)
    done = project.done()
    assert [name for name in done if name not in ("preflight", "verify_ssh_chain")] == list(PHASES[1:-1])
    assert len(project.audits()) == 1


def test_by_default_each_worker_has_its_own_vm(project: Project) -> None:
    result = project.run("-n2", "test_users.py", "--pve-host", "father")
    assert result.ret == 0, result.output
    runs, _, workers = seen(project)
    assert len(runs) == len(workers) == 2
    assert "for each of 2 workers" in result.output
    assert "up to 16 GiB of the host's memory" in result.output


def test_steps_that_another_worker_did_are_proved(project: Project) -> None:
    result = project.run(*SHARE, "-v", "test_steps.py")
    assert result.ret == 0, result.output
    assert "14 passed" in result.output
    done = project.done()
    assert [name for name in done if name not in ("preflight", "verify_ssh_chain")] == list(PHASES[1:-1])


def test_a_phase_that_failed_in_one_worker_is_not_tried_in_the_other(project: Project) -> None:
    result = project.run(*SHARE, "test_users.py", FAIL="setup_ssh")
    assert result.ret == 1, result.output
    assert project.done().count("setup_ssh") == 1
    assert "setup_ssh went wrong on purpose" in result.output
    assert project.left() == []


@pytest.mark.parametrize("failing", ["test_a", "test_b"])
def test_a_run_on_which_a_test_of_any_worker_failed_is_not_called_passed(
    project: Project, failing: str
) -> None:
    """In either order in which the two workers leave."""
    (project.path / "test_users.py").unlink()
    for name in ("test_a", "test_b"):
        project.write(**{name: f"def {name}(nested_pve):\n    assert {name != failing}\n"})
    result = project.run(*SHARE, "--dist", "loadfile", "test_a.py", "test_b.py")
    assert result.ret == 1, result.output
    assert "set up, tests failed, no leftovers" in result.output


def test_a_worker_that_crashes_does_not_affect_the_shared_environment(project: Project) -> None:
    project.write(
        test_users=USERS + "    if number == 3 and not os.path.exists('died'):\n"
        "        open('died', 'w').close()\n        os._exit(9)\n"
    )
    result = project.run(*SHARE, "test_users.py")
    assert result.ret == 1, result.output
    assert "crashed" in result.output
    runs, vms, workers = seen(project)
    assert (len(runs), len(vms)) == (1, 1)
    assert len(workers) >= 2
    assert project.left() == []


def test_a_phase_in_which_a_worker_crashed_is_done_by_the_other(project: Project) -> None:
    conftest = (project.path / "conftest.py").read_text()
    dies = '            raise PveError(phase.name + " went wrong on purpose")\n'
    assert dies in conftest
    dying = "            (HERE / 'died').exists() or ((HERE / 'died').touch(), os._exit(9))\n"
    project.write(conftest=conftest.replace(dies, dying))
    result = project.run(*SHARE, "test_users.py", FAIL="setup_ssh")
    assert result.ret == 1, result.output
    assert "crashed" in result.output
    assert project.done().count("setup_ssh") == 2, project.done()


def test_a_shared_environment_can_be_kept_and_resumed(project: Project) -> None:
    result = project.run(*SHARE, "--nested-keep", "test_users.py")
    assert result.ret == 0, result.output
    assert "is kept until" in result.output
    (project.path / "done").write_text("")
    result = project.run(*SHARE, "test_users.py")
    assert result.ret == 0, result.output
    assert set(project.done()) == {"preflight", "verify_ssh_chain"}
    assert project.left() == []


def test_a_kept_environment_outlives_workers_whose_preflight_failed(project: Project) -> None:
    assert project.run(*SHARE, "--nested-keep", "test_users.py").ret == 0
    before = project.left(), pool_comment(project)
    (project.path / "full").touch()
    result = project.run(*SHARE, "--nested-keep", "test_users.py")
    assert "found 1" in result.output
    assert "is kept until" in result.output
    assert "left something behind" not in result.output
    assert result.ret == 4, result.output
    assert (project.left(), pool_comment(project)) == before
    (project.path / "full").unlink()
    result = project.run(*SHARE, "--nested-keep", "test_users.py")
    assert result.ret == 0, result.output
    assert pool_comment(project)["session"] != before[1]["session"]
    assert project.run(*SHARE, "test_users.py").ret == 0


def test_a_shared_environment_is_kept_with_the_options_set_by_fixtures(project: Project) -> None:
    conftest = (project.path / "conftest.py").read_text()
    fixture = "def nested_pve_cores():\n    return int(os.environ['CORES'])\n"
    project.write(conftest=f"{conftest}\nimport pytest\n\n@pytest.fixture(scope='session')\n{fixture}")
    keep = ("--nested-keep", "test_users.py")
    for arguments in ((*SHARE, *keep), keep, (*SHARE, *keep)):
        result = project.run(*arguments, CORES="4")
        assert result.ret == 0, result.output
        assert "other settings" not in result.output
    assert len(project.audits()) == 1
    before = project.left(), pool_comment(project)
    result = project.run(*SHARE, "test_users.py", CORES="8")
    assert result.ret == 1, result.output
    assert "was created with other settings (cores: 4, now 8), and workers that share one" in result.output
    assert (project.left(), pool_comment(project)) == before
    assert project.run(*SHARE, "test_users.py", CORES="4").ret == 0
    assert len(project.audits()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_there_are_no_leftovers_after_the_controller_is_interrupted(
    project: Project, number: signal.Signals
) -> None:
    project.write(
        test_users=USERS + "    nested_pve_run.environment.audit.write('call', phase='test', cmd='hanging')\n"
        "    import threading; threading.Event().wait(8)\n"
    )
    process = project.start(*SHARE, "test_users.py")
    project.wait_for(process, cmd="hanging")
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=90)
    print(output)
    wait_until(
        lambda: not processes_mentioning(str(project.path)), deadline=Deadline(60), what="the workers to end"
    )
    assert project.left() == []


def test_the_clean_state_is_refused_in_a_shared_environment(project: Project) -> None:
    project.write(test_users="def test_clean(nested_pve_clean):\n    pass\n")
    result = project.run(*SHARE, "test_users.py")
    assert result.ret == 1
    assert "the workers share one environment (nested_pve_scope = run)" in result.output


def test_a_shared_environment_that_no_test_needs_is_not_created(project: Project) -> None:
    project.write(test_users="def test_nothing():\n    pass\n")
    result = project.run(*SHARE, "test_users.py")
    assert result.ret == 0, result.output
    assert project.done() == []
