"""A person at a terminal sees what takes long: phases, and also the teardown."""

from __future__ import annotations

import re
import signal

from acceptance.conftest import Project
from terminals import on_terminal


def shown(project: Project, *args: str) -> str:
    status, out = on_terminal(
        project.command("-v", *args), cwd=project.path, env=project.environ(TERM="xterm", COLUMNS="100")
    )
    assert status == 0, out
    return out


def test_a_teardown_says_how_far_it_is_and_for_how_long(project: Project) -> None:
    project.slow(qmdestroy=2.5)
    out = shown(project, "test_steps.py", "-k", "start_vm")
    assert re.search(r"\x1b\[K  destroy [1-9]\.\d s: destroying 1 VM", out)
    assert "1 passed" in out.splitlines()[-1]


def test_a_clean_up_of_what_a_killed_session_left_does_so_too(project: Project) -> None:
    process = project.start("-q", "test_steps.py", HANG="start_vm")
    project.wait_for(process, cmd="hanging")
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    project.slow(qmdestroy=2.5)
    out = shown(project, "--nested-destroy-only")
    assert re.search(r"\x1b\[K  destroy [1-9]\.\d s: destroying 1 VM", out)
    assert re.search(r"\x1b\[Knested-pve::\d+ nested-pve-.*PASSED", out)
