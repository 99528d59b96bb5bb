"""`nestedpve-lab fault`: rules by options or JSON, checked before a call of the lab."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from pytest_nestedpve.lab import cli, fault_rules


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The calls of a lab, which has one rule."""
    calls: list[tuple[Any, ...]] = []

    def output_on(*call: Any) -> str:
        calls.append(call)
        return json.dumps([{"on": {"vmid": 100}, "do": "hang", "times": 1}])

    monkeypatch.setattr(fault_rules, "output_on", output_on)
    return calls


def test_options_are_a_rule(sent: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--method", "DELETE", "--path", "/nodes/*/qemu/*", "--do", "fail", "--text", "it's busy"]
    assert cli.main(["fault", "mine", "add", *words, "--times", "2"]) == 0
    ((node, lab, script),) = sent
    assert (node, lab) == ("father", "mine")
    rule = {
        "on": {"method": "DELETE", "path": "/nodes/*/qemu/*"},
        "do": "fail",
        "text": "it's busy",
        "times": 2,
    }
    assert shlex.split(script)[-2] == "add"
    assert json.loads(shlex.split(script)[-1]) == rule
    assert json.loads(capsys.readouterr().out) == {"on": {"vmid": 100}, "do": "hang", "times": 1}


def test_json_is_a_rule(sent: list[tuple[Any, ...]]) -> None:
    assert cli.main(["fault", "mine", "add", '{"on": {"task": "qmstart"}, "do": "delay", "seconds": 3}']) == 0
    assert '"seconds": 3.0' in sent[0][2]


@pytest.mark.parametrize("action", ["list", "clear"])
def test_list_and_clear_need_no_rule(sent: list[tuple[Any, ...]], action: str) -> None:
    assert cli.main(["fault", "mine", action]) == 0
    ((_, lab, script),) = sent
    assert (lab, script.split()[-2:]) == ("mine", ["nestedpve_node.api.faults", action])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "do: expected one of"),
        (["--do", "hang"], "expected a method, path, task, volume or vmid"),
        (["--vmid", "100", "--do", "delay"], "seconds: expected more than 0"),
        (["{"], "expected an object as JSON"),
        (["[]"], "fault: "),
        (['{"do": "hang"}', "--vmid", "100"], "found both"),
        (["--vmid", "100", "--do", "explode"], "invalid choice"),
    ],
)
def test_a_wrong_rule_is_refused_before_a_call_of_the_lab(
    words: list[str], message: str, sent: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fault", "mine", "add", *words]) == 4
    assert message in capsys.readouterr().err
    assert sent == []
