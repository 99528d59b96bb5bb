"""The files that a playbook depends on (imports, roles, roles of roles), and a hash of their contents.

The files are read, without Ansible. If the name of a role contains a variable, every role counts.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FILES = ("import_playbook", "import_tasks", "include_tasks", "include_vars", "vars_files")
_ROLES = ("import_role", "include_role")
_ADJACENT = ("group_vars", "host_vars", "filter_plugins", "library", "module_utils", "templates", "files")
_IGNORED = frozenset({"__pycache__", ".git", "molecule", ".ansible"})


def digest_of(playbook: Path, roles_path: Iterable[Path] = ()) -> str:
    """A hash over names and contents of all files that `playbook` depends on. Raises OSError."""
    digest = hashlib.sha256()
    for path in sorted(files_of(playbook, roles_path)):
        digest.update(str(path.name).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def files_of(playbook: Path, roles_path: Iterable[Path] = ()) -> set[Path]:
    """The playbook, its imports, and every file of the roles that they use. Raises OSError."""
    return _Search([playbook.parent / "roles", playbook.parent, *roles_path]).run(playbook)


class _Search:
    def __init__(self, role_parents: list[Path]) -> None:
        self._role_parents = role_parents
        self._files: set[Path] = set()
        self._roles: set[str] = set()

    def run(self, playbook: Path) -> set[Path]:
        self._add_file(playbook, playbook.parent)
        for name in _ADJACENT:
            self._files.update(_tree(playbook.parent / name))
        return self._files

    def _add_file(self, path: Path, base: Path) -> None:
        path = Path(os.path.normpath(path))
        if path in self._files or not path.is_file():
            return
        self._files.add(path)
        if path.suffix in (".yml", ".yaml"):
            self._follow(_load(path), base)

    def _follow(self, data: Any, base: Path) -> None:
        for key, value in _pairs(data):
            short = key.rpartition(".")[2]
            if short in _FILES:
                for name in _texts(value, "file"):
                    self._add_file(base / name, base)
            elif short in _ROLES or key in ("roles", "dependencies"):
                for name in _texts(value, "name", "role"):
                    self._add_role(name)

    def _add_role(self, name: str) -> None:
        name = name.rpartition(".")[2]
        if name in self._roles:
            return
        self._roles.add(name)
        if "{" in name:
            for parent in self._role_parents:
                for path in sorted(parent.iterdir()) if parent.is_dir() else ():
                    if (path / "tasks").is_dir():
                        self._add_role(path.name)
            return
        paths = (parent / name for parent in self._role_parents)
        role = next((path for path in paths if (path / "tasks").is_dir()), None)
        for path in _tree(role) if role is not None else ():
            self._files.add(path)
            if path.suffix in (".yml", ".yaml"):
                self._follow(_load(path), path.parent)


def _tree(root: Path) -> Iterator[Path]:
    for directory, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in _IGNORED)
        yield from (Path(directory, name) for name in files if not name.endswith(".pyc"))


def _pairs(data: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(data, dict):
        for key, value in data.items():
            yield str(key), value
            yield from _pairs(value)
    elif isinstance(data, list):
        for item in data:
            yield from _pairs(item)


def _texts(value: Any, *keys: str) -> Iterator[str]:
    if isinstance(value, str):
        yield value.split(" ")[0].removeprefix("name=").removeprefix("file=")
    elif isinstance(value, dict):
        yield from (value[key] for key in keys if isinstance(value.get(key), str))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, *keys)


def _load(path: Path) -> Any:
    """The data of a YAML file, with unknown tags allowed; None for a file that is not YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="rt").load(path.read_text(encoding="utf-8", errors="replace"))
    except YAMLError:
        return None
