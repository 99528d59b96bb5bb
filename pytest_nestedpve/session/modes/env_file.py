"""Hooks that write the file of --nested-env-file."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_nestedpve.config import env_file
from pytest_nestedpve.pve.errors import PveError

if TYPE_CHECKING:
    from pytest_nestedpve.session.session import NestedSession


class EnvFileHooks:
    """Writes the file after the set-up: before the first test's own fixtures, or after the last step."""

    def __init__(self, nested: NestedSession, path: Path) -> None:
        self._nested = nested
        self._path = path
        self._tried = self._written = False

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        result = yield
        if fixturedef.argname == "nested_pve":
            self._write()
        return result

    # For a later test that needs more phases than the first. Registered before the hooks that run the phases,
    # so pytest calls it after them.
    def pytest_runtest_setup(self) -> None:
        self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Generator[None, Any, Any]:
        result = yield
        self._write()
        return result

    def _write(self) -> None:
        open_run = self._nested.open_run
        if self._written or open_run is None or open_run.runner.broken or not open_run.runner.complete():
            return
        environment = open_run.environment
        run = environment.run.id
        if not self._tried:
            self._tried = True
            environment.on_close(lambda: env_file.remove(self._path, run))
        try:
            env_file.write(self._path, env_file.text(open_run.nested_pve().environ(), run))
        except PveError as e:
            raise pytest.fail.Exception(f"nested-pve: {e}", pytrace=False) from e
        self._written = True
