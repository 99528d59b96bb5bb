"""--nested-destroy-only: a test item per candidate VM, so that terminal, HTML and JUnit show its end."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.pve.errors import ApiError, NoPve, PveError

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.session import NestedSession
    from pytest_nestedpve.teardown.destroy import Outcome
    from pytest_nestedpve.teardown.plan_row import Row

NODE = "nested-pve"
# What chooses among tests, or remembers their outcomes, has nothing to do with these items.
_PLUGINS = ("lfplugin", "nfplugin", "stepwiseplugin")
_TESTS_ONLY: tuple[tuple[str, Any], ...] = (
    ("numprocesses", None),
    ("dist", "no"),
    ("distload", False),
    ("tx", []),
    ("looponfail", False),
    ("maxfail", 0),
    ("reruns", None),
)


def neutralise(config: pytest.Config) -> None:
    """Take back what a project's addopts say about tests: workers, --maxfail, reruns."""
    for name, value in _TESTS_ONLY:
        if hasattr(config.option, name):
            setattr(config.option, name, value)


def set_aside(config: pytest.Config) -> None:
    """Have no plugin choose among the items, or remember them in place of tests."""
    for name in _PLUGINS:
        plugin = config.pluginmanager.get_plugin(name)
        if plugin is not None:
            config.pluginmanager.unregister(plugin)


class Job:
    """The plan and its execution: all of it at the first item that is to go, then told one by one."""

    def __init__(
        self, nested: NestedSession, host: PveHost | None, settings: Settings, rows: list[Row]
    ) -> None:
        self.nested = nested
        self.settings = settings
        self.rows = rows
        self._host = host
        self._outcomes: dict[Row, Outcome] | None = None

    def outcome(self, row: Row) -> tuple[str, str]:
        """("gone" | "foreign" | "left", reason) of a row that is to be destroyed."""
        if self._outcomes is None:
            with self.nested.state.unlimited():
                self._execute()
        found = (self._outcomes or {}).get(row)
        return (found.result, found.reason) if found is not None else ("left", "it was not reached")

    def _execute(self) -> None:
        from pytest_nestedpve.environment.phases import Phase, PhaseEnded
        from pytest_nestedpve.report.progress import ProgressListener
        from pytest_nestedpve.teardown.plan import execute
        from pytest_nestedpve.teardown.teardown import destroying

        # As they come: an interrupted session still writes what became of those that were reached.
        outcomes: dict[Row, Outcome] = {}
        self._outcomes = outcomes
        total = sum(row.verdict == "destroy" and row.vmid is not None for row in self.rows)
        shown, phase = ProgressListener(self.nested.config), Phase("destroy", "clean-up", lambda _env: None)

        def told(row: Row, outcome: Outcome) -> None:
            outcomes[row] = outcome
            shown.progress(destroying(total, sum(each.result == "gone" for each in outcomes.copy().values())))

        assert self._host is not None
        shown.phase_started(phase)
        shown.progress(destroying(total))
        try:
            execute(self._host, self.settings, self.rows, told)
        finally:
            shown.phase_finished(PhaseEnded(phase, "done", 0.0))
            shown.close()

    def known(self) -> list[str]:
        """Known symptoms of runs' VMs that are not touched, of which no item's failure tells."""
        stays = [row for row in self.rows if row.run is not None and row.verdict == "keep"]
        return [line for row in stays for line in known(row, row.reason)]

    def write(self) -> None:
        """The rows with their outcomes, for --nested-json."""
        path = self.settings.json_file
        if path is None:
            return
        done = self._outcomes or {}
        out = []
        for row in self.rows:
            found = done.get(row)
            if found is not None:
                outcome = found.result
            else:
                outcome = "kept" if row.verdict == "keep" else "planned" if self.settings.dry_run else "left"
            out.append(row.public(outcome))
        path.write_text(json.dumps(out, indent=1) + "\n", encoding="utf-8")


def known(row: Row, reason: str) -> list[str]:
    """What is recognised in the reason why it stays, as the end of a session shows it. Never fails."""
    from pytest_nestedpve.report.summary import known_lines
    from pytest_nestedpve.report.symptoms import Text, recognise

    with contextlib.suppress(Exception):
        what = row.name if row.vmid is None else f"VM {row.vmid}"
        words = f"{what} on {row.node}: {reason}"
        found = recognise([Text("error", "why it stays", words)], "destroy")
        return [line for each in found for line in known_lines(f": {each.symptom.title}", each)]
    return []


class NotGone(Exception):
    """A VM that should be gone is still there."""


