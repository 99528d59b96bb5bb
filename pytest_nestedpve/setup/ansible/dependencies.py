"""Which files a playbook depends on: what it imports, its roles and theirs; and a hash of their contents.

Found by reading, not by running Ansible. Where a name is made at run time, every role at hand counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FILES = ("import_playbook", "import_tasks", "include_tasks", "include_vars", "vars_files")
_ROLES = ("import_role", "include_role")
_BESIDE = ("group_vars", "host_vars", "filter_plugins", "library", "module_utils", "templates", "files")
_LEFT_OUT = frozenset({"__pycache__", ".git", "molecule", ".ansible"})


def digest_of(playbook: Path, roles_path: Iterable[Path] = ()) -> str:
    """A hash over names and contents of all files that `playbook` depends on. Raises OSError."""
    found = hashlib.sha256()
    for path in sorted(files_of(playbook, roles_path)):
        found.update(str(path.name).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return found.hexdigest()


def files_of(playbook: Path, roles_path: Iterable[Path] = ()) -> set[Path]:
    """The playbook, what it imports, and every file of the roles that it and they use. Raises OSError."""
    return _Search([playbook.parent / "roles", playbook.parent, *roles_path]).run(playbook)


class _Search:
    def __init__(self, places: list[Path]) -> None:
        self._places = places
        self._found: set[Path] = set()
        self._roles: set[str] = set()

    def run(self, playbook: Path) -> set[Path]:
        self._file(playbook, playbook.parent)
        for name in _BESIDE:
            self._found.update(_tree(playbook.parent / name))
        return self._found

    def _file(self, path: Path, base: Path) -> None:
        path = Path(os.path.normpath(path))
        if path in self._found or not path.is_file():
            return
        self._found.add(path)
        if path.suffix in (".yml", ".yaml"):
            self._look(_load(path), base)

    def _look(self, data: Any, base: Path) -> None:
        for key, value in _pairs(data):
            short = key.rpartition(".")[2]
            if short in _FILES:
                for name in _texts(value, "file"):
                    self._file(base / name, base)
            elif short in _ROLES or key in ("roles", "dependencies"):
                for name in _texts(value, "name", "role"):
                    self._role(name)

    def _role(self, name: str) -> None:
        name = name.rpartition(".")[2]
        if name in self._roles:
            return
        self._roles.add(name)
        if "{" in name:
            for place in self._places:
                for path in sorted(place.iterdir()) if place.is_dir() else ():
                    if (path / "tasks").is_dir():
                        self._role(path.name)
            return
        role = next((place / name for place in self._places if (place / name / "tasks").is_dir()), None)
        for path in _tree(role) if role is not None else ():
            self._found.add(path)
            if path.suffix in (".yml", ".yaml"):
                self._look(_load(path), path.parent)


def _tree(root: Path) -> Iterator[Path]:
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in _LEFT_OUT)
        yield from (Path(directory, name) for name in files if not name.endswith(".pyc"))


def _pairs(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key), value
            yield from _pairs(value)
    elif isinstance(data, list):
        for each in data:
            yield from _pairs(each)


def _texts(value: Any, *keys: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value.split(" ")[0].removeprefix("name=").removeprefix("file=")
    elif isinstance(value, dict):
        yield from (value[key] for key in keys if isinstance(value.get(key), str))
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each, *keys)


def _load(path: Path) -> Any:
    """The data of a YAML file, whatever tags are in it; nothing for one that cannot be read as such."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="rt").load(path.read_text(encoding="utf-8", errors="replace"))
    except YAMLError:
        return None
