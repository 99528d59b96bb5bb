"""The usual duration of phases on a host, from the audit logs of earlier runs on it; never estimated."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.report.audit_model import Step

RUNS = 5
"""Number of the newest runs to read."""


def usual_times(run_dir: Path, host: str) -> dict[str, float]:
    """Seconds by phase: the median of its duration in the newest runs below `run_dir` on `host`.

    All labs count as one host. Phases of teardowns are included. Logs that cannot be read are ignored.
    """
    from pytest_nestedpve.report.audit_model import read_audit

    durations: dict[str, list[float]] = {}
    count = 0
    for log in _newest_first(run_dir):
        if count == RUNS:
            break
        try:
            run = read_audit(log, whole=True)
        except OSError:
            continue
        done = [step for step in run.steps if _is_timed(step)]
        if not done or _host_key(run.host) != _host_key(host):
            continue
        count += 1
        for step in (*done, *filter(_is_timed, run.teardown_steps)):
            durations.setdefault(step.name, []).append(step.seconds or 0.0)
    return {name: statistics.median(seconds) for name, seconds in durations.items()}


def _is_timed(step: Step) -> bool:
    return step.status == "done" and step.seconds is not None


def _newest_first(run_dir: Path) -> list[Path]:
    dated = []
    for log in run_dir.glob("*/audit.jsonl"):
        try:
            dated.append((log.stat().st_mtime, log))
        except OSError:
            continue
    return [log for _, log in sorted(dated, reverse=True)]


def _host_key(host: str) -> str:
    return host.partition(":")[0] if host.startswith("lab:") else host
