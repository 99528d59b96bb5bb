"""The session of one process: it owns the hosts that it opens, by its own hook or a project's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.session.session import NestedSession


class Host:
    """A host as a hook returns it; writes its name to `closed`, and fails to close if it is to."""

    def __init__(self, name: str, closed: list[str], *, fails: bool = False) -> None:
        self.name, self._closed, self._fails = name, closed, fails

    def close(self) -> None:
        self._closed.append(self.name)
        if self._fails:
            raise PveError("the connection is lost")


def session_with(*hosts: Host | None) -> NestedSession:
    returned = iter(hosts)
    hook = SimpleNamespace(pytest_nestedpve_host=lambda **_: next(returned))
    pytest_session: Any = SimpleNamespace(config=SimpleNamespace(hook=hook))
    return NestedSession(pytest_session, Settings())


def test_a_session_closes_each_of_its_hosts_once_and_the_latest_first() -> None:
    closed: list[str] = []
    nested = session_with(Host("first", closed), Host("second", closed, fails=True), Host("third", closed))
    for name in ("first", "second", "third"):
        assert nested.connect().name == name
    nested.close()
    assert closed == ["third", "second", "first"]
    nested.close()
    assert len(closed) == 3


def test_a_session_without_a_host_reports_how_to_configure_one() -> None:
    with pytest.raises(PveError, match="pytest --pve-host HOST"):
        session_with(None).connect()


def test_a_session_that_needs_no_nested_pve_opens_no_run() -> None:
    nested = session_with()
    nested.close()
    assert nested.open_run is None
    assert nested.state.kept is None
