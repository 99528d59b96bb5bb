"""The project as its users have it: a wheel, installed elsewhere, and a test file of a few lines."""

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

STANDIN = "nestedpve_node/tree.py"


def test_mine(nested_pve):
    assert nested_pve.ssh("pveversion").stdout.startswith("pve-manager/")
    installed = nested_pve.ssh(["sha256sum", f"/usr/share/nestedpve-lab/{STANDIN}"]).check().stdout.split()[0]
    own = Path(node.__file__).with_name("tree.py")
    paths = [pytest_nestedpve.__file__, lab.__file__, node.__file__, str(playbook_path("pve-install.yml"))]
    Path("seen.json").write_text(json.dumps({
        "paths": paths,
        "stand-ins": [installed, hashlib.sha256(own.read_bytes()).hexdigest()],
    }))
"""


@pytest.fixture
def lab_name() -> Iterator[str]:
    name = f"wheel-{os.getpid()}"
    yield name
    lifecycle.stop(name)


def test_a_project_of_one_file_gets_its_nested_pve_out_of_the_wheel(tmp_path: Path, lab_name: str) -> None:
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

    seen = json.loads((project / "seen.json").read_text())
    site = wheels.site_packages(tmp_path / "environment") / "pytest_nestedpve"
    for path in map(Path, seen["paths"]):
        assert path.is_relative_to(site), path
    installed, own = seen["stand-ins"]
    assert installed == own
    (audit,) = (project / ".nested-pve" / "runs").glob("*/audit.jsonl")
    assert str(wheels.ROOT) not in audit.read_text(), "something of the repository was used"

    # The lab went with its session: nothing that is ours was left in it.
    wait_until(
        lambda: lab_name not in [lab.name for lab in lifecycle.list_running()],
        deadline=Deadline(30),
        what="the lab to stop after its last session",
    )
