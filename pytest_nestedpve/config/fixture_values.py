"""Settings of the VM's shape, with the values of a project's fixtures."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.config import parsers
from pytest_nestedpve.config.keys import KEYS, Key
from pytest_nestedpve.config.settings import Settings, SettingsError

if TYPE_CHECKING:
    pass


#: The settings that a session fixture `nested_pve_<name>` may set.
NAMES = ("cores", "memory", "disk", "image", "vm_options", "extra_vars", "playbook_dir")
_KEYS = {key.name: key for key in KEYS if key.name in NAMES}
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def apply(settings: Settings, values: Mapping[str, Any], base: Path) -> Settings:
    """The settings with the values of the fixtures, by name; None is the default. Raises SettingsError.

    `base`: the directory of relative paths. Values are texts, as in a configuration file, or typed.
    """
    changes: dict[str, Any] = {}
    origins = dict(settings.origins)
    for name in NAMES:
        value = values.get(name, getattr(settings, name))
        if value == getattr(settings, name):
            continue
        origin = f"the fixture nested_pve_{name}"
        try:
            changes[name] = _parse(_KEYS[name], value, base)
        except ValueError as e:
            raise SettingsError(f"{origin}: {e}") from e
        origins[name] = origin
    if changes.get("image") and settings.template:
        raise SettingsError(
            f"an image ({origins['image']}) and a template ({settings.origin('template')}) are both set; "
            "the nested VM is created from one: remove the other"
        )
    return replace(settings, **changes, origins=origins)


def _parse(key: Key, value: Any, base: Path) -> Any:
    if value is None:
        return getattr(Settings(), key.target)
    if not isinstance(value, Mapping):
        return key.parse(parsers.Text(str(value), base))
    if key.name not in ("vm_options", "extra_vars"):
        raise ValueError(f"expected a single value, found {value!r}")
    if key.name == "vm_options":
        return {
            parsers.option_name(name): str(int(option) if isinstance(option, bool) else option)
            for name, option in value.items()
        }
    for name in value:
        if not isinstance(name, str) or not _VARIABLE.fullmatch(name):
            raise ValueError(f"expected names that match {_VARIABLE.pattern}, found {name!r}")
    try:
        return dict(json.loads(json.dumps(dict(value))))
    except (TypeError, ValueError) as e:
        raise ValueError(f"expected values that JSON can represent: {e}") from e


assert set(NAMES) <= {field.name for field in fields(Settings)}
