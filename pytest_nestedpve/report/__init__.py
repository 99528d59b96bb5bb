"""Reports of a run, built from its audit log: HTML, JUnit properties, the terminal summary, progress.

Decides nothing about a run. The audit log is the only source, so a killed run has a report too:
`python -m pytest_nestedpve.report RUN_DIRECTORY` writes it at any time.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["REPORT_NAME", "write_report"]

REPORT_NAME = "report.html"


def write_report(run_directory: Path) -> Path:
    """Write `report.html` from `audit.jsonl` in `run_directory`; return its path. Mode 0600, in one step.

    Raises OSError when the log cannot be read or the page cannot be written. Lines that are no JSON (a
    process was killed while it wrote) are passed over.
    """
    import os

    from pytest_nestedpve.report.audit_model import read_audit
    from pytest_nestedpve.report.html import standalone

    page = standalone(read_audit(run_directory / "audit.jsonl"))
    target = run_directory / REPORT_NAME
    draft = target.with_name(f".{REPORT_NAME}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as out:
        out.write(page)
    draft.replace(target)
    return target
