"""The hooks that a project's conftest.py, or another plugin, may implement."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.phases import Phase
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.settings import Settings


@pytest.hookspec()
def pytest_nestedpve_phases(phases: list[Phase], config: pytest.Config) -> None:
    """Add, replace or remove phases: edit the list in place. Called once, when a step is first collected
    or a fixture of this plugin is first used. Nothing may be connected here."""


@pytest.hookspec(firstresult=True)
def pytest_nestedpve_host(config: pytest.Config, settings: Settings) -> PveHost | None:
    """Return the outer host, instead of the one that the setting `host` names. Called when the host is
    first needed: in the first phase, by a teardown, or by --nested-destroy-only. May raise PveError."""
