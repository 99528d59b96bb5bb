"""Fixtures that a project overrides set the VM's shape, for steps and for tests that use the fixture."""

from __future__ import annotations

import json
from typing import Any

import pytest
from acceptance.conftest import Project

pytestmark = pytest.mark.thorough

SEES = """

SEEN = ("cores", "memory", "disk", "image", "vm_options", "extra_vars", "playbook_dir", "storage")

def _sees(phase):
    def do(environment):
        (HERE / "seen").write_text(json.dumps({
            name: str(getattr(environment.settings, name)) if name == "playbook_dir"
            else getattr(environment.settings, name)
            for name in SEEN
        }))
        return phase.do(environment)
    def probe(environment):
        from pytest_nestedpve.setup.resume import resume
        if environment.resumed and not environment.has_lease and not resume(environment):
            return None
        return environment.facts.get("provision")
    return dataclasses.replace(phase, do=do, probe=probe) if phase.name == "provision" else phase

import json
_plain = pytest_nestedpve_phases

def pytest_nestedpve_phases(phases, config):
    _plain(phases, config)
    phases[:] = [_sees(phase) for phase in phases]
"""

FIXTURES = """

@pytest.fixture(scope="session")
def nested_pve_cores():
    return 3

@pytest.fixture(scope="session")
def nested_pve_memory():
    return "4G"

@pytest.fixture(scope="session")
def nested_pve_vm_options(nested_pve_vm_options):
    return {**nested_pve_vm_options, "kvm": False}

@pytest.fixture(scope="session")
def replicas():
    return {"replicas": 2}

@pytest.fixture(scope="session")
def nested_pve_extra_vars(nested_pve_extra_vars, replicas):
    return {**nested_pve_extra_vars, **replicas, "listed": [1, "b", None]}

@pytest.fixture(scope="session")
def nested_pve_playbook_dir():
    return "plays"

@pytest.fixture(scope="session")
def nested_pve_storage():
    return "of another"
"""

INI = """[pytest]
nested_pve_vm_options = vga=none
nested_pve_extra_vars = greeting=hello
nested_pve_disk = 40
"""


@pytest.fixture
def shaped(project: Project) -> Project:
    path = project.path / "conftest.py"
    path.write_text(path.read_text() + SEES + FIXTURES)
    (project.path / "pytest.ini").write_text(INI)
    (project.path / "plays").mkdir()
    return project


def recorded_settings(project: Project) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((project.path / "seen").read_text())
    return values


@pytest.mark.parametrize("file", ["test_steps.py", "test_users.py"])
def test_values_of_fixtures_are_set_before_the_first_phase(shaped: Project, file: str) -> None:
    result = shaped.run(file)
    assert result.ret == 0, result.output
    assert recorded_settings(shaped) == {
        "cores": 3,
        "memory": 4096,
        "disk": 40,
        "image": None,
        "vm_options": {"vga": "none", "kvm": "0"},
        "extra_vars": {"greeting": "hello", "replicas": 2, "listed": [1, "b", None]},
        "playbook_dir": str(shaped.path / "plays"),
        "storage": None,
    }


def test_a_kept_environment_is_compared_with_the_values_of_the_fixtures(shaped: Project) -> None:
    assert shaped.run("-k", "provision", "--nested-keep").ret == 0
    second = shaped.run("-k", "provision", "--nested-keep")
    assert second.ret == 0, second.output
    assert len(shaped.audits()) == 1, second.output
    path = shaped.path / "conftest.py"
    path.write_text(path.read_text().replace("return 3", "return 5"))
    other = shaped.run("-k", "provision", "--nested-keep")
    assert "it was created with other settings (cores: 3, now 5)" in other.output
    assert len(shaped.audits()) == 2
    assert shaped.run("--nested-destroy-only").ret == 0


@pytest.mark.parametrize("file", ["test_steps.py", "test_users.py"])
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('"many"', "the fixture nested_pve_cores: expected a number of cores"),
        ("{}", "the fixture nested_pve_cores: expected a single value"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_fixture_with_an_invalid_value_is_named_and_nothing_is_created(
    shaped: Project, file: str, value: str, words: str
) -> None:
    path = shaped.path / "conftest.py"
    path.write_text(path.read_text().replace("return 3", f"return {value}"))
    result = shaped.run(file)
    assert result.ret == 1, result.output
    assert words in result.output
    assert shaped.done() == []
    assert shaped.audits() == []


@pytest.mark.parametrize("how", ["params", "indirect"])
def test_a_parametrized_shape_is_refused_before_anything_is_created(shaped: Project, how: str) -> None:
    mark, params = "", ", params=[2, 4]"
    if how == "indirect":
        mark, params = "@pytest.mark.parametrize('nested_pve_cores', [2, 4], indirect=True)\n", ""
    shaped.write(
        test_other=f"""
import pytest

@pytest.fixture(scope="session"{params})
def nested_pve_cores(request):
    return request.param

{mark}def test_other(nested_pve):
    pass
"""
    )
    result = shaped.run("test_other.py")
    assert result.ret == 4, result.output
    assert "the fixture nested_pve_cores: expected one value" in result.output
    assert shaped.done() == []


def test_two_shapes_in_one_session_are_refused_before_anything_is_created(shaped: Project) -> None:
    shaped.write(
        test_other="""
import pytest

@pytest.fixture(scope="session")
def nested_pve_cores():
    return 7

def test_other(nested_pve):
    pass
"""
    )
    result = shaped.run()
    assert result.ret == 4, result.output
    assert "nested_pve_cores has one value for" in result.output
    assert shaped.done() == []


def test_a_fixture_of_a_narrower_scope_is_refused(shaped: Project) -> None:
    path = shaped.path / "conftest.py"
    path.write_text(
        path.read_text().replace('(scope="session")\ndef nested_pve_cores', "\ndef nested_pve_cores")
    )
    result = shaped.run("test_users.py")
    assert result.ret == 4, result.output
    assert "nested_pve_cores: expected scope='session'" in result.output


def test_under_xdist_each_worker_has_the_shape(shaped: Project) -> None:
    shaped.plugins = ("xdist",)
    result = shaped.run("-n1", "test_users.py")
    assert result.ret == 0, result.output
    assert recorded_settings(shaped)["cores"] == 3
