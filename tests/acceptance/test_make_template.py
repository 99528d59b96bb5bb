"""--nested-make-template, and clean-ups beside its templates: whole sessions on the stand-in host."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest
from acceptance.conftest import CONFTEST, Project, make_project

pytestmark = pytest.mark.thorough

MAKE = "--nested-make-template"
ONLY = "--nested-destroy-only"
# No machine runs on this host: commands in the guest succeed, and it shuts down at once.
GUEST = """
from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve import qemu as guests
from pytest_nestedpve.pve.ssh.connection import CommandResult

class Guest:
    ssh = None
    def run(self, command, **options):
        with (HERE / "done").open("a") as out:
            out.write("generalised\\n")
        return CommandResult(str(command), 1 if os.environ.get("FAIL") == "guest" else 0, b"", b"no", 1.0)

def shutdown(api, node, vmid, timeout=0):
    guests.stop(api, node, vmid)

Environment.inner = property(lambda self: Guest())
guests.shutdown = shutdown
"""


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "project")
    project.write(conftest=CONFTEST + GUEST)
    return project


def created_template(output: str) -> tuple[str, int]:
    """The template that a session reports as created, as a value of --nested-run, and its VM id."""
    created = re.search(r"created the template nested-pve-(template-[0-9a-f]{12}) \(VM (\d+)\)", output)
    assert created is not None, output
    return created[1], int(created[2])


def machines(project: Project) -> list[int]:
    return project.host().vms()


def test_a_template_is_created_after_setup_network_and_nothing_else_remains(project: Project) -> None:
    result = project.run(MAKE, "-v")
    assert result.ret == 0, result.output
    template, vmid = created_template(result.output)
    assert f"nested_pve_template = nested-pve-{template}" in result.output
    assert project.done()[-2:] == ["setup_network", "generalised"]
    assert result.outcomes() == {"make-template": "PASSED"}
    assert sorted(line.split()[0] for line in project.left()) == ["pool", "vm", "volume", "volume"]
    assert machines(project) == [vmid]


def test_only_a_clean_up_that_names_the_template_destroys_it(project: Project) -> None:
    template, vmid = created_template(project.run(MAKE).output)
    before = project.host().configuration(vmid)
    assert project.run("test_users.py").ret == 0
    unnamed = project.run(ONLY, "--nested-yes")
    assert unnamed.ret == 0, unnamed.output
    assert f"--nested-run {template} removes it" in unnamed.output.replace("`", "")
    assert project.host().configuration(vmid) == before
    named = project.run(ONLY, "--nested-run", template, "-v")
    assert named.ret == 0, named.output
    assert f"{vmid} nested-pve-{template} PASSED" in named.output
    assert project.left() == []


def test_a_second_template_exists_beside_the_first(project: Project) -> None:
    first, _ = created_template(project.run(MAKE).output)
    second, vmid = created_template(project.run(MAKE).output)
    assert first != second
    assert project.run(ONLY, "--nested-run", first).ret == 0
    assert machines(project) == [vmid]


def test_an_environment_that_was_kept_is_neither_used_for_it_nor_lost(project: Project) -> None:
    kept = project.run("--nested-keep", "test_users.py")
    assert kept.ret == 0, kept.output
    (before,) = machines(project)
    _, vmid = created_template(project.run(MAKE).output)
    assert machines(project) == sorted([before, vmid])


@pytest.mark.parametrize("fails", ["ensure_pve", "guest"])
def test_a_set_up_that_fails_creates_no_template_and_leaves_nothing(project: Project, fails: str) -> None:
    result = project.run(MAKE, FAIL=fails)
    assert result.ret != 0
    assert "created the template" not in result.output
    assert project.left() == []


def test_the_next_clean_up_destroys_leftovers_of_a_conversion_that_was_killed(
    project: Project,
) -> None:
    project.slow(qmtemplate=5.0)
    process = project.start(MAKE)
    project.wait_for(process, event="template_converting")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert any("npve-template-" in line for line in project.left())
    project.host().advance(60)
    cleaned = project.run(ONLY, "-v")
    assert cleaned.ret == 0, cleaned.output
    assert project.left() == []


@pytest.mark.parametrize(
    "other", [[ONLY], ["--nested-exec", "true"], ["--nested-keep"], ["--collect-only"], ["-k", "x"]]
)
def test_a_contradicting_option_is_refused_before_anything_is_changed(
    project: Project, other: list[str]
) -> None:
    result = project.run(MAKE, *other)
    assert result.ret == 4
    assert MAKE in result.output
    assert project.done() == []


def test_a_dry_run_reports_the_conversion_and_creates_nothing(project: Project) -> None:
    result = project.run(MAKE, "--nested-dry-run")
    assert result.ret == 0, result.output
    assert "converted to a template" in result.output
    assert project.done() == []
