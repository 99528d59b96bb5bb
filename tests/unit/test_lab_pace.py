"""Delays of a lab: the values of `nestedpve-lab set` and their effect on a node."""

from __future__ import annotations

import errno
import json
import threading
import time
from pathlib import Path

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

from pytest_nestedpve.lab import cli, speed
from pytest_nestedpve.lab.names import LabUsage
from pytest_nestedpve.lab.node.machine import supervisor


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """The requested waits of this process, which return at once."""
    timeouts: list[float | None] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _self, timeout=None: timeouts.append(timeout))
    return timeouts


def slow(node: Node, **seconds: float) -> None:
    node.file("/etc").mkdir(exist_ok=True)
    node.file("/etc/nestedpve-lab.json").write_text(json.dumps(seconds))


def test_seconds_are_read_by_key() -> None:
    assert speed.parse(["cli_delay_s=1.3", "stop_s=0"]) == {"cli_delay_s": 1.3, "stop_s": 0.0}


@pytest.mark.parametrize(
    "pair", ["cli_delay=1", "stop_s", "stop_s=", "stop_s=soon", "stop_s=-1", "stop_s=nan", "stop_s=601"]
)
def test_an_invalid_key_or_value_is_refused_before_a_call_of_the_lab(
    pair: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(LabUsage, match="expected"):
        speed.parse(["destroy_s=1", pair])
    assert cli.main(["set", "no-such-lab", pair]) == 4
    assert pair.partition("=")[0] in capsys.readouterr().err


def test_pvesh_and_qm_wait_for_the_configured_delay_and_pveum_for_a_part_of_it(
    node: Node, waits: list[float | None]
) -> None:
    slow(node, cli_delay_s=1.5)
    for words in (["pvesh", "get", "/version"], ["qm", "list"], ["pveum", "role", "list"]):
        assert node.run(*words).rc == 0
    assert waits == [1.5, 1.5, pytest.approx(0.6)]


def test_a_stop_and_a_destroy_wait_for_the_configured_delays(node: Node) -> None:
    node.ok("qm", "create", "100")
    node.ok("qm", "start", "100")
    slow(node, stop_s=0.4, destroy_s=0.6)
    durations = []
    for words in (["qm", "stop", "100"], ["qm", "destroy", "100"]):
        before = time.monotonic()
        assert node.run(*words).rc == 0
        durations.append(time.monotonic() - before)
    assert durations[0] >= 0.4
    assert durations[1] >= 0.6


def test_starts_of_commands_are_logged_without_their_options(node: Node) -> None:
    node.file("/var/log").mkdir(parents=True, exist_ok=True)
    node.run("qm", "set", "100", "--cipassword", "hunter2")
    node.run("pvesh", "create", "/access/password", "--password", "hunter2")
    node.run("pveum", "user")
    log = node.file("/var/log/nestedpve-lab-commands.log").read_text()
    assert [line.split(" ", 1)[1] for line in log.splitlines()] == [
        "qm set 100",
        "pvesh create /access/password",
        "pveum user",
    ]


def test_a_nested_node_shares_the_delays_without_writing_the_file(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(node, stop_s=1)

    def refused(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "touch", refused)
    assert [bind.target for bind in supervisor._delays_bind()] == ["/etc/nestedpve-lab.json"]
