"""Recordings of PVE 9.2 from tests/data, and an SSH connection that answers with them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answering import Answering

from pytest_nestedpve.pve.ssh.connection import CommandResult

_DATA = Path(__file__).parent.parent / "data"
Record = dict[str, Any]


def read(name: str) -> dict[str, Record]:
    """The recordings of a file by their id; its first line names their source."""
    lines = (_DATA / name).read_text(encoding="utf-8").splitlines()
    return {record["id"]: record for record in map(json.loads, lines[1:])}


RECORDED = read("recorded_answers.jsonl")
FAILURES = read("recorded_failures.jsonl")
EVERY = RECORDED | FAILURES
HTTPS = read("recorded_https.jsonl")
"""Answers of port 8006, with the status line and the headers."""


class Recorded(Answering):
    """An SshLike that answers each command with what was recorded, in turn; keeps what was asked."""

    def __init__(self, *answers: dict[str, Any] | tuple[int, str, str]) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []
        self.secret: list[bool] = []
        self.limits: list[float] = []

    def answer(self, command: str | Sequence[str], timeout: float, secret: bool) -> CommandResult:
        self.asked.append(shlex.split(command) if isinstance(command, str) else list(command))
        self.secret.append(secret)
        self.limits.append(timeout)
        answer = self.answers.pop(0)
        if isinstance(answer, dict):
            answer = (answer["rc"], answer["stdout"], answer["stderr"])
        rc, out, err = answer
        return CommandResult("", rc, out.encode("utf-8", "surrogatepass"), err.encode(), 1.0)


def ended(exitstatus: str) -> tuple[int, str, str]:
    return 0, json.dumps({"status": "stopped", "exitstatus": exitstatus}) + "\n", ""


def log(*lines: str) -> tuple[int, str, str]:
    return 0, json.dumps([{"n": n, "t": line} for n, line in enumerate(lines, 1)]) + "\n", ""
