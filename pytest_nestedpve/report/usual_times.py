"""How long phases take on a host: what earlier runs took there, from their audit logs; nothing is guessed."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pytest_nestedpve.report.audit_model import Step

RUNS = 5
"""How many of the newest runs are looked at."""


def usual_times(run_dir: Path, host: str) -> dict[str, float]:
    """Seconds by phase: the median of what the newest runs below `run_dir` on `host` took to do it.

    All labs count as one host. Phases of teardowns are in it, one that no run did is not; logs that cannot
    be read are none.
    """
    from pytest_nestedpve.report.audit_model import read_audit

    found: dict[str, list[float]] = {}
    seen = 0
    for log in _newest_first(run_dir):
        if seen == RUNS:
            break
        try:
            run = read_audit(log, whole=True)
        except OSError:
            continue
        done = [step for step in run.steps if _took(step)]
        if not done or _kind(run.host) != _kind(host):
            continue
        seen += 1
        for step in (*done, *filter(_took, run.teardown_steps)):
            found.setdefault(step.name, []).append(step.seconds or 0.0)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _took(step: Step) -> bool:
    return step.status == "done" and step.seconds is not None


def _newest_first(run_dir: Path) -> list[Path]:
    dated = []
    for log in run_dir.glob("*/audit.jsonl"):
        try:
            dated.append((log.stat().st_mtime, log))
        except OSError:
            continue
    return [log for _, log in sorted(dated, reverse=True)]


def _kind(host: str) -> str:
    return host.partition(":")[0] if host.startswith("lab:") else host
