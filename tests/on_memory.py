"""A pytest plugin for the documentation's examples: the outer host is one in memory, the phases are quick."""

from __future__ import annotations

from typing import Any

import pytest
from memory_host import MemoryHost, memory_phases


def pytest_nestedpve_host(config: pytest.Config) -> Any:
    return MemoryHost(config.rootpath / ".host.json").connect()


@pytest.hookimpl(tryfirst=True)
def pytest_nestedpve_phases(phases: list[Any]) -> None:
    phases[:] = memory_phases()
