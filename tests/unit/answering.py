"""An SshLike that only answers commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from pytest_nestedpve.pve.ssh.connection import CommandResult


class Answering:
    """A base class; `answer` returns the result of a command."""

    def answer(self, command: str | Sequence[str], timeout: float, secret: bool) -> CommandResult:
        raise NotImplementedError

    def run(
        self,
        command: str | Sequence[str],
        *,
        stdin: bytes | None = None,
        timeout: float = 60.0,
        secret: bool = False,
        logged: bool = True,
    ) -> CommandResult:
        del logged
        assert stdin is None
        return self.answer(command, timeout, secret)

    def put(self, data: bytes | BinaryIO | Path, remote: str, mode: int = 0o600) -> None:
        raise NotImplementedError

    def get(self, remote: str, limit: int = 0) -> bytes:
        raise NotImplementedError

    def open_channel(self, host: str, port: int) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        return None
