"""A log of calls in memory."""

from __future__ import annotations

from pytest_nestedpve.pve.calls import Call


class Calls:
    """A `CallLog` whose entries tests read."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.tasks: list[tuple[str, str]] = []
        self.hidden: list[str] = []

    def record(self, call: Call, /) -> None:
        self.calls.append(call)

    def record_task(self, upid: str, cmd: str, /) -> None:
        self.tasks.append((upid, cmd))

    def hide(self, secret: str, /) -> None:
        self.hidden.append(secret)
