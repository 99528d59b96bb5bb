"""What a benchmark's row says, and when it passes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as main  # noqa: E402
from benchmarks.round_trip import bound, rows  # noqa: E402
from benchmarks.rows import Row  # noqa: E402
from pytest_nestedpve.report.model import build  # noqa: E402


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


def test_a_round_trip_says_phase_by_phase_what_bounds_it() -> None:
    log = [
        {"ts": 0, "event": "phase_start", "phase": "setup_ssh"},
        {"ts": 1, "event": "call", "phase": "setup_ssh", "ms": 500},
        {"ts": 8, "event": "playbook", "phase": "setup_ssh", "rc": 0, "ms": 7000},
        {"ts": 9, "event": "phase_end", "phase": "setup_ssh", "status": "done", "ms": 9000},
    ]
    report = build(log)
    assert [row.name for row in rows(report)] == ["round_trip.setup_ssh", "round_trip"]
    assert "7.0 s Ansible, 1 playbook(s), 0.5 s 1 commands over SSH, 1.5 s between" in bound(report.steps[0])
