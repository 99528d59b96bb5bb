"""The installed wheel in a separate environment, with a project of one test file."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import wheels

from pytest_nestedpve.lab import lifecycle
from pytest_nestedpve.pve.deadline import Deadline, wait_until

PROJECT = """
import hashlib, json
from pathlib import Path

import pytest_nestedpve
from pytest_nestedpve import lab, steps
from pytest_nestedpve.setup.ansible.runner import playbook_path
from pytest_nestedpve.lab import node

STANDIN = "nestedpve_node/api/tree.py"


def test_mine(nested_pve):
    assert nested_pve.ssh("pveversion").stdout.startswith("pve-manager/")
    installed = nested_pve.ssh(["sha256sum", f"/usr/share/nestedpve-lab/{STANDIN}"]).check().stdout.split()[0]
    packaged = Path(node.__file__).with_name("api") / "tree.py"
    paths = [pytest_nestedpve.__file__, lab.__file__, node.__file__, str(playbook_path("pve-install.yml"))]
    Path("paths.json").write_text(json.dumps({
        "paths": paths,
        "stand-ins": [installed, hashlib.sha256(packaged.read_bytes()).hexdigest()],
    }))
"""


@pytest.fixture
def lab_name() -> Iterator[str]:
    name = f"wheel-{os.getpid()}"
    yield name
    lifecycle.stop(name)


def test_a_project_of_one_file_gets_a_nested_pve_with_the_wheel_alone(tmp_path: Path, lab_name: str) -> None:
    python = wheels.install_wheel(wheels.build_wheel(tmp_path / "dist"), tmp_path / "environment")
    project = tmp_path / "project"
    project.mkdir()
    (project / "test_mine.py").write_text(PROJECT)
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "NESTED_PVE_", "PYTHON")) or name == "NESTED_PVE_CACHE"
    }
    done = subprocess.run(
        [python, "-m", "pytest", "-v", "--pve-host", f"lab:{lab_name}", "-p", "no:randomly"],
        cwd=project,
        env={**clean, "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "15 passed" in done.stdout

    report = json.loads((project / "paths.json").read_text())
    site = wheels.site_packages(tmp_path / "environment") / "pytest_nestedpve"
    for path in map(Path, report["paths"]):
        assert path.is_relative_to(site), path
    installed, packaged = report["stand-ins"]
    assert installed == packaged
    (audit,) = (project / ".nested-pve" / "runs").glob("*/audit.jsonl")
    assert str(wheels.ROOT) not in audit.read_text(), "a file of the repository was used"

    # The lab stops with its last session only if no VM of a run remains.
    wait_until(
        lambda: lab_name not in [lab.name for lab in lifecycle.list_running()],
        deadline=Deadline(30),
        what="the lab to stop after its last session",
    )
