"""A pytest plugin for the documentation's examples: the outer host is a stand-in, the phases are quick."""

from __future__ import annotations

from typing import Any

import pytest
from standin_host import StandinHost
from standin_phases import standin_phases


def pytest_nestedpve_host(config: pytest.Config) -> Any:
    return StandinHost(config.rootpath / ".host").connect()


@pytest.hookimpl(tryfirst=True)
def pytest_nestedpve_phases(phases: list[Any]) -> None:
    phases[:] = standin_phases()
