"""--nested-exec: one item instead of tests, which runs a command against the complete environment."""

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
# Variables of this pytest process: a pytest started by the command must not inherit them.
_PYTEST = frozenset({"PYTEST_CURRENT_TEST", "PYTEST_VERSION", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"})


class CommandFailed(Exception):
    """The command exited with a status other than 0."""


class ItemParent(pytest.Collector):
    """The parent of an item without a test file: gives the item a node id like those of tests."""

    def collect(self) -> list[pytest.Item | pytest.Collector]:
        return []


class ExecItem(pytest.Function):
    """PASSED if the command exited with status 0; the session exits with the status of the command."""

    nested: NestedSession

    def runtest(self) -> None:
        nested = self.nested
        text = nested.settings.exec_command
        assert text is not None
        nested_pve = cast("NestedPve", self.funcargs["nested_pve"])
        inherited = {name: value for name, value in os.environ.items() if name not in FOREIGN | _PYTEST}
        command = Command(
            text,
            folder=self.config.invocation_params.dir,
            environ={**inherited, **nested_pve.environ()},
        )
        status = _run(nested, command)
        nested.state.tally.record_command(status)
        if nested.guard.first is not None:
            raise Interrupted(nested.guard.first)
        if status:
            raise CommandFailed(f"the command ended with status {status}: {text}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        del style
        return (
            str(excinfo.value) if isinstance(excinfo.value, CommandFailed) else super().repr_failure(excinfo)
        )

    def reportinfo(self) -> tuple[Any, int | None, str]:
        return self.config.rootpath / destroy_only.NODE, 0, self.name


def neutralise(config: pytest.Config) -> None:
    """Reset the options for tests that a project's addopts may set; the command runs once."""
    destroy_only.neutralise(config)
    if hasattr(config.option, "reruns"):
        config.option.reruns = 0  # with None the ini file's value would apply


def collect(session: pytest.Session, nested: NestedSession) -> None:
    """Create the item; no test is collected or imported."""
    destroy_only.unregister_selecting_plugins(session.config)

    def run(nested_pve: NestedPve) -> None:
        del nested_pve

    parent = ItemParent.from_parent(session, name=destroy_only.NODE, nodeid=destroy_only.NODE)
    item: ExecItem = ExecItem.from_parent(parent, name="exec", callobj=run)
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
        milliseconds = round((time.monotonic() - started) * 1000, 1)
        audit.write("exec_end", phase="exec", rc=status, ms=milliseconds)


@contextmanager
def _on_terminal(nested: NestedSession) -> Iterator[None]:
    """Suspend pytest's capturing of input and output, and begin a new line on the terminal."""
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
