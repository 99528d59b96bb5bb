"""Output of a call: to the streams of this process, or to those set for this thread."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

_streams: ContextVar[tuple[Any, Any] | None] = ContextVar("nestedpve_streams", default=None)


@contextlib.contextmanager
def streams(out: Any, err: Any) -> Iterator[None]:
    """Lines of this thread go to `out` and `err`, objects with `write` and `flush`."""
    token = _streams.set((out, err))
    try:
        yield
    finally:
        _streams.reset(token)


def out() -> Any:
    """The stream of results."""
    current = _streams.get()
    return current[0] if current is not None else sys.stdout


def err() -> Any:
    """The stream of errors."""
    current = _streams.get()
    return current[1] if current is not None else sys.stderr


def line(text: str) -> None:
    """A line of a task's log, or of a command's output."""
    print(text, file=out(), flush=True)


def error(text: str) -> None:
    """A line of a command's errors."""
    print(text, file=err(), flush=True)
