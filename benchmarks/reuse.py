"""Sessions that resume a kept environment on the lab, against the cold session that created it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.rows import Row

ROOT = Path(__file__).parent.parent
UNCHANGED, ONE_PLAYBOOK, ONE_STEP = 0.15, 0.30, 15.0
CLEAN = """
def test_changes_it(nested_pve_clean):
    nested_pve_clean.ssh("touch /root/of-a-test").check()

def test_after_a_change(nested_pve_clean):
    pass

def test_after_no_change(nested_pve_clean):
    pass

def test_takes_the_end_of_the_session(nested_pve):
    pass
"""


def measure() -> list[Row]:
    """Rows of seconds, the cold run as their baseline. Raises RuntimeError when a session is not green."""
    with tempfile.TemporaryDirectory(prefix="bench-reuse-") as name:
        project = Path(name)
        (project / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
        (project / "test_clean.py").write_text(CLEAN)
        source = project / "source"
        source.mkdir()
        (source / "README").write_text("a source\n")
        (project / "pytest.ini").write_text(
            "[pytest]\nnested_pve_playbook_dir = playbooks\nnested_pve_sources = mine=source\n"
        )
        shutil.copytree(ROOT / "playbooks", project / "playbooks")
        keep = ("--nested-keep", "test_steps.py")
        try:
            cold = _session(project, *keep)
            unchanged = tuple(_session(project, *keep) for _ in range(3))
            edited = tuple(_session_after_edit(project, number, *keep) for number in range(3))
            step = tuple(_session_after_edit(project, 3 + n, *keep, "-k", "setup_repos") for n in range(3))
            proved = tuple(_session(project, *keep, "-k", "setup_repos") for _ in range(3))
            _session(project, "--nested-keep", "test_clean.py", "--junitxml=clean.xml")
            clean = _read_durations(project / "clean.xml")
        finally:
            _session(project, "--nested-destroy-only")
    return [
        Row("reuse.nothing_changed", "s", unchanged, (cold,), UNCHANGED, "ratio", "against the cold run"),
        Row(
            "reuse.repos_playbook_edited", "s", edited, (cold,), ONE_PLAYBOOK, "ratio", "against the cold run"
        ),
        Row(
            "reuse.one_step_edited",
            "s",
            step,
            (),
            ONE_STEP,
            note="-k setup_repos after an edit of its playbook",
        ),
        Row("reuse.one_step_proved", "s", proved, (), ONE_STEP, note="-k setup_repos, nothing changed"),
        Row("clean.after_a_change", "s", (clean["test_after_a_change"],), note="by a rollback"),
        Row("clean.after_no_change", "s", (clean["test_after_no_change"],), note="proved unchanged"),
    ]


def _session_after_edit(project: Path, number: int, *arguments: str) -> float:
    playbook = project / "playbooks" / "nested-pve-repos.yml"
    playbook.write_text(playbook.read_text() + f"# edit {number}\n")
    return _session(project, *arguments)


def _session(project: Path, *arguments: str) -> float:
    """Seconds of one session, start of pytest included."""
    began = time.monotonic()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:randomly",
            "--pve-host",
            "lab:bench-reuse",
            *arguments,
        ],
        cwd=project,
        env={**os.environ, "XDG_STATE_HOME": str(project / "state")},
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return round(time.monotonic() - began, 2)


def _read_durations(junit: Path) -> dict[str, float]:
    """Seconds by test, nearly all of them the fixture's."""
    cases = ElementTree.parse(junit).iter("testcase")
    return {case.attrib["name"]: float(case.attrib["time"]) for case in cases}
