"""The session fixtures by which a project overrides the shape of the nested VM."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve.config.settings import SettingsError

if TYPE_CHECKING:
    from pytest_nestedpve.session.session import NestedSession

from pytest_nestedpve.config.fixture_values import NAMES, apply


def take(nested: NestedSession, chosen: Mapping[str, Any]) -> None:
    """Have the session work with what the fixtures say, unless its environment is made already."""
    if nested.opened:
        return
    try:
        nested.settings = apply(nested.settings, chosen, nested.config.rootpath)
    except SettingsError as e:
        raise Failed(f"nested-pve: {e}", pytrace=False) from e


def check(items: Iterable[pytest.Item]) -> None:
    """There is one environment, so these fixtures mean the same for all tests. Raises pytest.UsageError."""
    seen: dict[str, tuple[Any, str]] = {}
    for item in items:
        known = getattr(getattr(item, "_fixtureinfo", None), "name2fixturedefs", {})
        params = getattr(getattr(item, "callspec", None), "params", {})
        for name in (f"nested_pve_{each}" for each in NAMES):
            for definition in (known.get(name) or ())[-1:]:
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
                first, where = seen.setdefault(name, (definition, item.nodeid))
                if first is not definition:
                    raise pytest.UsageError(
                        f"nested-pve: the fixture {name} is one for {where} and another for {item.nodeid}; "
                        "there is one nested PVE for all tests: override it in the conftest.py of the rootdir"
                    )
