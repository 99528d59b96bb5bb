"""Long phases show their progress, and pytest's own lines are unchanged."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import on_terminal

from pytest_nestedpve.report.progress import clip, format_progress

PLUGIN = """
import threading, pytest
from pytest_nestedpve.report import progress
from pytest_nestedpve.environment.phases import Phase, PhaseEnded

progress.LIVE_INTERVAL, progress.PLAIN_INTERVAL, progress.REPEAT_INTERVAL = 0.05, 0.1, 0.2
phase = Phase(name="ensure_pve", title="install", do=lambda env: None, usual=90.0)

@pytest.fixture(scope="session")
def listened(request):
    listener = progress.ProgressListener(request.config)
    listener.phase_started(phase)
    listener.progress("TASK install\\x1b[31m proxmox-ve")
    threading.Event().wait(0.5)
    listener.phase_finished(PhaseEnded(phase, "done", 0.5))
"""
TEST = "def test_one(listened): print('captured')\ndef test_two(listened): pass\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(PLUGIN)
    (tmp_path / "test_it.py").write_text(TEST)
    return tmp_path


def run(project: Path, *arguments: str, tty: bool = False) -> str:
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", *arguments]
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "60"}
    if not tty:
        done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=True)
        return done.stdout
    status, out = on_terminal(command, cwd=project, env=env)
    assert status == 0, out
    return out


def test_without_a_terminal_there_are_plain_lines(project: Path) -> None:
    out = run(project, "-v")
    lines = [line for line in out.splitlines() if line.startswith("  ensure_pve")]
    assert 1 <= len(lines) <= 5
    assert re.fullmatch(r"  ensure_pve \d\.\d s of about 1 min 30 s: TASK install\?\[31m prox.*", lines[0])
    assert "test_it.py::test_one PASSED" in out


def test_on_a_terminal_one_line_is_updated_and_then_erased(project: Path) -> None:
    out = run(project, "-v", tty=True)
    assert "\r\x1b[K  ensure_pve" in out
    assert re.search(r"\x1b\[Ktest_it\.py::test_one .*PASSED", out)
    assert "\x1b[31m proxmox" not in out


def test_with_q_there_is_no_progress(project: Path) -> None:
    assert "ensure_pve" not in run(project, "-q")


def test_a_worker_of_xdist_shows_no_progress(project: Path) -> None:
    out = run(project, "-n", "1", "-v")
    assert "ensure_pve" not in out
    assert "2 passed" in out


def test_the_line_is_cut_to_the_terminal() -> None:
    assert clip("abcdef", 4) == "abc…"
    assert format_progress("wait_ip", 3.2, None, "") == "  wait_ip 3.0 s"
