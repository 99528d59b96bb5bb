"""The usual duration of a phase is that of earlier runs on the same host, never a guess."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pytest_nestedpve.report.usual_times import RUNS, usual_times
from pytest_nestedpve.setup import default_phases


def log(runs: Path, name: str, host: str, ms: float, *, age: int = 0, status: str = "done") -> None:
    folder = runs / name
    folder.mkdir(parents=True)
    lines = [
        {"ts": 100.0, "run": name, "event": "phase_start", "phase": "provision"},
        {
            "ts": 101.0,
            "run": name,
            "event": "call",
            "phase": "provision",
            "host": host,
            "cmd": "get /version",
        },
        {"ts": 102.0, "run": name, "event": "phase_end", "phase": "provision", "status": status, "ms": ms},
        {"ts": 103.0, "run": name, "event": "phase_start", "phase": "start_vm"},
    ]
    path = folder / "audit.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"cut o')
    os.utime(path, (1_000_000 - age, 1_000_000 - age))


def test_the_usual_time_is_the_median_of_earlier_runs_on_the_same_host(tmp_path: Path) -> None:
    log(tmp_path, "a", "father", 4000)
    log(tmp_path, "b", "father", 9000)
    log(tmp_path, "c", "father", 5000)
    log(tmp_path, "d", "another", 70000)
    assert usual_times(tmp_path, "father") == {"provision": 5.0}


def test_a_teardown_has_a_usual_time_too(tmp_path: Path) -> None:
    log(tmp_path, "a", "father", 4000)
    with (tmp_path / "a" / "audit.jsonl").open("a") as out:
        out.write("\n")
        for event, fields in (("phase_start", {}), ("phase_end", {"status": "done", "ms": 3000})):
            line = {"ts": 110.0, "run": "a", "event": event, "phase": "destroy", **fields}
            out.write(json.dumps(line) + "\n")
    assert usual_times(tmp_path, "father") == {"provision": 4.0, "destroy": 3.0}


def test_all_labs_count_as_one_host(tmp_path: Path) -> None:
    log(tmp_path, "a", "lab:one", 4000)
    assert usual_times(tmp_path, "lab") == {"provision": 4.0}


def test_a_failed_or_proved_phase_does_not_count(tmp_path: Path) -> None:
    log(tmp_path, "a", "father", 4000, status="failed")
    log(tmp_path, "b", "father", 20, status="proved")
    assert usual_times(tmp_path, "father") == {}


def test_only_the_newest_runs_count(tmp_path: Path) -> None:
    for number in range(RUNS):
        log(tmp_path, f"new{number}", "father", 1000)
        log(tmp_path, f"old{number}", "father", 90000, age=1000)
    assert usual_times(tmp_path, "father") == {"provision": 1.0}


def test_without_earlier_runs_there_are_no_usual_times(tmp_path: Path) -> None:
    assert usual_times(tmp_path / "missing", "father") == {}
    assert [phase.name for phase in default_phases() if phase.usual is not None] == []
