"""The contents of a benchmark's row, and when it passes."""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as main  # noqa: E402
from benchmarks.round_trip import describe_time, rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402
from benchmarks.trip import REBOOT, Trip, api_calls, calls_rows, missing_waits, noticed_rows  # noqa: E402
from pytest_nestedpve.report.audit_model import build  # noqa: E402


@pytest.mark.parametrize(
    ("limit", "on", "passed"),
    [
        (3.0, "ours", True),
        (1.9, "ours", False),
        (0.5, "ratio", True),
        (0.4, "ratio", False),
        (-2.0, "difference", True),
        (-2.1, "difference", False),
        (None, "ours", True),
    ],
)
def test_a_limit_bounds_the_median_the_difference_or_the_ratio(
    limit: float | None, on: str, passed: bool
) -> None:
    assert Row("x", "ms", (1.0, 2.0, 90.0), (4.0,), limit, on).passed is passed


def test_without_measurements_nothing_passes() -> None:
    assert not Row("x", "ms", (), (), 5.0).passed
    assert not Row("x", "ms", (1.0,), (), 5.0, "ratio").passed


def test_rows_are_written_and_a_broken_limit_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "BENCHMARKS", {"one": lambda: [Row("one", "s", (2.0,), (4.0,), 1.0)]})
    target = tmp_path / "rows.json"
    assert main.main(["one", "--json", str(target)]) == 1
    (row,) = json.loads(target.read_text())
    assert {"name", "unit", "ours", "baseline", "ratio_median", "limit", "passed", "machine"} <= set(row)
    assert (row["ratio_median"], row["passed"]) == (0.5, False)


def test_each_phase_of_a_round_trip_is_split_by_the_kind_of_work() -> None:
    log = [
        {"ts": 0, "event": "phase_start", "phase": "setup_ssh"},
        {"ts": 1, "event": "call", "phase": "setup_ssh", "ms": 500},
        {"ts": 8, "event": "playbook", "phase": "setup_ssh", "rc": 0, "ms": 7000},
        {"ts": 9, "event": "phase_end", "phase": "setup_ssh", "status": "done", "ms": 9000},
    ]
    report = build(log)
    assert [row.name for row in rows(report)] == ["round_trip.setup_ssh", "round_trip"]
    assert "7.0 s Ansible, 1 playbook(s), 0.5 s 1 calls and commands, 1.5 s between" in describe_time(
        report.steps[0]
    )


UPID = "UPID:father:00000276:0034E7DA:6B05D800:qmstart:99921:root@pam!npve:"


def call(ts: float, phase: str, transport: str, cmd: str, **more: object) -> dict[str, object]:
    return {"ts": ts, "event": "call", "phase": phase, "transport": transport, "cmd": cmd, "rc": 0, **more}


def test_calls_are_counted_by_transport_and_other_commands_are_not_calls() -> None:
    lines = (
        call(1, "provision", "https:see", "get /version", ms=2.0),
        call(1, "provision", "https:act", "post /nodes/father/qemu", ms=8.0),
        call(1, "provision", "pvesh", "post /nodes/father/qemu/100/config", ms=1400.0),
        call(1, "provision", "ssh", "pveum user token add root@pam x"),
        call(1, "provision", "ssh", "systemctl is-active pveproxy"),
        {"ts": 2, "event": "phase_end", "phase": "provision"},
    )
    over_https, by_command = api_calls(lines)
    assert ([line["ms"] for line in over_https], len(by_command)) == ([2.0, 8.0], 2)
    started = (
        "father: pveum user token",
        "nested: pvesh get /version",
        "nested: qm list",
        "nested: pvesm set",
    )
    others, durations, heavy, light = calls_rows(Trip(lines, {}, {}, started, ()))
    assert (others.ours, others.passed) == ((0.5,), False)
    assert durations.ours == (2.0, 8.0)
    assert heavy.ours == (2.0,)
    assert "1 x nested: pvesh get /version" in heavy.note
    assert light.ours == (2.0,)


def test_an_end_is_noticed_with_the_first_answer_that_reports_it() -> None:
    status = f"get /nodes/father/tasks/{UPID}/status"
    lines = (
        call(10.0, "start_vm", "https:see", status),
        call(10.6, "start_vm", "https:see", status),
        call(20.0, "wait_ip", "https:act", "post /nodes/father/qemu/1/agent/ping", rc=255),
        call(21.5, "wait_ip", "https:act", "post /nodes/father/qemu/1/agent/ping"),
        call(30.2, "wait_ip", "https:see", "get /nodes/father/qemu/1/agent/exec-status pid"),
    )
    moments = {"wait_ip": {"qemu-guest-agent": 21.0, "cloud-init": 30.1}, "leaf_wait_ip": {}}
    rows = {row.name: row for row in noticed_rows(Trip(lines, moments, {UPID: 10.4}, (), ()))}
    assert {name: row.ours for name, row in rows.items()} == {
        "noticed.start_vm.tasks": (0.2,),
        "noticed.wait_ip.agent": (0.5,),
        "noticed.wait_ip.cloud_init": (0.1,),
    }


def test_a_wait_that_was_not_measured_is_reported() -> None:
    trip = Trip((), {"wait_ip": {}, "leaf_wait_ip": {}}, {}, (), ())
    assert "ensure_pve.reboot" in missing_waits(noticed_rows(trip))
    assert len(missing_waits(noticed_rows(trip))) == 11
    ended = {"task": REBOOT, "end": "2026-11-24T10:00:01.5"}
    event = ("pve-install", {"event": "runner_on_ok", "event_data": ended})
    moment = datetime(2026, 11, 24, 10, 0, 1, tzinfo=UTC).timestamp()
    moments = {"wait_ip": {}, "leaf_wait_ip": {}, "ensure_pve": {"ssh": moment, "login": moment + 0.25}}
    (row,) = noticed_rows(Trip((), moments, {}, (), (event,)))
    assert (row.name, row.ours) == ("noticed.ensure_pve.reboot", (0.25,))
    assert "went on 0.50 s after" in row.note


def test_the_task_of_the_reboot_is_one_of_the_playbook() -> None:
    tasks = Path(__file__).parents[2] / "playbooks/roles/pve_install/tasks/install.yml"
    assert f"- name: {REBOOT}\n      ansible.builtin.wait_for_connection:" in tasks.read_text()
