"""pytest hooks that report: pytest-html's page, JUnit properties, the terminal's summary.

One object per process. Under xdist the workers run the phases and mark their test reports with the run's
directory; the controller writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_nestedpve.environment.phases import Listener
from pytest_nestedpve.report import write_report
from pytest_nestedpve.report.properties import (
    PROPERTY_DONE_BY,
    PROPERTY_PHASE,
    PROPERTY_SECONDS,
    PROPERTY_STATUS,
)

if TYPE_CHECKING:
    from _pytest.terminal import TerminalReporter

    from pytest_nestedpve.environment.phases import PhaseEnded
    from pytest_nestedpve.report.audit_model import RunReport

#: Attribute of a test report: the directory of the test's run. It crosses from worker to controller.
RUN_DIRECTORY = "nestedpve_run_directory"


class ReportListener(Listener):
    """Writes a run's page after each phase, so the page of a killed session exists, too."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Write the page. A full disk must not fail the phase."""
        del ended
        with contextlib.suppress(OSError):
            write_report(self._directory)


class SessionReport:
    """pytest hooks. `run_directory()` is the directory of this process's run, None before the run is created.

    `mask` hides secrets; `finishing_command()` destroys leftovers; `rerun_command()` is pytest with the host.
    """

    def __init__(
        self,
        config: pytest.Config,
        run_directory: Callable[[], Path | None],
        *,
        mask: Callable[[str], str] = str,
        finishing_command: Callable[[], str] = str,
        rerun_command: Callable[[], str] = lambda: "pytest",
    ) -> None:
        self._config = config
        self._run_directory = run_directory
        self._mask = mask
        self._finishing_command = finishing_command
        self._rerun_command = rerun_command
        self._directories: dict[Path, None] = {}

    def directories(self) -> list[Path]:
        """The directories of all runs of the session, in the order in which they were seen."""
        current = self._run_directory()
        directories = dict(self._directories)
        if current is not None:
            directories.setdefault(current, None)
        return list(directories)

    def reports(self) -> list[tuple[Path, RunReport]]:
        """(directory, report) of each run; one whose log cannot be read is omitted."""
        from pytest_nestedpve.report.audit_model import read_audit

        reports = []
        for directory in self.directories():
            with contextlib.suppress(OSError):
                reports.append((directory, read_audit(directory / "audit.jsonl")))
        return reports

    # -- tests --------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        directory = self._run_directory()
        if directory is not None:
            setattr(report, RUN_DIRECTORY, str(directory))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        directory = getattr(report, RUN_DIRECTORY, None)
        if isinstance(directory, str):
            self._directories.setdefault(Path(directory), None)

    # -- JUnit and the terminal -----------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Record the runs' properties as `record_testsuite_property` does, for xdist's workers too."""
        from _pytest.junitxml import xml_key

        xml = self._config.stash.get(xml_key, None)
        if xml is None:
            return
        for _, report in self.reports():
            for name, value in (
                ("nested_pve_run", report.run),
                ("nested_pve_host", report.host),
                ("nested_pve_version", report.pve_version),
            ):
                if value:
                    xml.add_global_property(name, value)

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        from pytest_nestedpve.report.summary import summary_lines

        reports = self.reports()
        if not reports:
            return
        terminalreporter.write_sep("=", "nested PVE")
        for directory, report in reports:
            page = directory / "report.html"
            try:
                page = write_report(directory)
            except OSError as error:
                terminalreporter.write_line(f"the report could not be written: {error}")
            for line in summary_lines(
                report, page, finishing_command=self._finishing_command(), rerun_command=self._rerun_command()
            ):
                terminalreporter.write_line(self._mask(line))

    # -- pytest-html ----------------------------------------------------------------------------

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        from pytest_nestedpve.report.html import section

        reports = self.reports()
        if reports:
            links = [self._link(directory / "report.html") for directory, _ in reports]
            prefix.append(self._mask(section([report for _, report in reports], links)))

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_header(self, cells: list[str]) -> None:
        cells.insert(-1, "<th>Phase</th>")

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_row(self, report: pytest.TestReport, cells: list[str]) -> None:
        # pytest-html 4 does not escape the test's id.
        raw, safe = report.nodeid, escape(report.nodeid)
        if raw != safe:
            cells[:] = [cell.replace(raw, safe) if 'class="col-testId"' in cell else cell for cell in cells]
        if cells:
            cells.insert(-1, f'<td class="col-phase">{escape(format_phase(report))}</td>')

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_html(self, data: list[str]) -> None:
        data[:] = [self._mask(line) if isinstance(line, str) else line for line in data]

    def _link(self, page: Path) -> str:
        """The path of `page`, relative to pytest-html's report."""
        import os

        target = getattr(self._config.option, "htmlpath", None)
        if not target:
            return str(page)
        base = Path(os.path.expandvars(target)).expanduser().absolute().parent
        return os.path.relpath(page, base)


def format_phase(report: pytest.TestReport) -> str:
    """The text of the column: `12 s`, `0.3 s, found done`, `done by tests/…`; empty without phases."""
    properties = {str(name): value for name, value in getattr(report, "user_properties", ())}
    if PROPERTY_PHASE not in properties and PROPERTY_SECONDS not in properties:
        return ""
    from pytest_nestedpve.report.timeline import duration

    parts = []
    with contextlib.suppress(TypeError, ValueError):
        if PROPERTY_SECONDS in properties:
            parts.append(duration(float(properties[PROPERTY_SECONDS])))
    if properties.get(PROPERTY_STATUS) == "proved":
        parts.append("found done")
    if properties.get(PROPERTY_STATUS) == "attached":
        parts.append("attached")
    done_by = properties.get(PROPERTY_DONE_BY)
    if done_by and done_by != report.nodeid:
        parts.append(f"done by {done_by}")
    return ", ".join(part for part in parts if part)
