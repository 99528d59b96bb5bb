"""The VM's shape from fixtures that a project overrides; who the VM is, is a matter of settings alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.outcomes import Failed

from pytest_nestedpve import values
from pytest_nestedpve.options import KEYS, Key
from pytest_nestedpve.settings import Settings, SettingsError

if TYPE_CHECKING:
    from pytest_nestedpve.session import NestedSession

#: The settings that a session fixture `nested_pve_<name>` may decide instead.
NAMES = ("cores", "memory", "disk", "image", "vm_options", "extra_vars", "playbook_dir")
_KEYS = {key.name: key for key in KEYS if key.name in NAMES}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def apply(settings: Settings, chosen: Mapping[str, Any], base: Path) -> Settings:
    """The settings with what the fixtures say; None is the default. Raises SettingsError.

    `base`: where relative paths start from. Values may be what the setting's text says, or typed.
    """
    changes: dict[str, Any] = {}
    origins = dict(settings.origins)
    for name in NAMES:
        given = chosen.get(name, getattr(settings, name))
        if given == getattr(settings, name):
            continue
        origin = f"the fixture nested_pve_{name}"
        try:
            changes[name] = _value(_KEYS[name], given, base)
        except ValueError as e:
            raise SettingsError(f"{origin}: {e}") from e
        origins[name] = origin
    if changes.get("image") and settings.template:
        raise SettingsError(
            f"an image ({origins['image']}) and a template ({settings.origin('template')}) are both set; "
            "the nested VM is made from one: leave the other out"
        )
    return replace(settings, **changes, origins=origins)


def _value(key: Key, given: Any, base: Path) -> Any:
    if given is None:
        return getattr(Settings(), key.target)
    if not isinstance(given, Mapping):
        return key.parse(values.Text(str(given), base))
    if key.name not in ("vm_options", "extra_vars"):
        raise ValueError(f"expected a single value, found {given!r}")
    if key.name == "vm_options":
        return {
            values.option_name(name): str(int(value) if isinstance(value, bool) else value)
            for name, value in given.items()
        }
    for name in given:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"expected names that match {_VARIABLE.pattern}, found {name!r}")
    try:
        return dict(json.loads(json.dumps(dict(given))))
    except (TypeError, ValueError) as e:
        raise ValueError(f"expected values that JSON can say: {e}") from e


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


assert set(NAMES) <= {each.name for each in fields(Settings)}