class DestroyItem(pytest.Item):
    """One row: PASSED when it is gone, SKIPPED when it stays, FAILED when it should have gone."""

    row: Row
    job: Job

    def runtest(self) -> None:
        if self.row.verdict == "keep":
            self._stay(self.row.reason)
        result, reason = self.job.outcome(self.row)
        if result == "foreign":
            self._stay(reason)
        if result != "gone":
            raise NotGone(reason)

    def _stay(self, reason: str) -> None:
        raise pytest.skip.Exception(reason, _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, NotGone):
            lines = (f"{self.name} is still there: {excinfo.value}", *known(self.row, str(excinfo.value)))
            return "\n".join(lines)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        # Where a summary names a file, name the VM.
        return self.config.rootpath / self.name, 0, self.name


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Make the plan and its items. Raises pytest.UsageError when the host cannot be used."""
    config = session.config
    set_aside(config)
    where = nested.settings.host or "the outer host"
    try:
        job = _plan(nested)
    except NoPve as e:
        raise pytest.UsageError(
            f"nested-pve: expected a Proxmox VE host at {where}, found no pvesh there "
            f"({e.text.splitlines()[0][:120]}); name a Proxmox VE host (--pve-host, or nested_pve_host)"
        ) from e
    except ApiError as e:
        raise pytest.UsageError(
            f"nested-pve: expected the API of {where} to answer root, found: {e}; mend that on the host first"
        ) from e
    except PveError as e:
        raise pytest.UsageError(f"nested-pve: {e}") from e
    nested.state.destroy_planned(job)
    if nested.settings.dry_run:
        _show(config, job.rows)
        session.items = []
    else:
        job.rows = _confirmed(config, nested.settings, job.rows)
        session.items = [_item(session, job, row) for row in job.rows]
        nested.state.tally.record_leftovers(
            any(row.owed for row in job.rows), "something stays that should be gone, or was not confirmed"
        )
        _say(config, f"nested-pve: {len(job.rows) or 'no'} candidate{'s' * (len(job.rows) != 1)}")
    session.testscollected = len(session.items)


def _plan(nested: NestedSession) -> Job:
    from pytest_nestedpve.config import legacy_context
    from pytest_nestedpve.config.hosts import host_profile
    from pytest_nestedpve.config.settings import SettingsError
    from pytest_nestedpve.teardown import plan

    settings = nested.settings
    extra = (
        legacy_context.vmids(legacy_context.load(settings.context_file))
        if settings.context_file
        else frozenset()
    )
    if settings.host is not None and settings.host.split(":")[0] == "lab" and not _lab_runs(settings.host):
        return Job(nested, None, settings, [])
    host = nested.connect()
    try:
        settings = settings.with_profile(host_profile(host), where=f"/etc/nested-pve.ini on {host.name}")
    except SettingsError as e:
        raise PveError(str(e)) from e
    return Job(nested, host, settings, plan.plan(host, settings, extra=extra))


def _lab_runs(name: str) -> bool:
    """Whether there is such a lab; this never starts one."""
    from pytest_nestedpve.config import hosts

    return hosts.lab_runs(name)


def _item(session: pytest.Session, job: Job, row: Row) -> DestroyItem:
    # Names come from the host; an id is shown by reports that do not escape it.
    name = re.sub(r"[^A-Za-z0-9._ -]", "_", row.name)
    label = name if row.vmid is None else f"{row.vmid} {name}"
    item: DestroyItem = DestroyItem.from_parent(session, name=label, nodeid=f"{NODE}::{label}")
    item.row, item.job = row, job
    for key in ("run", "owner", "verdict"):
        if getattr(row, key) is not None:
            item.user_properties.append((f"nested_pve_{key}", str(getattr(row, key))))
    return item


def _confirmed(config: pytest.Config, settings: Settings, rows: Sequence[Row]) -> list[Row]:
    """The rows, those without a marker confirmed by --nested-yes or at the terminal, or else kept."""
    asked = [row for row in rows if row.ask and row.verdict == "destroy"]
    if not asked or settings.yes:
        return list(rows)
    if not _ask(config, asked):
        return [
            row.kept(f"{row.reason}; not confirmed (--nested-yes)") if row in asked else row for row in rows
        ]
    return list(rows)


def _ask(config: pytest.Config, rows: Sequence[Row]) -> bool:
    manager = config.pluginmanager.getplugin("capturemanager")
    if manager is not None:
        manager.suspend_global_capture(in_=True)
    try:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return False
        print("\nThese VMs carry no marker of this tool, but look like its own:")
        for row in rows:
            print(f"  {row.vmid} {row.name} on {row.node}")
        return input("Destroy them? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, OSError, ValueError):
        return False
    finally:
        if manager is not None:
            manager.resume_global_capture()


def _say(config: pytest.Config, text: str) -> None:
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)


def _show(config: pytest.Config, rows: Sequence[Row]) -> None:
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return
    reporter.write_sep("-", "nested-pve: dry run, nothing is touched")
    for row in rows:
        what = "ask, then destroy" if row.ask and row.verdict == "destroy" else row.verdict
        reporter.write_line(f"  {row.vmid or '-':>9} {row.name:<40} {what:<18} {row.reason}")
    if not rows:
        reporter.write_line("nothing of this tool is there: nothing to do")
