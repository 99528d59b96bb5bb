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
    or a fixture of this plugin is first used. Nothing may be connected here."""


@pytest.hookspec(firstresult=True)
def pytest_nestedpve_host(config: pytest.Config, settings: Settings) -> PveHost | None:
    """Return the outer host, instead of the one that the setting `host` names. Called when the host is
    first needed: in the first phase, by a teardown, or by --nested-destroy-only. May raise PveError."""


# The hooks below are told what happens, in the process that has the environment (under xdist, the worker).
# One that raises is named at the end of the session, whose status is then not 0; the phase's result stays as
# it is, and the teardown goes on. `pytest.exit` in a hook of a phase ends the session. What is given holds
# no secrets, unless the facts of a project's own phases do.


@pytest.hookspec()
def pytest_nestedpve_phase_started(phase: Phase, environment: Environment) -> None:
    """A phase begins: it is about to be probed or done. `phase.timeout` bounds this call, too."""


@pytest.hookspec()
def pytest_nestedpve_phase_finished(
    phase: Phase,
    environment: Environment,
    status: str,
    seconds: float,
    facts: Mapping[str, Any],
    cause: str | None,
) -> None:
    """A phase ended. `status` is "done", "proved", "attached" (of a PVE that exists) or "failed"; `seconds`
    what it took; `facts` a copy of what it recorded; `cause` the text of its error, None unless it failed.
    `phase.timeout` bounds this call, too.
    """


@pytest.hookspec()
def pytest_nestedpve_teardown_finished(report: TeardownReport, environment: Environment) -> None:
    """The teardown of a run is over, once per run; not called when the environment is kept. `report` has
    `destroyed`, `left` (what is still there that should be gone; empty when all is well) and `kept` (what was
    found and is not ours), lines of text each. Bounded to 60 seconds.
    """
