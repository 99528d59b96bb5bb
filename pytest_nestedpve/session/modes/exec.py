"""--nested-exec: in place of all tests one item, which runs a command against the ready environment."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from pytest_nestedpve.run.signals import Interrupted
from pytest_nestedpve.session.modes import destroy_only
from pytest_nestedpve.session.modes.command import Command
from pytest_nestedpve.session.tool_environment import FOREIGN

if TYPE_CHECKING:
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.session.session import NestedSession

FIXTURES = ("nested_pve_run", "nested_pve")
# Of this pytest process alone; a pytest in the command is another one.
_OWN = frozenset({"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"})


class NotZero(Exception):
    """The command ended with another status than 0."""


class Place(pytest.Collector):
    """Stands where a test has its file, so that the item has an id like any other."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return []


class ExecItem(pytest.Function):
    """PASSED when the command ended with status 0; its status becomes that of the session."""

    nested: NestedSession

    def runtest(self) -> None:
        nested = self.nested
        text = nested.settings.exec_command
        assert text is not None
        offered = cast("NestedPve", self.funcargs["nested_pve"])
        kept = {name: value for name, value in os.environ.items() if name not in FOREIGN | _OWN}
        command = Command(
            text,
            folder=self.config.invocation_params.dir,
            environ={**kept, **offered.environ()},
        )
        status = _run(nested, command)
        nested.state.tally.record_command(status)
        if nested.guard.first is not None:
            raise Interrupted(nested.guard.first)
        if status:
            raise NotZero(f"the command ended with status {status}: {text}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        del style
        return str(excinfo.value) if isinstance(excinfo.value, NotZero) else super().repr_failure(excinfo)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / destroy_only.NODE, 0, self.name


def neutralise(config: pytest.Config) -> None:
    """Take back what a project's addopts say about tests; the command runs once."""
    destroy_only.neutralise(config)
    if hasattr(config.option, "reruns"):
        config.option.reruns = 0  # None would leave the word to the ini file


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Make the item; no test is collected or imported."""
    destroy_only.set_aside(session.config)

    def run(nested_pve: NestedPve) -> None:
        del nested_pve

    place = Place.from_parent(session, name=destroy_only.NODE, nodeid=destroy_only.NODE)
    item: ExecItem = ExecItem.from_parent(place, name="exec", callobj=run)
    # A project's autouse fixtures are for its tests.
    item.fixturenames[:] = FIXTURES
    item.nested = nested
    session.items = [item]
    session.testscollected = 1


def _run(nested: NestedSession, command: Command) -> int:
    assert nested.open_run is not None
    audit = nested.open_run.runner.audit
    audit.write("exec_start", phase="exec", cmd=command.text)
    started = time.monotonic()
    status: int | None = None
    try:
        with _on_terminal(nested), nested.state.unlimited(), nested.guard.diverted(command.deliver):
            status = command.run()
        return status
    finally:
        took = round((time.monotonic() - started) * 1000, 1)
        audit.write("exec_end", phase="exec", rc=status, ms=took)


@contextmanager
def _on_terminal(nested: NestedSession) -> Iterator[None]:
    """With the descriptors that pytest was started with, input too, and on a line of its own."""
    plugins = nested.config.pluginmanager
    manager: Any = plugins.getplugin("capturemanager")
    if manager is not None:
        manager.suspend(in_=True)
    try:
        reporter: Any = plugins.getplugin("terminalreporter")
        if reporter is not None:
            reporter.ensure_newline()
            reporter.flush()
        yield
    finally:
        if manager is not None:
            manager.resume()
