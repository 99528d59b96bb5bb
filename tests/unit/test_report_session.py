"""The report of a session: pytest-html's page, JUnit, the terminal, also with xdist."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

CONFTEST = """
from pytest_nestedpve.environment.phases import Phase
from pytest_nestedpve.pve.errors import PveError
import os

class Host:
    name = "father"
    def close(self): pass

def pytest_nestedpve_host(config, settings):
    return Host()

def look(environment):
    environment.audit.write("call", host="father", transport="ssh", cmd="true", rc=0, ms=12)
    environment.audit.masker.add("hunter2-secret")
    if os.environ.get("FAIL"):
        raise PveError("<b>no bridge</b>\\nexpected vmbr0")
    return {"did": "looked at <i>everything</i>"}

def pytest_nestedpve_phases(phases, config):
    phases[:] = [Phase("preflight", "the host has what is needed", look)]
"""
TESTS = """
import pytest
from pytest_nestedpve import steps

@pytest.mark.parametrize("x", ["<img src=q>"])
def test_mine(nested_pve_run, x):
    print("hunter2-secret")
    assert 0
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nnested_pve_host = father\n")
    return tmp_path


def run(project: Path, *arguments: str, **env: str) -> str:
    outputs = ("--html=out/page.html", "--self-contained-html", "--junitxml=junit.xml")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", *outputs, *arguments],
        cwd=project,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "INTERNALERROR" not in done.stdout + done.stderr, done.stdout
    return done.stdout


def find_page(project: Path) -> Path:
    (page,) = (project / ".nested-pve" / "runs").glob("*/report.html")
    return page


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "xdist"])
def test_every_report_names_the_run(project: Path, workers: tuple[str, ...]) -> None:
    out = run(project, "-k", "preflight", *workers)
    page = find_page(project)
    assert f"report: {page}" in out
    html = (project / "out" / "page.html").read_text()
    assert "looked at &lt;i&gt;everything" in html
    assert f'href="../.nested-pve/runs/{page.parent.name}/report.html"' in html
    properties = {
        element.attrib["name"]: element.attrib["value"]
        for element in ElementTree.parse(project / "junit.xml").iterfind("testsuite/properties/property")
    }
    assert properties == {"nested_pve_run": page.parent.name, "nested_pve_host": "father"}
    assert "passed, no leftovers" in page.read_text()


def test_ids_are_escaped_and_secrets_masked_in_pytest_htmls_page(project: Path) -> None:
    run(project)
    html = (project / "out" / "page.html").read_text()
    assert "<img src=q>" not in html
    assert "hunter2-secret" not in html


def test_a_failure_is_reported_with_its_cause_and_commands(project: Path) -> None:
    out = run(project, FAIL="1")
    assert "first cause, in preflight: <b>no bridge</b>" in out
    assert "    expected vmbr0" in out
    assert "resume:   pytest --pve-host father -k preflight" in out
    assert "clean up: nothing to do" in out
    html = (project / "out" / "page.html").read_text()
    assert "&lt;b&gt;no bridge&lt;/b&gt;" in html


def test_a_project_that_does_not_use_the_plugin_has_no_output_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_it(): pass\n")
    out = run(tmp_path)
    assert "nested" not in "\n".join(line for line in out.splitlines() if not line.startswith("plugins"))
    assert "<th>Phase</th>" not in (tmp_path / "out" / "page.html").read_text()
