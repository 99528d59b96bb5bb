"""After a phase failed on a lab the run holds what helps: one session, judged by several tests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from lab.on_lab import Project, start_by_hand, stop_by_hand

LOW = 97900


@dataclass(frozen=True)
class Failed:
    """What a session left here whose phase `ensure_pve` failed after it had done its work."""

    project: Project
    output: str
    files: dict[str, str]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.project.audit() if line["event"] == name]


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Failed]:
    path: Path = tmp_path_factory.mktemp("failed")
    lab = start_by_hand()
    try:
        project = Project(path / "project", lab, LOW, LOW + 9, path / "state")
        project.write()
        status = project.run("-q", "test_steps.py", "-k", "test_ensure_pve", env={"FAIL": "ensure_pve"})
        assert status == 1, project.output()
        (run,) = project.runs()
        folder = project.path / ".nested-pve" / "runs" / run / "artifacts" / "failure-ensure_pve"
        files = {each.name: each.read_text(errors="replace") for each in folder.iterdir()}
        yield Failed(project, project.output(), files)
        assert project.left() == []
    finally:
        stop_by_hand(lab)


def test_the_artifacts_hold_the_guests_journal(failed: Failed) -> None:
    assert "systemd[1]" in failed.files["nested-journal.txt"]
    assert "pmxcfs" in failed.files["nested-journal.txt"]
    assert "nested-services.txt" in failed.files


def test_the_serial_console_is_found_where_the_host_keeps_its_log(failed: Failed) -> None:
    """A lab's machines write to theirs only when something is wrong with the boot."""
    (told,) = failed.events("artifacts")
    why = {each["what"]: each["why"] for each in told["missing"]}
    if "nested-console.log" not in failed.files:
        assert "is there, and empty" in why["serial console of the nested VM"]
    assert "QEMU's monitor gave no picture" in why["screen of the nested VM"]


def test_the_artifacts_hold_cloud_inits_logs(failed: Failed) -> None:
    assert "DataSourceNoCloud" in failed.files["nested-cloud-init.log"]
    assert "status:" in failed.files["nested-cloud-init.txt"]


def test_the_artifacts_hold_the_logs_of_the_runs_own_tasks(failed: Failed) -> None:
    logs = {name: text for name, text in failed.files.items() if name.startswith("task-")}
    assert {"qmcreate", "qmconfig", "qmstart"} <= {name.split("-")[2] for name in logs}
    assert all("UPID:father:" in text for text in logs.values())
    assert any("TASK OK" in text for text in logs.values())


def test_the_artifacts_hold_the_state_of_the_network_and_of_the_vm(failed: Failed) -> None:
    network = failed.files["nested-network.txt"]
    for wanted in ("== ip addr", "== ip route", "inet 10.211.", "/etc/resolv.conf", "/etc/hosts", "netplan"):
        assert wanted in network
    assert '"scsi0"' in failed.files["nested-config.json"]
    assert '"running"' in failed.files["nested-status.json"]


def test_they_are_told_of_and_came_within_the_limit(failed: Failed) -> None:
    (told,) = failed.events("artifacts")
    assert {each["file"] for each in told["files"]} == failed.files.keys()
    assert told["ms"] < 30_000
    assert "files:    " in failed.output


def test_a_healthy_nodes_logs_are_taken_for_no_symptom(failed: Failed) -> None:
    """The phase failed on purpose, after everything had gone well."""
    assert failed.events("symptom") == []
    assert "known: " not in failed.output
