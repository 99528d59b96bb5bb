"""Fixtures of several unit tests. Hypothesis has no deadline: the load of the machine varies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from sshd import MakeServer, Sshd

    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.ssh.connection import SshConnection

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture
def memory(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An outer host, and an empty state directory of the test machine.

    In a module with STANDIN = True it is a StandinHost, which can nest; else one in memory.
    """
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    if not getattr(request.module, "STANDIN", False):
        from memory_host import MemoryHost

        yield MemoryHost(tmp_path / "host.json")
        return
    from standin_host import StandinHost

    host = StandinHost(tmp_path / "host")
    yield host
    host.close()


@pytest.fixture
def host(request: pytest.FixtureRequest, memory: Any) -> Any:
    """The host as one that can nest."""
    if not getattr(request.module, "STANDIN", False):
        with memory.open() as model:
            model.state["files"] |= {"/sys/module/kvm_intel/parameters/nested": "Y\n", "/dev/kvm": ""}
    return memory


@pytest.fixture
def env(memory: Any, tmp_path: Path) -> Iterator[Environment]:
    """A run on the outer host."""
    from standin_environment import environments

    with environments(memory, tmp_path) as make:
        yield make()


@pytest.fixture
def pool(env: Environment) -> None:
    """The run's pool."""
    from pytest_nestedpve.ownership.pool import create_pool

    create_pool(env.outer.api, env.run, env.settings, 1_800_000_000)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """An OpenSSH server that no test stops or changes."""
    from sshd import Sshd

    sshd = Sshd(tmp_path_factory.mktemp("sshd")).start()
    yield sshd
    sshd.stop()


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[MakeServer]:
    """A function that creates servers with options for the test."""
    from sshd import Sshd

    servers: list[Sshd] = []

    def make(name: str = "own", **options: object) -> Sshd:
        servers.append(Sshd(tmp_path / name, **options))  # type: ignore[arg-type]
        return servers[-1]

    yield make
    for sshd in servers:
        sshd.stop()


@pytest.fixture
def ssh(server: Sshd) -> Iterator[SshConnection]:
    """A connection to the shared server."""
    from pytest_nestedpve.pve.ssh.connection import SshConnection

    with SshConnection(server.target()) as connection:
        yield connection
