"""The example project on a lab, as a user runs it: from the wheel, with its own playbook and proxmoxer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import wheels

from pytest_nestedpve.lab import lifecycle

EXAMPLE = wheels.ROOT / "examples" / "own-project"


@pytest.fixture
def lab_name() -> Iterator[str]:
    name = f"example-{os.getpid()}"
    yield name
    lifecycle.stop(name)


def test_the_example_project_works_with_the_wheel(tmp_path: Path, lab_name: str) -> None:
    python = wheels.install_wheel(wheels.build_wheel(tmp_path / "dist"), tmp_path / "environment")
    project = tmp_path / "project"
    shutil.copytree(EXAMPLE, project, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST", "NESTED_PVE_", "PYTHON", "ANSIBLE_")) or name == "NESTED_PVE_CACHE"
    }
    done = subprocess.run(
        [python, "-m", "pytest", "-v", "--pve-host", f"lab:{lab_name}", "-p", "no:randomly"],
        cwd=project,
        # Programs of the shared dependencies are beside the python of these tests.
        env={**clean, "COLUMNS": "160", "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "13 passed" in done.stdout
    assert "do not apply" not in done.stdout

    (audit,) = (project / ".nested-pve" / "runs").glob("*/audit.jsonl")
    lines = [json.loads(line) for line in audit.read_text().splitlines()]
    (storage_end,) = [
        line for line in lines if (line["event"], line.get("phase")) == ("phase_end", "backup_storage")
    ]
    assert (storage_end["status"], storage_end["facts"]["did"]) == ("done", "1 changed")
    (vm_end,) = [line for line in lines if (line["event"], line.get("phase")) == ("phase_end", "provision")]
    assert "4096 MiB" in vm_end["facts"]["did"]
    assert str(wheels.ROOT) not in audit.read_text(), "a file of the repository was used"
