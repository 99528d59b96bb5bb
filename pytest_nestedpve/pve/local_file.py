"""A file of this machine, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o600


def write(path: Path, data: str | bytes, *, mode: int = PRIVATE) -> None:
    """Write `data` (text as UTF-8) to `path`; see `replacement`. Raises OSError."""
    with replacement(path, mode=mode) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def replacement(path: Path, *, mode: int = PRIVATE) -> Iterator[BinaryIO]:
    """A new file that gets the name `path` when the body has ended without an exception.

    Until then it has a temporary name in the same directory, and `path` the old content; after an exception
    it is deleted. `mode` is that of the new file, less the umask. A symbolic link at `path` is replaced, not
    followed. Nothing is synced: after a power failure the file may be lost. Raises OSError.
    """
    draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(6)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise
