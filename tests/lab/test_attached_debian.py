"""Attached to a Debian that is no PVE yet: two chosen steps make it one, and nothing of the run is left."""

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
    place = Path({config!r})
    return hosts.connect(hosts.resolve(settings.host, ssh_config=place))
"""
LOOK = "find /etc /root -type f | sort | xargs sha256sum; ip -4 -br address; ls /opt"
OF_THE_RUN = """
pvesh get /pools --output-format json; pveum user token list root@pam --output-format json
find /root /opt /etc/pve/priv -name '*npve*' -o -name '*nested*' -o -name '.ansible'; qm list
"""


@dataclass(frozen=True)
class Story:
    """A session that chose nothing, one that chose two steps, and the machine after each."""

    node: Node
    unchosen: subprocess.CompletedProcess[str]
    before: str
    between: str
    chosen: subprocess.CompletedProcess[str]
    statuses: dict[str, str]
    left: str
    version: str
    bridge: str
    named: str


@pytest.fixture(scope="module")
def story(playbook_lab: LabInfo, tmp_path_factory: pytest.TempPathFactory) -> Story:
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
    unchosen = session("test_steps.py")
    between = node.sh(LOOK)
    chosen = session("-k", "ensure_pve or setup_network")
    assert chosen.returncode == 0, chosen.stdout + chosen.stderr
    log = max(project.glob(".nested-pve/runs/*/audit.jsonl"), key=lambda each: each.stat().st_mtime)
    ended = [json.loads(line) for line in log.read_text().splitlines() if '"phase_end"' in line]
    return Story(
        node, unchosen, before, between, chosen,
        {line["phase"]: line["status"] for line in ended},
        left=node.sh(OF_THE_RUN),
        version=node.sh("pveversion; systemctl is-active pve-cluster pvedaemon pveproxy"),
        bridge=node.sh("ip -4 -br address show dev vmbr0; ip -br link show master vmbr0"),
        named=node.sh("ls /etc/pve/nodes; getent ahostsv4 $(hostname)"),
    )  # fmt: skip


@pytest.mark.thorough
def test_without_a_choice_it_is_refused_and_not_changed(story: Story) -> None:
    assert story.unchosen.returncode == 4
    assert "Or choose the step that brings it: -k ensure_pve." in story.unchosen.stdout
    assert story.between == story.before


@pytest.mark.thorough
def test_chosen_steps_make_it_a_pve_with_a_bridge(story: Story) -> None:
    assert (story.statuses["ensure_pve"], story.statuses["setup_network"]) == ("done", "done")
    assert story.version.startswith("pve-manager/")
    assert story.version.splitlines()[1:] == ["active"] * 3
    assert f" {story.node.ip}/" in story.bridge
    assert "eth0" in story.bridge
    assert story.named.split()[:2] == ["plain", story.node.ip]


@pytest.mark.thorough
def test_what_stays_is_told_and_nothing_else_stays(story: Story) -> None:
    assert "plain stays as it is now: ensure_pve installed PVE" in story.chosen.stdout
    assert "plain stays as it is now: setup_network changed how it is on the network" in story.chosen.stdout
    assert "and nothing is left" in story.chosen.stdout
    assert "npve-" not in story.left
    assert "nested" not in story.left
    assert ".ansible" not in story.left
