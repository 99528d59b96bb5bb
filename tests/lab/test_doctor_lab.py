"""The doctor on a lab: it finds all requirements and creates nothing: no task, no token, no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lab.on_lab import HandLab, Project

pytestmark = pytest.mark.timeout(600)

# By the lab's own commands, without times of access and changing counters.
STATE = """
for path in /pools /storage /access/users /access/acl /access/users/root@pam/token /nodes/father/qemu \
    /nodes/father/tasks /nodes/father/network /cluster/backup; do
    echo "$path"; pvesh get $path --output-format json
done
ls -lAR --time-style=+ /etc/pve /var/lib/vz/snippets /var/lib/vz/images /root /etc/modprobe.d /etc/ssh
cat /etc/pve/storage.cfg /root/.ssh/authorized_keys; ls /tmp
"""


def test_the_doctor_creates_nothing_and_finds_all_that_a_run_uses(hand_lab: HandLab, tmp_path: Path) -> None:
    project = Project(tmp_path / "project", hand_lab, 99700, 99709, tmp_path / "state")
    project.create()
    before = hand_lab.run(STATE)
    assert project.run("--nested-doctor", "--nested-json", "out.json") == 0, project.output()
    assert hand_lab.run(STATE) == before
    rows = json.loads((project.path / "out.json").read_text())
    levels = {row["what"]: row["level"] for row in rows if row["row"] == "check"}
    assert set(levels.values()) == {"ok"}, levels
    assert {"login", "forwarding", "nested virtualisation", "memory", "image", "transport"} <= set(levels)
    choices = {row["what"]: row for row in rows if row["row"] == "choice"}
    assert choices["API"]["value"].startswith("HTTPS through SSH")
    assert "/etc/nested-pve.ini" in choices["bridge"]["why"]
    assert "10 of 10 free" in choices["id"]["why"]
    assert not project.runs()
