"""Reports of a run, built from its audit log: HTML, JUnit properties, the terminal summary, progress.

The audit log is the only source of a report, so a killed run has one too:
`python -m pytest_nestedpve.report RUN_DIRECTORY` writes it at any time.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["REPORT_NAME", "write_report"]

REPORT_NAME = "report.html"


def write_report(run_directory: Path) -> Path:
    """Write `report.html` from `audit.jsonl` in `run_directory`; return its path. Mode 0600, in one step.

    Raises OSError when the log cannot be read or the page cannot be written. Lines that are no JSON (a
    process was killed while it wrote) are ignored.
    """
    from pytest_nestedpve.pve import local_file
    from pytest_nestedpve.report.audit_model import read_audit
    from pytest_nestedpve.report.html import standalone

    page = standalone(read_audit(run_directory / "audit.jsonl"))
    target = run_directory / REPORT_NAME
    local_file.write(target, page)
    return target
