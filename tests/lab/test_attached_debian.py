"""Attaching to a Debian without PVE: two selected steps install PVE, and no leftovers of the run remain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from lab.playbook_node import Node

from pytest_nestedpve.lab.lifecycle import LabInfo

CONFTEST = """
from pathlib import Path
from pytest_nestedpve.config import hosts

def pytest_nestedpve_host(config, settings):
    path = Path({config!r})
    return hosts.connect(hosts.resolve(settings.host, ssh_config=path))
"""
LOOK = "find /etc /root -type f | sort | xargs sha256sum; ip -4 -br address; ls /opt"
OF_THE_RUN = """
pvesh get /pools --output-format json; pveum user token list root@pam --output-format json
find /root /opt /etc/pve/priv -name '*npve*' -o -name '*nested*' -o -name '.ansible'; qm list
"""


@dataclass(frozen=True)
class Sessions:
    """A session without selected steps, one with two selected steps, and the machine after each of them."""

    node: Node
    unselected: subprocess.CompletedProcess[str]
    before: str
    between: str
    selected: subprocess.CompletedProcess[str]
    statuses: dict[str, str]
    leftovers: str
    version: str
    bridge: str
    names: str


@pytest.fixture(scope="module")
def sessions(playbook_lab: LabInfo, tmp_path_factory: pytest.TempPathFactory) -> Sessions:
    node = Node(playbook_lab, 9921, "plain", tmp_path_factory.mktemp("n"))
    node.create()
    node.start()
    project = tmp_path_factory.mktemp("project")
    (project / "conftest.py").write_text(CONFTEST.format(config=str(node.ssh_config)))
    (project / "test_steps.py").write_text("from pytest_nestedpve import steps\n")
    settings = {key.replace("nested_pve_", ""): value for key, value in node.variables.items()}
    lines = "".join(f"nested_pve_{key} = {value}\n" for key, value in settings.items())
    (project / "pytest.ini").write_text(f"[pytest]\n{lines}")

    def session(*args: str) -> subprocess.CompletedProcess[str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("NESTED_PVE_", "PYTEST"))}
        command = [sys.executable, "-m", "pytest", "-v", "-p", "no:randomly", "-p", "no:cacheprovider"]
        return subprocess.run(
            [*command, "--nested-attach", node.name, *args],
            cwd=project,
            env={**clean, "XDG_STATE_HOME": str(project / "state"), "COLUMNS": "160"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )

    before = node.sh(LOOK)
    unselected = session("test_steps.py")
    between = node.sh(LOOK)
    selected = session("-k", "ensure_pve or setup_network")
    assert selected.returncode == 0, selected.stdout + selected.stderr
    log = max(project.glob(".nested-pve/runs/*/audit.jsonl"), key=lambda path: path.stat().st_mtime)
    ends = [json.loads(line) for line in log.read_text().splitlines() if '"phase_end"' in line]
    return Sessions(
        node, unselected, before, between, selected,
        {line["phase"]: line["status"] for line in ends},
        leftovers=node.sh(OF_THE_RUN),
        version=node.sh("pveversion; systemctl is-active pve-cluster pvedaemon pveproxy"),
        bridge=node.sh("ip -4 -br address show dev vmbr0; ip -br link show master vmbr0"),
        names=node.sh("ls /etc/pve/nodes; getent ahostsv4 $(hostname)"),
    )  # fmt: skip


@pytest.mark.thorough
def test_without_selected_steps_a_debian_is_refused_and_not_changed(sessions: Sessions) -> None:
    assert sessions.unselected.returncode == 4
    assert "Or select the step that provides it: -k ensure_pve." in sessions.unselected.stdout
    assert sessions.between == sessions.before


@pytest.mark.thorough
def test_selected_steps_install_pve_and_a_bridge(sessions: Sessions) -> None:
    assert (sessions.statuses["ensure_pve"], sessions.statuses["setup_network"]) == ("done", "done")
    assert sessions.version.startswith("pve-manager/")
    assert sessions.version.splitlines()[1:] == ["active"] * 3
    assert f" {sessions.node.ip}/" in sessions.bridge
    assert "eth0" in sessions.bridge
    assert sessions.names.split()[:2] == ["plain", sessions.node.ip]


@pytest.mark.thorough
def test_lasting_changes_are_reported_and_no_leftovers_remain(sessions: Sessions) -> None:
    assert "plain is not restored: ensure_pve installed PVE" in sessions.selected.stdout
    assert (
        "plain is not restored: setup_network changed its network configuration" in sessions.selected.stdout
    )
    assert "no leftovers" in sessions.selected.stdout
    assert "npve-" not in sessions.leftovers
    assert "nested" not in sessions.leftovers
    assert ".ansible" not in sessions.leftovers
