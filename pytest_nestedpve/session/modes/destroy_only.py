"""--nested-destroy-only: one test item per candidate VM, so terminal, HTML and JUnit show its outcome."""

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
# Plugins that select tests or record their outcomes: they do not apply to these items.
_SELECTING_PLUGINS = ("lfplugin", "nfplugin", "stepwiseplugin")
_TEST_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("numprocesses", None),
    ("dist", "no"),
    ("distload", False),
    ("tx", []),
    ("looponfail", False),
    ("maxfail", 0),
    ("reruns", None),
)


def neutralise(config: pytest.Config) -> None:
    """Reset the options for tests that a project's addopts may set: workers, --maxfail, reruns."""
    for name, value in _TEST_OPTIONS:
        if hasattr(config.option, name):
            setattr(config.option, name, value)


def unregister_selecting_plugins(config: pytest.Config) -> None:
    """Unregister the plugins that would deselect these items, or record them in place of tests."""
    for name in _SELECTING_PLUGINS:
        plugin = config.pluginmanager.get_plugin(name)
        if plugin is not None:
            config.pluginmanager.unregister(plugin)


class Job:
    """The plan and its outcomes: the first item to destroy executes all of it, each item reports its own."""

    def __init__(
        self, nested: NestedSession, host: PveHost | None, settings: Settings, rows: list[Row]
    ) -> None:
        self.nested = nested
        self.settings = settings
        self.rows = rows
        self._host = host
        self._outcomes: dict[Row, Outcome] | None = None

    def outcome(self, row: Row) -> tuple[str, str]:
        """("gone" | "foreign" | "left", reason) of a row with the verdict "destroy"."""
        if self._outcomes is None:
            with self.nested.state.unlimited():
                self._execute()
        outcome = (self._outcomes or {}).get(row)
        return (outcome.result, outcome.reason) if outcome is not None else ("left", "it was not reached")

    def _execute(self) -> None:
        from pytest_nestedpve.environment.phases import Phase, PhaseEnded
        from pytest_nestedpve.report.progress import ProgressListener
        from pytest_nestedpve.teardown.plan import execute
        from pytest_nestedpve.teardown.teardown import destroying

        # Filled during the execution: an interrupted session still writes the outcomes known so far.
        outcomes: dict[Row, Outcome] = {}
        self._outcomes = outcomes
        total = sum(row.verdict == "destroy" and row.vmid is not None for row in self.rows)
        progress = ProgressListener(self.nested.config)
        phase = Phase("destroy", "clean-up", lambda _env: None)

        def record(row: Row, outcome: Outcome) -> None:
            outcomes[row] = outcome
            gone = sum(outcome.result == "gone" for outcome in outcomes.copy().values())
            progress.progress(destroying(total, gone))

        assert self._host is not None
        progress.phase_started(phase)
        progress.progress(destroying(total))
        try:
            execute(self._host, self.settings, self.rows, record)
        finally:
            progress.phase_finished(PhaseEnded(phase, "done", 0.0))
            progress.close()

    def known_symptoms(self) -> list[str]:
        """Lines on known symptoms of the runs' VMs that are kept: no failed item shows those."""
        kept = [row for row in self.rows if row.run is not None and row.verdict == "keep"]
        return [line for row in kept for line in known_symptoms(row, row.reason)]

    def write(self) -> None:
        """Write the rows with their outcomes to --nested-json."""
        path = self.settings.json_file
        if path is None:
            return
        outcomes = self._outcomes or {}
        entries = []
        for row in self.rows:
            outcome = outcomes.get(row)
            if outcome is not None:
                result = outcome.result
            else:
                result = "kept" if row.verdict == "keep" else "planned" if self.settings.dry_run else "left"
            entries.append(row.public(result))
        path.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def known_symptoms(row: Row, reason: str) -> list[str]:
    """Lines on the known symptoms in the reason why a VM still exists. Never fails."""
    from pytest_nestedpve.report.summary import recognised_lines
    from pytest_nestedpve.report.symptoms import Text, recognise

    with contextlib.suppress(Exception):
        what = row.name if row.vmid is None else f"VM {row.vmid}"
        text = Text("error", "the reason why it still exists", f"{what} on {row.node}: {reason}")
        matches = recognise([text], "destroy")
        return [line for match in matches for line in recognised_lines(f": {match.symptom.title}", match)]
    return []


class StillExists(Exception):
    """A VM that should have been destroyed still exists."""


