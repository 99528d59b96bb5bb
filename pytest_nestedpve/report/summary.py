"""What the terminal says at the end: what happened, and after a failure how to log in, go on and clean up."""

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
    report: RunReport, page: Path, *, finishing_command: str = "", again: str = "pytest"
) -> list[str]:
    """Lines for the terminal's summary. `page` is the run's HTML report, beside its ssh_config and audit log.

    `finishing_command` finishes a teardown that left something; `again` is pytest with the same host.
    """
    executed = sum(step.status == "done" for step in report.steps)
    proved = sum(step.status == "proved" for step in report.steps)
    taken = sum(step.status == "attached" for step in report.steps)
    found = (f", {proved} found done" if proved else "") + (f", {taken} attached" if taken else "")
    lines = [
        f"run {report.run or page.parent.name}: {VERDICTS[report.verdict]}; "
        f"{executed} phase{'' if executed == 1 else 's'} done{found}, in {duration(report.seconds)}",
        f"report: {page}",
    ]
    if report.failed is not None:
        lines += ["", *failure_lines(report, page.parent, finishing_command, again)]
    else:
        lines += [*symptom_lines(report), *artifact_lines(report, page.parent)]
    return lines


def symptom_lines(report: RunReport) -> list[str]:
    """What was recognised, with explanation and fix."""
    lines = []
    for symptom in report.symptoms:
        place = f" (after {symptom.phase})" if symptom.phase != getattr(report.failed, "name", None) else ""
        lines += known_lines(f"{place}: {symptom.title}", symptom)
    return lines


def known_lines(title: str, seen: KnownSymptom | Recognised) -> list[str]:
    """One symptom that was recognised."""
    return [
        f"known{title}",
        f"    seen:  {seen.line}   in {seen.where}",
        f"    means: {seen.explanation}",
        f"    fix:   {seen.fix}",
    ]


def artifact_lines(report: RunReport, run_directory: Path) -> list[str]:
    """Where what was collected lies."""
    lines = []
    for each in report.artifacts:
        if each.files:
            count = len(each.files)
            what = f"{count} file{'s' * (count != 1)}: logs and states after {each.phase}"
            lines.append(f"files:    {run_directory / each.directory} ({what})")
    return lines


def failure_lines(
    report: RunReport, run_directory: Path, finishing_command: str, again: str = "pytest"
) -> list[str]:
    """The first cause, and what to type next."""
    step = report.failed
    assert step is not None
    first, *rest = step.cause.splitlines() or ["no reason was given"]
    config = shlex.quote(str(run_directory / "ssh_config"))
    reach = "the outer host's web interface"
    if (run_directory / "ssh_config").exists():
        reach = f"ssh -F {config} nested"
    clean = "nothing to do, the teardown proved that nothing is left"
    if report.left or not report.proved_empty:
        clean = finishing_command or f"pytest --nested-destroy-only --nested-run {report.run}"
    attached = "--nested-attach" in again
    keep = f"{again} --nested-keep=on-failure -k {step.name}   leaves it as it failed; then {reach}"
    then = [
        *([f"log in:   {reach if attached else keep}"] if not attached or "ssh -F" in reach else []),
        f"go on:    {again} -k {step.name}   does what it needs first",
        f"clean up: {clean}",
    ]
    return [
        f"first cause, in {step.name}: {first}",
        *(f"    {line}" for line in rest[:20]),
        *([f"    … {len(rest) - 20} more lines in the report"] if len(rest) > 20 else []),
        *symptom_lines(report),
        *artifact_lines(report, run_directory),
        # Of a kept environment the session itself says how to log in, go on and clean up.
        *([] if report.was_kept else then),
    ]
