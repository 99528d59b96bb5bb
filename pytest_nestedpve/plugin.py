"""pytest hooks and fixtures; thin: what they do lives in the modules beside this one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.nested import NestedPve
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session import NestedSession
    from pytest_nestedpve.settings import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    from pytest_nestedpve import options

    options.register(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_nestedpve import hooks

    pluginmanager.add_hookspecs(hooks)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    if config.option.nested_destroy_only:
        from pytest_nestedpve import destroy_items

        destroy_items.neutralise(config)
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "nested_pve(upto): set the nested PVE up only as far as the phase of that name",
    )
    config.addinivalue_line(
        "markers",
        "nested_pve_clean(scope): nested_pve_clean gives the clean state once per function, class or module",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    from pytest_nestedpve import lifecycle

    lifecycle.begin(session)


def pytest_pycollect_makeitem(collector: pytest.Collector, obj: object) -> list[pytest.Item] | None:
    # By name: nothing is imported for projects that do not have it.
    if type(obj) is not ModuleType or obj.__name__ != "pytest_nestedpve.steps":
        return None
    if not isinstance(collector, pytest.Module):
        return None
    from pytest_nestedpve import lifecycle

    return lifecycle.collect_steps(collector)


@pytest.hookimpl(trylast=True)
def pytest_nestedpve_host(config: pytest.Config, settings: Settings) -> PveHost | None:
    if settings.host is None:
        return None
    from pytest_nestedpve import lifecycle

    return lifecycle.default_host(config, settings.host)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    from pytest_nestedpve import lifecycle

    lifecycle.adopt_worker(node)


@pytest.fixture(scope="session")
def nested_pve_run(request: pytest.FixtureRequest) -> Iterator[NestedSession]:
    """The run: its identity, its environment, and the teardown at the end. Sets up no phase by itself."""
    from pytest_nestedpve import lifecycle

    nested = lifecycle.of(request.config)
    try:
        nested.open()
        yield nested
    finally:
        nested.finish()


@pytest.fixture(scope="session")
def nested_pve(nested_pve_run: NestedSession) -> NestedPve:
    """A nested Proxmox VE, set up completely, or as far as `@pytest.mark.nested_pve(upto=…)` says."""
    return nested_pve_run.nested_pve()


@pytest.fixture
def nested_pve_clean(
    request: pytest.FixtureRequest, nested_pve_run: NestedSession, nested_pve: NestedPve
) -> NestedPve:
    """The nested PVE as it was after set-up, whatever tests before did to it.

    For each test, or with `@pytest.mark.nested_pve_clean(scope="module")` (or class) once for all of those.
    """
    nested_pve_run.give_clean(request.node)
    return nested_pve


@pytest.fixture
def _nested_pve_step(request: pytest.FixtureRequest, nested_pve_run: NestedSession) -> Callable[[], None]:
    """Does what a step needs; the value does the step itself."""
    return nested_pve_run.step(request.node)
