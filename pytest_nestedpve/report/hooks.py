"""The report of a pytest session: pytest-html's page, JUnit properties, the terminal's summary.

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
    """Keeps a run's page current: it is written after each phase, so a killed session leaves one, too."""

    def __init__(self, run_directory: Path) -> None:
        self._directory = run_directory

    def phase_finished(self, ended: PhaseEnded) -> None:
        """Write the page. A full disk must not fail the phase."""
        del ended
        with contextlib.suppress(OSError):
            write_report(self._directory)


class SessionReport:
    """pytest hooks. `run_directory()` is the run of this process, None before there is one.

    `mask` hides its secrets; `finishing_command()` finishes a teardown that left something.
    """

    def __init__(
        self,
        config: pytest.Config,
        run_directory: Callable[[], Path | None],
        *,
        mask: Callable[[str], str] = str,
        finishing_command: Callable[[], str] = str,
        again: Callable[[], str] = lambda: "pytest",
    ) -> None:
        self._config = config
        self._own = run_directory
        self._mask = mask
        self._finishing_command = finishing_command
        self._again = again
        self._seen: dict[Path, None] = {}

    def directories(self) -> list[Path]:
        """The directories of all runs of the session, in the order in which they were seen."""
        own = self._own()
        found = dict(self._seen)
        if own is not None:
            found.setdefault(own, None)
        return list(found)

    def reports(self) -> list[tuple[Path, RunReport]]:
        """The runs with what their logs say; a log that cannot be read is passed over."""
        from pytest_nestedpve.report.audit_model import read_audit

        found = []
        for directory in self.directories():
            with contextlib.suppress(OSError):
                found.append((directory, read_audit(directory / "audit.jsonl")))
        return found

    # -- tests --------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        directory = self._own()
        if directory is not None:
            setattr(report, RUN_DIRECTORY, str(directory))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        directory = getattr(report, RUN_DIRECTORY, None)
        if isinstance(directory, str):
            self._seen.setdefault(Path(directory), None)

    # -- JUnit and the terminal -----------------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """What `record_testsuite_property` would say, also for the runs of xdist's workers."""
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

        found = self.reports()
        if not found:
            return
        terminalreporter.write_sep("=", "nested PVE")
        for directory, report in found:
            page = directory / "report.html"
            try:
                page = write_report(directory)
            except OSError as error:
                terminalreporter.write_line(f"the report could not be written: {error}")
            for line in summary_lines(
                report, page, finishing_command=self._finishing_command(), again=self._again()
            ):
                terminalreporter.write_line(self._mask(line))

    # -- pytest-html ----------------------------------------------------------------------------

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_summary(self, prefix: list[str]) -> None:
        from pytest_nestedpve.report.html import section

        found = self.reports()
        if found:
            links = [self._link(directory / "report.html") for directory, _ in found]
            prefix.append(self._mask(section([report for _, report in found], links)))

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_header(self, cells: list[str]) -> None:
        cells.insert(-1, "<th>Phase</th>")

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_row(self, report: pytest.TestReport, cells: list[str]) -> None:
        # pytest-html 4 puts the test's id into its page as it is.
        raw, safe = report.nodeid, escape(report.nodeid)
        if raw != safe:
            cells[:] = [cell.replace(raw, safe) if 'class="col-testId"' in cell else cell for cell in cells]
        if cells:
            cells.insert(-1, f'<td class="col-phase">{escape(phase_text(report))}</td>')

    @pytest.hookimpl(optionalhook=True)
    def pytest_html_results_table_html(self, data: list[str]) -> None:
        data[:] = [self._mask(each) if isinstance(each, str) else each for each in data]

    def _link(self, page: Path) -> str:
        """Where `page` is, seen from pytest-html's report."""
        import os

        target = getattr(self._config.option, "htmlpath", None)
        if not target:
            return str(page)
        base = Path(os.path.expandvars(target)).expanduser().absolute().parent
        return os.path.relpath(page, base)


def phase_text(report: pytest.TestReport) -> str:
    """What the column says: `12 s`, `0.3 s, found done`, `done by tests/…`; empty without phases."""
    properties = {str(name): value for name, value in getattr(report, "user_properties", ())}
    if PROPERTY_PHASE not in properties and PROPERTY_SECONDS not in properties:
        return ""
    from pytest_nestedpve.report.timeline import duration

    words = []
    with contextlib.suppress(TypeError, ValueError):
        if PROPERTY_SECONDS in properties:
            words.append(duration(float(properties[PROPERTY_SECONDS])))
    if properties.get(PROPERTY_STATUS) == "proved":
        words.append("found done")
    if properties.get(PROPERTY_STATUS) == "attached":
        words.append("attached")
    by = properties.get(PROPERTY_DONE_BY)
    if by and by != report.nodeid:
        words.append(f"done by {by}")
    return ", ".join(word for word in words if word)
