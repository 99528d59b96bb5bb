"""The summary on the terminal: the result, and after a failure how to log in, resume and clean up."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nestedpve.report.audit_model import KnownSymptom, RunReport
from pytest_nestedpve.report.html import VERDICTS
from pytest_nestedpve.report.timeline import duration

if TYPE_CHECKING:
    from pytest_nestedpve.report.symptoms import Recognised


def summary_lines(
    report: RunReport, page: Path, *, finishing_command: str = "", rerun_command: str = "pytest"
) -> list[str]:
    """Lines for the terminal's summary. `page` is the run's HTML report, beside its ssh_config and audit log.

    `finishing_command` destroys leftovers; `rerun_command` is pytest with the same host.
    """
    executed = sum(step.status == "done" for step in report.steps)
    proved = sum(step.status == "proved" for step in report.steps)
    attached = sum(step.status == "attached" for step in report.steps)
    others = (f", {proved} found done" if proved else "") + (f", {attached} attached" if attached else "")
    lines = [
        f"run {report.run or page.parent.name}: {VERDICTS[report.verdict]}; "
        f"{executed} phase{'' if executed == 1 else 's'} done{others}, in {duration(report.seconds)}",
        f"report: {page}",
    ]
    if report.failed is not None:
        lines += ["", *failure_lines(report, page.parent, finishing_command, rerun_command)]
    else:
        lines += [*symptom_lines(report), *artifact_lines(report, page.parent)]
    return lines


def symptom_lines(report: RunReport) -> list[str]:
    """Lines on the known symptoms of a run, with explanation and fix."""
    lines = []
    for symptom in report.symptoms:
        suffix = f" (after {symptom.phase})" if symptom.phase != getattr(report.failed, "name", None) else ""
        lines += recognised_lines(f"{suffix}: {symptom.title}", symptom)
    return lines


def recognised_lines(title: str, symptom: KnownSymptom | Recognised) -> list[str]:
    """Lines on one recognised symptom."""
    return [
        f"known{title}",
        f"    seen:  {symptom.line}   in {symptom.where}",
        f"    means: {symptom.explanation}",
        f"    fix:   {symptom.fix}",
    ]


def artifact_lines(report: RunReport, run_directory: Path) -> list[str]:
    """Lines with the directories of collected files."""
    lines = []
    for collection in report.artifacts:
        if collection.files:
            count = len(collection.files)
            content = f"{count} file{'s' * (count != 1)}: logs and states after {collection.phase}"
            lines.append(f"files:    {run_directory / collection.directory} ({content})")
    return lines


def failure_lines(
    report: RunReport, run_directory: Path, finishing_command: str, rerun_command: str = "pytest"
) -> list[str]:
    """Lines with the first cause, and with the commands to log in, resume and clean up."""
    step = report.failed
    assert step is not None
    first, *rest = step.cause.splitlines() or ["no cause was recorded"]
    config = shlex.quote(str(run_directory / "ssh_config"))
    login = "the outer host's web interface"
    if (run_directory / "ssh_config").exists():
        login = f"ssh -F {config} nested"
    clean = "nothing to do, the teardown proved that there are no leftovers"
    if report.leftovers or not report.proved_empty:
        clean = finishing_command or f"pytest --nested-destroy-only --nested-run {report.run}"
    attached = "--nested-attach" in rerun_command
    keep = f"{rerun_command} --nested-keep=on-failure -k {step.name}   keeps the failed state; then {login}"
    commands = [
        *([f"log in:   {login if attached else keep}"] if not attached or "ssh -F" in login else []),
        f"resume:   {rerun_command} -k {step.name}   runs the phases before it first",
        f"clean up: {clean}",
    ]
    return [
        f"first cause, in {step.name}: {first}",
        *(f"    {line}" for line in rest[:20]),
        *([f"    … {len(rest) - 20} more lines in the report"] if len(rest) > 20 else []),
        *symptom_lines(report),
        *artifact_lines(report, run_directory),
        # For a kept environment the session itself prints these commands.
        *([] if report.was_kept else commands),
    ]
