"""The cold round trip on the lab: duration of each phase by the audit log, split by the kind of work."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.rows import Row
from pytest_nestedpve.report.audit_model import RunReport, Step, read_audit

ROOT = Path(__file__).parent.parent


def measure() -> list[Row]:
    """A row per phase, and the sum. Raises RuntimeError when the round trip is not green."""
    with tempfile.TemporaryDirectory(prefix="bench-runs-") as name:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-o", f"nested_pve_run_dir={name}"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"the round trip ended with status {done.returncode}:\n{done.stdout[-3000:]}")
        log = next(Path(name).glob("*/audit.jsonl"))
        return rows(read_audit(log))


def rows(report: RunReport) -> list[Row]:
    """The rows of a run."""
    phases = [
        Row(f"round_trip.{step.name}", "s", (round(step.seconds or 0.0, 2),), note=describe_time(step))
        for step in (*report.steps, *report.teardown_steps)
    ]
    whole = Row("round_trip", "s", (round(report.seconds, 2),), note="first line of the log to the last")
    return [*phases, whole]


def describe_time(step: Step) -> str:
    """The seconds of a phase by the kind of work: Ansible, calls and commands, the rest."""
    whole = step.seconds or 0.0
    playbooks = sum(playbook.seconds or 0.0 for playbook in step.playbooks)
    parts = {
        f"Ansible, {len(step.playbooks)} playbook(s)": playbooks,
        f"{step.calls} calls and commands": step.call_seconds,
    }
    texts = [f"{seconds:.1f} s {what}" for what, seconds in parts.items() if seconds >= 0.05]
    rest = whole - playbooks - step.call_seconds
    if rest >= 0.05:
        texts.append(f"{rest:.1f} s between them: waiting for the guest, or work on this machine")
    return ", ".join(texts) or "less than 0.05 s"
