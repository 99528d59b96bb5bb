"""The session fixtures with which a project overrides options of the nested VM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.config.fixture_values import NAMES, apply
from pytest_nestedpve.config.settings import SettingsError

if TYPE_CHECKING:
    from pytest_nestedpve.session.state import SessionState


def apply_fixtures(state: SessionState, values: Mapping[str, Any]) -> None:
    """Replace settings by the values of the fixtures. Raises Failed for an invalid value."""
    try:
        state.use_settings(apply(state.settings, values, state.config.rootpath))
    except SettingsError as e:
        raise Failed(f"nested-pve: {e}", pytrace=False) from e


def check_fixtures(items: Iterable[pytest.Item]) -> None:
    """Raise pytest.UsageError unless each fixture has one value for all tests: they share one environment."""
    first_users: dict[str, tuple[Any, str]] = {}
    for item in items:
        definitions = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        params = getattr(getattr(item, "callspec", None), "params", {})
        for name in (f"nested_pve_{setting}" for setting in NAMES):
            for definition in (definitions.get(name) or ())[-1:]:
                if definition.params is not None or name in params:
                    raise pytest.UsageError(
                        f"nested-pve: the fixture {name}: expected one value, as there is one nested PVE for "
                        f"all tests; found it parametrized ({item.nodeid}). For several shapes run pytest "
                        f"several times, with -o {name}=…"
                    )
                if definition.scope != "session":
                    raise pytest.UsageError(
                        f"nested-pve: the fixture {name}: expected scope='session', as there is one nested "
                        f"PVE for all tests; found {definition.scope!r} ({item.nodeid})"
                    )
                first, user = first_users.setdefault(name, (definition, item.nodeid))
                if first is not definition:
                    raise pytest.UsageError(
                        f"nested-pve: the fixture {name} has one value for {user}, another for "
                        f"{item.nodeid}; there is one nested PVE for all tests: override it in the "
                        "conftest.py of the rootdir"
                    )
