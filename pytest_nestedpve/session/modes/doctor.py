"""--nested-doctor: what preflight finds, what a run would use, and what to do. Makes nothing on the host."""

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

FINE, LACKING, UNREACHABLE = 0, 1, 4
_WORKERS = pytest.StashKey[int]()


def neutralise(config: pytest.Config) -> None:
    """Take back what is said about tests and their reports, and pytest's own lines: there are no tests.

    How many workers there would be is kept, for the memory that they take.
    """
    option = config.option
    config.stash[_WORKERS] = _workers(config)
    destroy_only.neutralise(config)
    for name in ("htmlpath", "xmlpath"):  # what a run before wrote stays
        if hasattr(option, name):
            setattr(option, name, None)
    option.verbose = -2
    option.no_header = option.no_summary = True


def _workers(config: pytest.Config) -> int:
    asked = getattr(config.option, "numprocesses", None)
    if isinstance(asked, str):
        asked = config.hook.pytest_xdist_auto_num_workers(config=config)
    most = getattr(config.option, "maxprocesses", None)
    count = asked if isinstance(asked, int) and asked > 0 else 1
    return min(count, most) if isinstance(most, int) and most > 0 else count


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Look, tell, and leave no item to run. Raises pytest.UsageError when no host is named."""
    from pytest_nestedpve.session.exit_status import NO_HOST
    from pytest_nestedpve.session.modes.doctor_view import View

    if not nested.host_is_configured():
        raise pytest.UsageError(f"nested-pve: {NO_HOST}")
    destroy_only.set_aside(session.config)
    session.items = []
    session.testscollected = 0
    with View.of(session.config) as view:
        nested.state.diagnosed(Examination(nested, view).status())


class Examination:
    """One look at one host, told as it goes."""

    def __init__(self, nested: NestedSession, view: View) -> None:
        self.nested = nested
        self.view = view
        self.settings: Settings = nested.settings
        self.findings: list[Finding] = []
        self.choices: Choices | None = None
        self.host: PveHost | None = None
        self.reached = False

    def status(self) -> int:
        """Look at everything; the exit status."""
        self.view.title(self.settings.host or "the host of this project's hook", self.settings.origin("host"))
        self._look()
        for note in self.nested.state.take_remarks():
            self.view.note(note)
        if self.choices is not None and self.reached:
            self.view.choices(self.choices, self.settings)
        self.view.to_do([(each, self._commands(each)) for each in self.findings])
        status = FINE
        if any(each.level == MISSING for each in self.findings):
            status = LACKING if self.reached else UNREACHABLE
        self.view.verdict(self.findings, self._again(), reached=self.reached)
        self._write()
        return status

    def _told(self, finding: Finding) -> None:
        self.findings.append(finding)
        self.view.finding(finding)

    def _look(self) -> None:
        from pytest_nestedpve.setup.checks.context import Context
        from pytest_nestedpve.setup.checks.run_checks import CHECKS, DOCTOR_CHECKS, run_checks, unreachable
        from pytest_nestedpve.setup.checks.this_machine import programs

        for finding in programs(self.settings):
            self._told(finding)
        if self._is_sleeping_lab():
            return
        try:
            self.view.begin("SSH")
            self.host = self.nested.connect()
        except SshError as e:
            self._told(unreachable(self.settings.host or "the outer host", e))
        except PveError as e:
            self._told(Finding("SSH", "a login as root", str(e)))
        if self.host is None:
            for check in (*CHECKS[1:], *DOCTOR_CHECKS):
                self.findings.append(Finding(check.name, "", "not looked at: no login", level=UNKNOWN))
            return
        self.reached = True
        seen = Context(
            only_reading(self.host),
            self.settings,
            workers=1 if self.settings.scope == "run" else self.nested.config.stash.get(_WORKERS, 1),
            by_https=hasattr(self.host.api, "shared"),
        )
        checks = _with_questions((*CHECKS, *DOCTOR_CHECKS))
        found = run_checks(seen, begin=self.view.begin, report=self._told, checks=checks)
        self.settings, self.choices = seen.settings, seen.choices
        self.reached = found.connection_error is None

    def _is_sleeping_lab(self) -> bool:
        """A lab is never started for this: it would be made, not looked at."""
        from pytest_nestedpve.config import hosts

        name = self.settings.host or ""
        if name.partition(":")[0] != "lab" or hosts.lab_runs(name):
            return False
        lab = name.partition(":")[2] or "default"
        reason = hosts.lab_hindrance()
        if reason is None:
            self._told(Finding("lab", "", f"{lab} can be started here: a run does that", level=OK))
            text = f"it does not run; to look further: nestedpve-lab start {shlex.quote(lab)}"
            self._told(Finding("the rest", "", text, level=UNKNOWN))
            self.reached = True
        else:
            install = ("nestedpve-lab install",)
            self._told(Finding("lab", "a machine that a lab can run on", reason, fix=install, local_fix=True))
            self.reached = True
        return True

    # -- what is told ---------------------------------------------------------------------------

    def _commands(self, finding: Finding) -> list[str]:
        """The finding's commands as they are typed on this machine."""
        return [line if finding.local_fix else self._over_ssh(line) for line in finding.fix]

    def _over_ssh(self, line: str) -> str:
        target: Any = getattr(self.host.ssh, "target", None) if self.host is not None else None
        name = getattr(target, "alias", "") or self.settings.host
        if not name:
            return line
        config = self.host.ssh_config if self.host is not None else None
        return shlex.join(["ssh", *(["-F", str(config)] if config else []), name, line])

    def _again(self) -> str:
        return shlex.join(["pytest", *map(str, self.nested.config.invocation_params.args)])

    def _write(self) -> None:
        path = self.settings.json_file
        if path is None:
            return
        rows: list[dict[str, Any]] = [
            {
                "row": "check",
                "what": each.what,
                "level": each.level,
                "found": each.actual,
                "expected": each.expected,
                "advice": each.advice,
                "commands": self._commands(each),
            }
            for each in self.findings
        ]
        if self.choices is not None:
            for what, value, why in self.view.rows(self.choices, self.settings):
                rows.append({"row": "choice", "what": what, "value": value, "why": why})
        text = json.dumps(self.view.masker.mask_data(rows), indent=1, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _with_questions(checks: Iterable[Check]) -> Iterator[Check]:
    """The checks; once the node is known, most of their questions are asked at once."""
    from pytest_nestedpve.setup.checks.run_checks import Check as One

    def ask(seen: Context) -> tuple[Finding, ...]:
        prepare = getattr(seen.host.api, "prepare", None)
        if prepare is not None:
            prepare(seen.host.node)
        return ()

    for check in checks:
        yield check
        if check.name == "node":
            yield One("answers of the API", ask, (*check.needs, "node"))


def only_reading(host: PveHost) -> PveHost:
    """The host by root's pvesh alone: HTTPS needs a token, and that is made on the host."""
    from pytest_nestedpve.setup.checks.context import ReadOnlyApi

    shared = getattr(host.api, "shared", None)
    return host.with_api(ReadOnlyApi(host.api if shared is None else shared.pvesh))
