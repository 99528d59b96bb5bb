"""The stand-ins answer with the recorded output and exit codes."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

DATA = Path(__file__).parents[1] / "data" / "standin-recorded.jsonl"


def normalized(text: str) -> str:
    """The text with placeholders for values that differ between runs."""
    text = re.sub(r"UPID:father(:[0-9A-F]{8}){3}", "UPID:father:PID:START:TIME", text)
    text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|REDACTED-x+", "UUID", text)
    return re.sub(r"ctime=\d+", "ctime=TIME", text)


def test_a_sequence_of_commands_is_answered_as_recorded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.file("/var/lib/vz/images").mkdir()
    differences = []
    for line in DATA.read_text().splitlines()[1:]:
        recorded = json.loads(line)
        if "do" in recorded:  # prepares the state of the next recording
            assert node.run(*shlex.split(recorded["do"])).rc == 0
            continue
        words = shlex.split(recorded["cmd"])
        with monkeypatch.context() as patch:
            while "=" in words[0]:
                name, _, value = words.pop(0).partition("=")
                patch.setenv(name, value)
            answer = node.run(*words)
        expected = recorded["rc"], normalized(recorded["stdout"]), normalized(recorded["stderr"])
        actual = answer.rc, normalized(answer.stdout), normalized(answer.stderr)
        if actual != expected:
            differences.append(f"{recorded['id']} {recorded['cmd']}\n  want {expected}\n  got  {actual}")
    assert not differences, "\n".join(differences)
