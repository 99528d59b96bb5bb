"""The task that this process runs, or this thread for a node in this process."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from . import output


@dataclass
class Worker:
    """A running task: its UPID, its type, the warnings in its log so far."""

    upid: str
    kind: str
    warnings: int = 0


current: ContextVar[Worker | None] = ContextVar("nestedpve_worker", default=None)


def warn(text: str) -> None:
    """Write a warning to the task's log; the task ends "WARNINGS: n"."""
    output.line(f"WARN: {text}")
    if (worker := current.get()) is not None:
        worker.warnings += 1


def kind() -> str | None:
    """The type of the running task; None outside of tasks."""
    worker = current.get()
    return worker.kind if worker is not None else None
