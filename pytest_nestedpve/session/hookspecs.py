"""The hooks that a project's conftest.py, or another plugin, may implement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import Phase
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.teardown.teardown import TeardownReport


@pytest.hookspec()
def pytest_nestedpve_phases(phases: list[Phase], config: pytest.Config) -> None:
    """Add, replace or remove phases: edit the list in place. Called once, when a step is first collected
    or a fixture of this plugin is first used. The hook must not connect to a host."""


@pytest.hookspec(firstresult=True)
def pytest_nestedpve_host(config: pytest.Config, settings: Settings) -> PveHost | None:
    """Return the outer host, instead of the one that the setting `host` names. Called when the host is
    first needed: in the first phase, by a teardown, or by --nested-destroy-only. May raise PveError."""


# The hooks below are called in the process that owns the environment (under xdist, the worker). A hook that
# raises is reported at the end of the session, whose exit status is then not 0; the result of the phase does
# not change, and the teardown continues. `pytest.exit` in a hook of a phase ends the session. The arguments
# contain no secrets, unless the facts of a project's own phases do.


@pytest.hookspec()
def pytest_nestedpve_phase_started(phase: Phase, environment: Environment) -> None:
    """Called before a phase is probed or done. `phase.timeout` limits this call, too."""


@pytest.hookspec()
def pytest_nestedpve_phase_finished(
    phase: Phase,
    environment: Environment,
    status: str,
    seconds: float,
    facts: Mapping[str, Any],
    cause: str | None,
) -> None:
    """Called after a phase. `status` is "done", "proved", "attached" (of a PVE that exists) or "failed";
    `seconds` its duration; `facts` a copy of the facts it recorded; `cause` the text of its error, None
    unless it failed. `phase.timeout` limits this call, too.
    """


@pytest.hookspec()
def pytest_nestedpve_teardown_finished(report: TeardownReport, environment: Environment) -> None:
    """Called once per run, after its teardown; not called if the environment is kept. `report` has lines of
    text: `destroyed`, `left` (leftovers that should have been destroyed; empty after a complete teardown) and
    `kept` (VMs that are not proved to be the run's). Limited to 60 seconds.
    """
