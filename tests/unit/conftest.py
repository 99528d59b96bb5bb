"""Fixtures of several unit tests. Hypothesis has no deadline: the load of the machine varies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from sshd import MakeServer, Sshd
    from standin_host import StandinHost

    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.ssh.connection import SshConnection

settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandinHost]:
    """An outer host that can nest, and an empty state directory of the test machine."""
    from standin_host import StandinHost

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    host = StandinHost(tmp_path / "host")
    yield host
    host.close()


@pytest.fixture
def env(host: StandinHost, tmp_path: Path) -> Iterator[Environment]:
    """A run on the outer host."""
    from standin_environment import environments

    with environments(host, tmp_path) as make:
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
