"""--nested-env-file: the variables of `NestedPve.environ` in a file, while the environment is ready.

A line is NAME=value, with quotes only where a shell needs them: sh, direnv and docker compose read them
correctly; `docker run --env-file`, which reads quotes as part of a value, reads all other lines correctly.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.errors import PveError

_OURS = "# Variables of nested-pve run "
_SAFE = re.compile(r"[A-Za-z0-9_@%+=:,./!-]+\Z")


class EnvFileError(PveError):
    """The file cannot be written."""


def text(variables: Mapping[str, str], run: str) -> str:
    """The file's content."""
    lines = [f"{_OURS}{run}: valid until its environment ends, with which this file is deleted."]
    lines += [f"{name}={_quoted(value)}" for name, value in sorted(variables.items())]
    return "\n".join(lines) + "\n"


def _quoted(value: str) -> str:
    if "\n" in value:
        raise EnvFileError(f"expected variables of one line for the file, found {value[:30]!r}…")
    return value if _SAFE.match(value) else "'" + value.replace("'", "'\\''") + "'"


def find_fault(path: Path) -> str:
    """The reason why `path` cannot be written; empty if it can. Only files of a session are replaced."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        pass
    except OSError as e:
        return str(e)
    else:
        if not stat.S_ISREG(status.st_mode):
            return f"{path} is not a file"
        if not _is_ours(path):
            return f"{path} exists and was not written by a session; name a file that does not exist"
    parent = path.parent
    if not parent.is_dir():
        return f"there is no directory {parent}"
    return "" if os.access(parent, os.W_OK | os.X_OK) else f"the directory {parent} is not writable"


def _is_ours(path: Path, run: str = "") -> bool:
    with contextlib.suppress(OSError), path.open("rb") as file:
        return file.read(200).startswith((_OURS + run).encode())
    return False


def write(path: Path, content: str) -> None:
    """Write the file, mode 0600, whole or not at all. Raises EnvFileError."""
    reason = find_fault(path)
    if reason:
        raise EnvFileError(f"--nested-env-file: {reason}")
    try:
        local_file.write(path, content)
    except OSError as e:
        raise EnvFileError(f"--nested-env-file: {path} cannot be written: {e}") from e


def remove(path: Path, run: str) -> None:
    """Delete the file if it belongs to that run."""
    if _is_ours(path, run):
        with contextlib.suppress(OSError):
            path.unlink()
