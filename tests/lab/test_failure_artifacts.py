"""Artifacts of a run whose phase failed on a lab: one session, checked by several tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab.on_lab import Project, start_by_hand, stop_by_hand

LOW = 97900


@dataclass(frozen=True)
class FailedSession:
    """Output and artifacts of a session whose phase `ensure_pve` failed after its work."""

    project: Project
    output: str
    files: dict[str, str]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.project.audit() if line["event"] == name]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FailedSession]:
    path: Path = tmp_path_factory.mktemp("failed")
    lab = start_by_hand()
    try:
        project = Project(path / "project", lab, LOW, LOW + 9, path / "state")
        project.create()
        status = project.run("-q", "test_steps.py", "-k", "test_ensure_pve", env={"FAIL": "ensure_pve"})
        assert status == 1, project.output()
        (run,) = project.runs()
        folder = project.path / ".nested-pve" / "runs" / run / "artifacts" / "failure-ensure_pve"
        files = {path.name: path.read_text(errors="replace") for path in folder.iterdir()}
        yield FailedSession(project, project.output(), files)
        assert project.leftovers() == []
    finally:
        stop_by_hand(lab)


def test_the_artifacts_hold_the_guests_journal(failed: FailedSession) -> None:
    assert "systemd[1]" in failed.files["nested-journal.txt"]
    assert "pmxcfs" in failed.files["nested-journal.txt"]
    assert "nested-services.txt" in failed.files


def test_the_serial_console_is_read_from_the_hosts_log(failed: FailedSession) -> None:
    """In a lab a node writes to its console only if its boot fails."""
    (event,) = failed.events("artifacts")
    why = {entry["what"]: entry["why"] for entry in event["missing"]}
    if "nested-console.log" not in failed.files:
        assert "serial device is empty" in why["serial console of the nested VM"]
    assert "QEMU's monitor wrote no picture" in why["screen of the nested VM"]


def test_the_artifacts_hold_cloud_inits_logs(failed: FailedSession) -> None:
    assert "DataSourceNoCloud" in failed.files["nested-cloud-init.log"]
    assert "status:" in failed.files["nested-cloud-init.txt"]


def test_the_artifacts_hold_the_logs_of_the_runs_own_tasks(failed: FailedSession) -> None:
    logs = {name: text for name, text in failed.files.items() if name.startswith("task-")}
    assert {"qmcreate", "qmconfig", "qmstart"} <= {name.split("-")[2] for name in logs}
    assert all("UPID:father:" in text for text in logs.values())
    assert any("TASK OK" in text for text in logs.values())


def test_the_artifacts_hold_the_state_of_the_network_and_of_the_vm(failed: FailedSession) -> None:
    network = failed.files["nested-network.txt"]
    for text in ("== ip addr", "== ip route", "inet 10.211.", "/etc/resolv.conf", "/etc/hosts", "netplan"):
        assert text in network
    assert '"scsi0"' in failed.files["nested-config.json"]
    assert '"running"' in failed.files["nested-status.json"]


def test_artifacts_are_listed_in_output_and_log_and_collected_within_the_limit(failed: FailedSession) -> None:
    (event,) = failed.events("artifacts")
    assert {entry["file"] for entry in event["files"]} == failed.files.keys()
    assert event["ms"] < 30_000
    assert "files:    " in failed.output


def test_logs_of_a_healthy_node_match_no_known_symptom(failed: FailedSession) -> None:
    """The phase failed on purpose, after all its work had succeeded."""
    assert failed.events("symptom") == []
    assert "known: " not in failed.output
