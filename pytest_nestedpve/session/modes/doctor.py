"""--nested-doctor: findings of preflight, choices of a run, and commands. Creates nothing on the host."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.pve.errors import PveError, SshError
from pytest_nestedpve.session.modes import destroy_only
from pytest_nestedpve.setup.checks.finding import MISSING, OK, UNKNOWN, Finding

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.modes.doctor_view import View
    from pytest_nestedpve.session.session import NestedSession
    from pytest_nestedpve.setup.checks.choices import Choices
    from pytest_nestedpve.setup.checks.context import Context
    from pytest_nestedpve.setup.checks.run_checks import Check

USABLE, INCOMPLETE, UNREACHABLE = 0, 1, 4
_WORKERS = pytest.StashKey[int]()


def neutralise(config: pytest.Config) -> None:
    """Reset the options for tests and their reports, and silence pytest's own lines: there are no tests.

    The number of workers that a run would have is kept: the check of the memory needs it.
    """
    option = config.option
    config.stash[_WORKERS] = _count_workers(config)
    destroy_only.neutralise(config)
    for name in ("htmlpath", "xmlpath"):  # the files of an earlier session are kept
        if hasattr(option, name):
            setattr(option, name, None)
    option.verbose = -2
    option.no_header = option.no_summary = True


def _count_workers(config: pytest.Config) -> int:
    requested = getattr(config.option, "numprocesses", None)
    if isinstance(requested, str):
        requested = config.hook.pytest_xdist_auto_num_workers(config=config)
    limit = getattr(config.option, "maxprocesses", None)
    count = requested if isinstance(requested, int) and requested > 0 else 1
    return min(count, limit) if isinstance(limit, int) and limit > 0 else count


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Examine the host and print the findings; run no item. Raises pytest.UsageError without a host."""
    from pytest_nestedpve.session.exit_status import NO_HOST
    from pytest_nestedpve.session.modes.doctor_view import View

    if not nested.host_is_configured():
        raise pytest.UsageError(f"nested-pve: {NO_HOST}")
    destroy_only.unregister_selecting_plugins(session.config)
    session.items = []
    session.testscollected = 0
    with View.of(session.config) as view:
        nested.state.diagnosed(Examination(nested, view).run())


class Examination:
    """One examination of one host; each finding is printed as soon as it is known."""

    def __init__(self, nested: NestedSession, view: View) -> None:
        self.nested = nested
        self.view = view
        self.settings: Settings = nested.settings
        self.findings: list[Finding] = []
        self.choices: Choices | None = None
        self.host: PveHost | None = None
        self.reached = False

    def run(self) -> int:
        """Run all checks, print findings, choices and commands. Returns the exit status."""
        self.view.title(self.settings.host or "the host of this project's hook", self.settings.origin("host"))
        self._run_checks()
        for note in self.nested.state.take_remarks():
            self.view.note(note)
        if self.choices is not None and self.reached:
            self.view.choices(self.choices, self.settings)
        self.view.to_do([(finding, self._commands(finding)) for finding in self.findings])
        status = USABLE
        if any(finding.level == MISSING for finding in self.findings):
            status = INCOMPLETE if self.reached else UNREACHABLE
        self.view.verdict(self.findings, self._repeat_command(), reached=self.reached)
        self._write_json()
        return status

    def _add(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.view.finding(finding)

    def _run_checks(self) -> None:
        from pytest_nestedpve.setup.checks.context import Context
        from pytest_nestedpve.setup.checks.run_checks import CHECKS, DOCTOR_CHECKS, run_checks, unreachable
        from pytest_nestedpve.setup.checks.this_machine import programs

        for finding in programs(self.settings):
            self._add(finding)
        if self._is_stopped_lab():
            return
        try:
            self.view.begin("SSH")
            self.host = self.nested.connect()
        except SshError as e:
            self._add(unreachable(self.settings.host or "the outer host", e))
        except PveError as e:
            self._add(Finding("SSH", "a login as root", str(e)))
        if self.host is None:
            for check in (*CHECKS[1:], *DOCTOR_CHECKS):
                self.findings.append(Finding(check.name, "", "not checked: no login", level=UNKNOWN))
            return
        self.reached = True
        context = Context(
            reading_only(self.host),
            self.settings,
            workers=1 if self.settings.scope == "run" else self.nested.config.stash.get(_WORKERS, 1),
            by_https=hasattr(self.host.api, "shared"),
        )
        checks = _with_prefetch((*CHECKS, *DOCTOR_CHECKS))
        result = run_checks(context, begin=self.view.begin, report=self._add, checks=checks)
        self.settings, self.choices = context.settings, context.choices
        self.reached = result.connection_error is None

    def _is_stopped_lab(self) -> bool:
        """Whether the host is a lab that does not run; adds the findings on it. Never starts one."""
        from pytest_nestedpve.config import hosts

        name = self.settings.host or ""
        if name.partition(":")[0] != "lab" or hosts.lab_runs(name):
            return False
        lab = name.partition(":")[2] or "default"
        reason = hosts.lab_hindrance()
        if reason is None:
            self._add(Finding("lab", "", f"{lab} can be started here; a run starts it", level=OK))
            text = f"not checked: the lab does not run; start it: nestedpve-lab start {shlex.quote(lab)}"
            self._add(Finding("other checks", "", text, level=UNKNOWN))
            self.reached = True
        else:
            install = ("nestedpve-lab install",)
            self._add(Finding("lab", "a machine that a lab can run on", reason, fix=install, local_fix=True))
            self.reached = True
        return True

    # -- output ----------------------------------------------------------------------------------

    def _commands(self, finding: Finding) -> list[str]:
        """The finding's commands, as typed on this machine."""
        return [line if finding.local_fix else self._over_ssh(line) for line in finding.fix]

    def _over_ssh(self, line: str) -> str:
        target: Any = getattr(self.host.ssh, "target", None) if self.host is not None else None
        name = getattr(target, "alias", "") or self.settings.host
        if not name:
            return line
        config = self.host.ssh_config if self.host is not None else None
        return shlex.join(["ssh", *(["-F", str(config)] if config else []), name, line])

    def _repeat_command(self) -> str:
        return shlex.join(["pytest", *map(str, self.nested.config.invocation_params.args)])

    def _write_json(self) -> None:
        path = self.settings.json_file
        if path is None:
            return
        rows: list[dict[str, Any]] = [
            {
                "row": "check",
                "what": finding.what,
                "level": finding.level,
                "found": finding.actual,
                "expected": finding.expected,
                "advice": finding.advice,
                "commands": self._commands(finding),
            }
            for finding in self.findings
        ]
        if self.choices is not None:
            for what, value, why in self.view.rows(self.choices, self.settings):
                rows.append({"row": "choice", "what": what, "value": value, "why": why})
        text = json.dumps(self.view.masker.mask_data(rows), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _with_prefetch(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks; after the check "node", most of their API calls are sent at once."""
    from pytest_nestedpve.setup.checks.run_checks import Check

    def prefetch(context: Context) -> tuple[Finding, ...]:
        prepare = getattr(context.host.api, "prepare", None)
        if prepare is not None:
            prepare(context.host.node)
        return ()

    for check in checks:
        yield check
        if check.name == "node":
            yield Check("answers of the API", prefetch, (*check.needs, "node"))


def reading_only(host: PveHost) -> PveHost:
    """The host, read with root's pvesh alone: HTTPS would need a token, which is created on the host."""
    from pytest_nestedpve.setup.checks.context import ReadOnlyApi

    shared = getattr(host.api, "shared", None)
    return host.with_api(ReadOnlyApi(host.api if shared is None else shared.pvesh))