class DestroyItem(pytest.Item):
    """One row: PASSED if destroyed, SKIPPED if kept, FAILED if it still exists and should not."""

    row: Row
    job: Job

    def runtest(self) -> None:
        if self.row.verdict == "keep":
            self._skip(self.row.reason)
        result, reason = self.job.outcome(self.row)
        if result == "foreign":
            self._skip(reason)
        if result != "gone":
            raise StillExists(reason)

    def _skip(self, reason: str) -> None:
        raise pytest.skip.Exception(reason, _use_item_location=True)

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, StillExists):
            lines = [f"{self.name} still exists: {excinfo.value}"]
            return "\n".join(lines + known_symptoms(self.row, str(excinfo.value)))
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        # pytest's summary names the VM where it would name a test file.
        return self.config.rootpath / self.name, 0, self.name


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Compute the plan and create its items. Raises pytest.UsageError if the host cannot be used."""
    config = session.config
    unregister_selecting_plugins(config)
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
            f"nested-pve: expected the API of {where} to answer root, found: {e}; fix that on the host first"
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
            any(row.is_leftover for row in job.rows),
            "a leftover still exists, or its destruction was not confirmed",
        )
        _write_line(config, f"nested-pve: {len(job.rows) or 'no'} candidate{'s' * (len(job.rows) != 1)}")
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
    if settings.host is not None and settings.host.split(":")[0] == "lab" and not _is_lab_up(settings.host):
        return Job(nested, None, settings, [])
    host = nested.connect()
    try:
        settings = settings.with_profile(host_profile(host), where=f"/etc/nested-pve.ini on {host.name}")
    except SettingsError as e:
        raise PveError(str(e)) from e
    return Job(nested, host, settings, plan.plan(host, settings, extra=extra))


def _is_lab_up(name: str) -> bool:
    """Whether the lab of that name runs; never starts one."""
    from pytest_nestedpve.config import hosts

    return hosts.lab_runs(name)


def _item(session: pytest.Session, job: Job, row: Row) -> DestroyItem:
    # Names come from the host, and some reports show a node id without escaping it.
    name = re.sub(r"[^A-Za-z0-9._ -]", "_", row.name)
    label = name if row.vmid is None else f"{row.vmid} {name}"
    item: DestroyItem = DestroyItem.from_parent(session, name=label, nodeid=f"{NODE}::{label}")
    item.row, item.job = row, job
    for key in ("run", "owner", "verdict"):
        if getattr(row, key) is not None:
            item.user_properties.append((f"nested_pve_{key}", str(getattr(row, key))))
    return item


def _confirmed(config: pytest.Config, settings: Settings, rows: Sequence[Row]) -> list[Row]:
    """The rows; a row without a marker is kept unless --nested-yes or a yes at the terminal confirms it."""
    unmarked = [row for row in rows if row.needs_confirmation and row.verdict == "destroy"]
    if not unmarked or settings.yes:
        return list(rows)
    if not _confirm(config, unmarked):
        return [
            row.kept(f"{row.reason}; not confirmed (--nested-yes)") if row in unmarked else row
            for row in rows
        ]
    return list(rows)


def _confirm(config: pytest.Config, rows: Sequence[Row]) -> bool:
    manager = config.pluginmanager.getplugin("capturemanager")
    if manager is not None:
        manager.suspend_global_capture(in_=True)
    try:
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return False
        print("\nThese VMs have no marker of nested-pve, but match by name and id or by the context file:")
        for row in rows:
            print(f"  {row.vmid} {row.name} on {row.node}")
        return input("Destroy them? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, OSError, ValueError):
        return False
    finally:
        if manager is not None:
            manager.resume_global_capture()


def _write_line(config: pytest.Config, text: str) -> None:
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is not None:
        reporter.write_line(text)


def _show(config: pytest.Config, rows: Sequence[Row]) -> None:
    reporter: Any = config.pluginmanager.getplugin("terminalreporter")
    if reporter is None:
        return
    reporter.write_sep("-", "nested-pve: dry run, nothing is destroyed")
    for row in rows:
        action = "ask, then destroy" if row.needs_confirmation and row.verdict == "destroy" else row.verdict
        reporter.write_line(f"  {row.vmid or '-':>9} {row.name:<40} {action:<18} {row.reason}")
    if not rows:
        reporter.write_line("no leftovers of nested-pve on this host: nothing to do")
