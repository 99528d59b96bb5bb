"""The clean state of a test: what set-up made, nothing that tests did, whatever happened on the way to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from acceptance.conftest import Project, make_project
from acceptance.test_keeping import CONFTEST, SETUP

pytestmark = pytest.mark.thorough

# There is no guest to look into: what it has of phases and tests stands in its VM's configuration, which the
# snapshots of the stand-in host hold.
INSIDE = """
import pytest
from pytest_nestedpve.setup import clean_state as clean

def config(environment):
    return environment.outer.api.get(address(environment))

def look(state):
    return {key: config(state._env).get(key, "") for key in ("searchdomain", "nameserver")}

def back(environment, name, really=clean.snapshots.roll_back):
    if (HERE / "refuse").exists():
        (HERE / "refuse").unlink()
        raise PveError("the rollback went wrong on purpose")
    really(environment, name)

clean.CleanState._fingerprint = look
clean.CleanState._await_health = lambda state, deadline: None
clean.snapshots.roll_back = back

class Guest:
    def __init__(self, environment):
        self.environment = environment

    def phases(self):
        return config(self.environment).get("searchdomain", "").split()

    def of_tests(self):
        return config(self.environment).get("nameserver", "").split()

    def leave(self, name):
        names = " ".join([*self.of_tests(), name])
        self.environment.outer.api.put(address(self.environment), nameserver=names)

@pytest.fixture
def inside_it(nested_pve_run):
    return Guest(nested_pve_run.environment)
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Project]:
    made = make_project(tmp_path / "project")
    (made.path / "test_users.py").unlink()
    made.write(conftest=CONFTEST.format(tests=str(Path(__file__).parents[1])) + INSIDE)
    yield made
    assert made.left() == []


def test_a_phase_that_the_last_one_does_not_need_is_not_waited_for(project: Project) -> None:
    """The clean state is taken when all is done that a test can want, before any test has it."""
    project.write(
        conftest=(project.path / "conftest.py").read_text()
        + """
_all = pytest_nestedpve_phases

def pytest_nestedpve_phases(phases, config):
    _all(phases, config)
    needs = tuple(phase.name for phase in phases[:-1] if phase.name != "sync_repos")
    phases[-1] = dataclasses.replace(phases[-1], needs=needs)
""",
        test_u="""
def test_leaves(nested_pve, inside_it):
    inside_it.leave("bob")

def test_clean(nested_pve_clean, inside_it):
    assert inside_it.of_tests() == []
""",
    )
    result = project.run("test_u.py")
    assert result.ret == 0, result.output


def test_a_rerun_has_the_clean_state_again(project: Project) -> None:
    project.plugins = ("pytest_rerunfailures",)
    project.write(
        test_flaky="attempts = []\n"
        "def test_flaky(nested_pve_clean, inside_it):\n"
        "    assert inside_it.of_tests() == []\n"
        "    inside_it.leave('bob')\n"
        "    attempts.append(1)\n"
        "    assert len(attempts) == 3\n"
    )
    result = project.run("--reruns=2", "test_flaky.py")
    assert result.ret == 0, result.output
    assert "1 passed, 2 rerun" in result.output


def test_after_a_rollback_that_failed_the_next_test_has_no_less(project: Project) -> None:
    project.write(
        test_one="from pathlib import Path\n"
        "def test_leaves_much(nested_pve_clean, inside_it):\n"
        "    inside_it.leave('bob')\n"
        "    Path('refuse').touch()\n",
        test_two="import pytest\n"
        "pytestmark = pytest.mark.nested_pve_clean(scope='module')\n"
        "def test_first(nested_pve_clean):\n"
        "    pass\n"
        "def test_second(nested_pve_clean, inside_it):\n"
        "    assert inside_it.of_tests() == []\n"
        "    inside_it.leave('eve')\n"
        "def test_third(nested_pve_clean, inside_it):\n"
        "    assert inside_it.of_tests() == ['eve']\n",
    )
    result = project.run("-v", "test_one.py", "test_two.py")
    assert "nested_pve_clean: the rollback went wrong on purpose" in result.output
    assert result.outcomes() == {
        "test_leaves_much": "PASSED", "test_first": "ERROR", "test_second": "PASSED", "test_third": "PASSED",
    }  # fmt: skip


def test_a_clean_state_is_the_complete_set_up_whatever_the_first_test_wants(project: Project) -> None:
    project.write(
        test_some="import pytest\n"
        "@pytest.mark.nested_pve(upto='setup_network')\n"
        "def test_first(nested_pve_clean, inside_it):\n"
        "    inside_it.leave('bob')\n"
        "def test_then(nested_pve_clean, inside_it):\n"
        f"    assert inside_it.phases() == {SETUP}\n"
        "    assert inside_it.of_tests() == []\n"
        "    inside_it.leave('eve')\n"
        "def test_last(nested_pve_clean, inside_it):\n"
        f"    assert inside_it.phases() == {SETUP}\n",
        test_asks="import pytest\n"
        "@pytest.mark.nested_pve(upto='setup_network')\n"
        "def test_dynamically(request, inside_it):\n"
        "    request.getfixturevalue('nested_pve_clean')\n"
        "    inside_it.leave('bob')\n"
        "def test_then(nested_pve_clean, inside_it):\n"
        f"    assert inside_it.phases() == {SETUP}\n"
        "    assert inside_it.of_tests() == []\n",
    )
    for file in ("test_some.py", "test_asks.py"):
        result = project.run(file)
        assert result.ret == 0, result.output


def test_a_set_up_that_is_complete_is_remembered_before_a_test_that_wants_less(project: Project) -> None:
    project.write(
        test_all="import pytest\n"
        "from pytest_nestedpve import steps\n"
        "@pytest.mark.nested_pve(upto='wait_ip')\n"
        "def test_wants_less(nested_pve, inside_it):\n"
        "    inside_it.leave('bob')\n"
        "def test_clean(nested_pve_clean, inside_it):\n"
        "    assert inside_it.of_tests() == []\n"
    )
    result = project.run("test_all.py")
    assert result.ret == 0, result.output


MESS = "def test_mess(nested_pve, inside_it):\n    inside_it.leave('bob')\n"


def test_changes_of_a_session_are_not_in_the_clean_state_of_the_next_one(project: Project) -> None:
    """No test of the first session requested a clean state."""
    project.write(
        test_mess=MESS,
        test_clean="def test_clean(nested_pve_clean, inside_it):\n"
        f"    assert inside_it.phases() == {SETUP}\n"
        "    assert inside_it.of_tests() == []\n"
        "    inside_it.leave('eve')\n",
    )
    assert project.run("--nested-keep", "test_mess.py").ret == 0
    for option in (["--nested-keep"], ["--nested-keep"], []):
        result = project.run(*option, "test_clean.py")
        assert result.ret == 0, result.output


def test_a_phase_that_is_done_again_is_part_of_the_clean_state(project: Project) -> None:
    (project.path / "playbooks").mkdir()
    project.write(
        test_mess=MESS,
        test_clean="def test_clean(nested_pve_clean, inside_it):\n"
        "    assert inside_it.phases().count('setup_repos') == 2\n"
        "    assert 'eve' not in inside_it.of_tests()\n"
        "    inside_it.leave('eve')\n",
    )
    assert project.run("--nested-keep", "test_mess.py").ret == 0
    (project.path / "playbooks" / "setup_repos").write_text("edited")
    assert project.run("--nested-keep", "test_steps.py", "-k", "setup_repos").ret == 0
    for option in (["--nested-keep"], ["--nested-keep"], []):
        result = project.run(*option, "test_clean.py")
        assert result.ret == 0, result.output
