"""pytest hooks and fixtures. The work is done in session/hooks.py and session/open_run.py."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.session.nested_pve import NestedPve
    from pytest_nestedpve.session.open_run import OpenRun


def pytest_addoption(parser: pytest.Parser) -> None:
    from pytest_nestedpve.config import keys

    keys.register(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_nestedpve.session import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, Any, Any]:
    if config.option.nested_destroy_only:
        from pytest_nestedpve.session.modes import destroy_only

        destroy_only.neutralise(config)
    elif config.option.nested_doctor:
        from pytest_nestedpve.session.modes import doctor

        doctor.neutralise(config)
    elif config.option.nested_exec is not None or config.option.nested_make_template:
        from pytest_nestedpve.session.modes import exec

        exec.neutralise(config)
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
    from pytest_nestedpve.session import hooks

    hooks.begin(session)


def pytest_pycollect_makeitem(collector: pytest.Collector, obj: object) -> list[pytest.Item] | None:
    # Compared by name: projects without the sentinel import no further module.
    if type(obj) is not ModuleType or obj.__name__ != "pytest_nestedpve.steps":
        return None
    if not isinstance(collector, pytest.Module):
        return None
    from pytest_nestedpve.session import hooks

    return hooks.collect_steps(collector)


@pytest.hookimpl(trylast=True)
def pytest_nestedpve_host(config: pytest.Config, settings: Settings) -> PveHost | None:
    if settings.host is None:
        return None
    from pytest_nestedpve.config import hosts
    from pytest_nestedpve.session import hooks

    session = hooks.of(config)
    resolved = hosts.resolve(settings.host)
    session.state.remark_once(*resolved.notes)  # before the login: the notes may explain its failure
    return hosts.connect(resolved, session.command_log())


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    from pytest_nestedpve.session import hooks

    hooks.configure_worker(node)


# Options of the VM, checked by vm_fixtures.py. A project's conftest.py may override them in scope session.


def _setting(request: pytest.FixtureRequest, name: str) -> Any:
    from pytest_nestedpve.session import hooks

    return getattr(hooks.of(request.config).settings, name)


@pytest.fixture(scope="session")
def nested_pve_cores(request: pytest.FixtureRequest) -> int | str:
    """Cores of the nested VM: the setting nested_pve_cores, unless overridden."""
    return _setting(request, "cores")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_memory(request: pytest.FixtureRequest) -> int | str:
    """Memory of the nested VM in MiB: the setting nested_pve_memory, unless overridden."""
    return _setting(request, "memory")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_disk(request: pytest.FixtureRequest) -> int | str:
    """Disk of the nested VM in GiB: the setting nested_pve_disk, unless overridden."""
    return _setting(request, "disk")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_image(request: pytest.FixtureRequest) -> str | None:
    """Image of the nested VM: the setting nested_pve_image, unless overridden."""
    return _setting(request, "image")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_vm_options(request: pytest.FixtureRequest) -> Mapping[str, Any] | str:
    """Further qm options of the nested VM: the setting nested_pve_vm_options, unless overridden."""
    return _setting(request, "vm_options")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_extra_vars(request: pytest.FixtureRequest) -> Mapping[str, Any] | str:
    """Variables for every playbook: the setting nested_pve_extra_vars, unless overridden."""
    return _setting(request, "extra_vars")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_playbook_dir(request: pytest.FixtureRequest) -> Path | str | None:
    """Directory of playbooks: the setting nested_pve_playbook_dir, unless overridden."""
    return _setting(request, "playbook_dir")  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def nested_pve_run(
    request: pytest.FixtureRequest,
    nested_pve_cores: Any,
    nested_pve_memory: Any,
    nested_pve_disk: Any,
    nested_pve_image: Any,
    nested_pve_vm_options: Any,
    nested_pve_extra_vars: Any,
    nested_pve_playbook_dir: Any,
) -> Iterator[OpenRun]:
    """The run: its identity, its environment, and the teardown at the end. Runs no phase by itself."""
    from pytest_nestedpve.session import hooks, vm_fixtures

    nested = hooks.of(request.config)
    values = {
        "cores": nested_pve_cores,
        "memory": nested_pve_memory,
        "disk": nested_pve_disk,
        "image": nested_pve_image,
        "vm_options": nested_pve_vm_options,
        "extra_vars": nested_pve_extra_vars,
        "playbook_dir": nested_pve_playbook_dir,
    }
    try:
        if nested.open_run is None:
            vm_fixtures.apply_fixtures(nested.state, values)
        yield nested.open()
    finally:
        nested.finish()


@pytest.fixture(scope="session")
def nested_pve(nested_pve_run: OpenRun) -> NestedPve:
    """A nested Proxmox VE, set up completely, or up to the phase in `@pytest.mark.nested_pve(upto=…)`."""
    return nested_pve_run.nested_pve()


@pytest.fixture
def nested_pve_clean(
    request: pytest.FixtureRequest, nested_pve_run: OpenRun, nested_pve: NestedPve
) -> NestedPve:
    """The nested PVE in its state after set-up: changes of earlier tests are undone.

    For each test, or with `@pytest.mark.nested_pve_clean(scope="module")` (or class) once per module (class).
    """
    nested_pve_run.restore_clean_state(request.node)
    return nested_pve


@pytest.fixture
def _nested_pve_step(request: pytest.FixtureRequest, nested_pve_run: OpenRun) -> Callable[[], None]:
    """Runs the phases that a step needs; the value runs the step's own phase."""
    return nested_pve_run.prepare_step(request.node)
