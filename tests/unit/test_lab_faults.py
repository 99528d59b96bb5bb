"""`nestedpve-lab fault`: how a rule is given, and that a mistake in it is found before a lab is asked."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from pytest_nestedpve.lab import cli, fault_rules


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a lab was asked; it has one rule."""
    found: list[tuple[Any, ...]] = []

    def output_on(*call: Any) -> str:
        found.append(call)
        return json.dumps([{"on": {"vmid": 100}, "do": "hang", "times": 1}])

    monkeypatch.setattr(fault_rules, "output_on", output_on)
    return found


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
def test_a_mistake_is_found_before_a_lab_is_asked(
    words: list[str], message: str, sent: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["fault", "mine", "add", *words]) == 4
    assert message in capsys.readouterr().err
    assert sent == []
