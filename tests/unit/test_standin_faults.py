"""Fault rules of the stand-ins: matches, effects and counts."""

from __future__ import annotations

import fcntl
import json
import threading
import time
from typing import Any

import pytest
from standin_support import Node, _node  # noqa: F401 (a fixture)

from pytest_nestedpve.lab.node.api import access, faults, tree
from pytest_nestedpve.lab.node.api.errors import NoReply, PveFailure

CALLER = access.Caller(sync=False)
VM = "/nodes/father/qemu/100"


def rule(do: str, on: dict[str, Any], **values: Any) -> None:
    faults.add(faults.parse({"on": on, "do": do, **values}))


def call(verb: str, address: str, **params: str) -> Any:
    return tree.call(verb, address, params, CALLER)


@pytest.fixture
def vm(node: Node) -> Node:
    node.ok("qm", "create", "100", "--name", "a")
    return node


def test_a_call_fails_with_the_text_of_the_rule_for_the_given_number_of_times(vm: Node) -> None:
    rule("fail", {"method": "DELETE", "path": "/nodes/*/qemu/*"}, text="the storage burns", times=2)
    for _ in range(2):
        answer = vm.run("pvesh", "delete", VM)
        assert (answer.rc, answer.stderr) == (255, "the storage burns\n")
    assert vm.run("pvesh", "delete", VM).rc == 0
    assert faults.rules() == []
    assert not faults.file().exists()


@pytest.mark.usefixtures("vm")
def test_an_http_status_at_the_beginning_of_the_text_is_the_status() -> None:
    rule("fail", {"path": "/version"}, text="403 Permission check failed")
    with pytest.raises(PveFailure) as failure:
        call("GET", "/version")
    assert (failure.value.status, failure.value.text) == (403, "Permission check failed")
    assert failure.value.for_cli() == "403 Permission check failed\n"


@pytest.mark.usefixtures("vm")
@pytest.mark.parametrize(
    ("on", "fits"),
    [
        ({"method": "GET", "path": "/nodes/*/qemu/*"}, False),
        ({"method": "GET", "path": "/nodes/*/qemu/**"}, True),
        ({"method": "PUT", "path": "**"}, False),
        ({"vmid": 100}, True),
        ({"vmid": 101}, False),
        ({"path": "/nodes/father/qemu/100/config"}, True),
        ({"path": "/nodes/father/qemu/1.0/config"}, False),
    ],
    ids=str,
)
def test_a_rule_applies_to_calls_that_match_method_path_and_vm(on: dict[str, Any], fits: bool) -> None:
    rule("fail", on, text="by rule")
    try:
        call("GET", f"{VM}/config")
        failed = False
    except PveFailure as e:
        failed = e.text == "by rule"
    assert failed == fits


@pytest.mark.usefixtures("vm")
def test_a_delayed_call_takes_longer_and_works(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float | None] = []
    monkeypatch.setattr(threading.Event, "wait", lambda _self, timeout=None: waits.append(timeout))
    rule("delay", {"path": "/version"}, seconds=7)
    assert call("GET", "/version")["release"] == "9.2"
    assert waits == [7.0]


@pytest.mark.usefixtures("vm")
def test_a_call_with_a_dropped_reply_is_executed() -> None:
    rule("drop", {"method": "PUT", "vmid": 100})
    with pytest.raises(NoReply):
        call("PUT", f"{VM}/config", description="done")
    assert call("GET", f"{VM}/config")["description"] == "done"


def test_a_command_whose_reply_is_dropped_ends_without_an_exit_code(
    vm: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr("os.kill", lambda _pid, number: ends.append(number))
    rule("drop", {"path": "/version"})
    with pytest.raises(NoReply):
        vm.run("pvesh", "get", "/version")
    assert ends[-1] == 9


def test_a_task_fails_with_the_text_of_the_rule(vm: Node) -> None:
    rule("fail", {"task": "qmdestroy", "vmid": 100}, text="out of room")
    answer = vm.run("qm", "destroy", "100")
    assert (answer.rc, answer.stderr.strip()) == (255, "out of room")
    (task, *_) = json.loads(vm.ok("pvesh", "get", "/nodes/father/tasks", "--output-format", "json"))
    assert (task["type"], task["status"]) == ("qmdestroy", "out of room")
    assert vm.run("qm", "config", "100").rc == 0


@pytest.mark.usefixtures("vm")
def test_a_rule_for_a_task_does_not_apply_to_calls() -> None:
    rule("fail", {"task": "qm*", "vmid": 100}, text="by rule")
    assert call("GET", f"{VM}/config")["name"] == "a"


@pytest.mark.usefixtures("vm")
def test_a_delayed_task_is_listed_as_running() -> None:
    rule("delay", {"task": "qmstart"}, seconds=30)
    started = call("POST", f"{VM}/status/start")
    path = f"/nodes/father/tasks/{started.upid}"
    assert call("GET", f"{path}/status")["status"] == "running"
    call("DELETE", path)
    assert call("GET", f"{path}/status")["exitstatus"] == "received interrupt"
    assert call("GET", f"{VM}/status/current")["status"] == "stopped"


@pytest.mark.usefixtures("vm")
def test_a_task_that_hangs_runs_until_it_is_stopped() -> None:
    rule("hang", {"task": "qmstart"})
    path = f"/nodes/father/tasks/{call('POST', f'{VM}/status/start').upid}"
    assert call("GET", f"{path}/status")["status"] == "running"
    call("DELETE", path)
    assert call("GET", f"{path}/status")["exitstatus"] == "received interrupt"


@pytest.mark.usefixtures("vm")
def test_a_task_with_a_dropped_reply_is_started() -> None:
    rule("drop", {"task": "qmstop"})
    with pytest.raises(NoReply):
        tree.call("POST", f"{VM}/status/stop", {}, access.ROOT)
    assert call("GET", "/nodes/father/tasks")[0]["type"] == "qmstop"


def test_the_lock_file_of_a_vm_is_held_for_the_seconds_of_the_rule(vm: Node) -> None:
    rule("lock", {"method": "GET", "vmid": 100}, seconds=0.5)
    call("GET", f"{VM}/config")
    with vm.file("/var/lock/qemu-server/lock-100.conf").open() as file:
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begin = time.monotonic()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert time.monotonic() - begin < 5


def test_a_volume_that_cannot_be_removed_is_a_warning_of_the_destroy(vm: Node) -> None:
    vm.ok("qm", "set", "100", "--scsi0", "local:1,format=qcow2")
    rule("fail", {"volume": "local:100/*"}, text="unlink failed")
    vm.run("qm", "destroy", "100")
    (task, *_) = call("GET", "/nodes/father/tasks")
    assert task["status"] == "WARNINGS: 1"
    assert vm.file("/var/lib/vz/images/100/vm-100-disk-0.qcow2").exists()
    log = call("GET", f"/nodes/father/tasks/{task['upid']}/log")
    assert [line["t"] for line in log if "check manually" in line["t"]]


def test_a_volume_is_left_over_without_a_warning(vm: Node) -> None:
    vm.ok("qm", "set", "100", "--scsi0", "local:1,format=qcow2")
    rule("drop", {"volume": "local:100/*", "task": "qmdestroy"})
    vm.ok("qm", "destroy", "100")
    assert call("GET", "/nodes/father/tasks")[0]["status"] == "OK"
    assert vm.file("/var/lib/vz/images/100/vm-100-disk-0.qcow2").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"on": {"path": "/x"}, "do": "explode"}, "do: expected one of fail"),
        ({"do": "hang"}, "found none"),
        ({"on": {"path": "/x"}, "do": "fail"}, "text: expected"),
        ({"on": {"path": "/x"}, "do": "delay"}, "seconds: expected more than 0"),
        ({"on": {"path": "/x", "task": "qmstart"}, "do": "hang"}, "several of them"),
        ({"on": {"file": "/x"}, "do": "hang"}, "found file"),
        ({"on": {"vmid": "x"}, "do": "hang"}, "expected numbers"),
        ({"on": {"path": "/x"}, "do": "hang", "times": 0}, "times: expected 1"),
        ({"on": {"volume": "local:1"}, "do": "hang"}, "expected fail or drop for a volume"),
        ({"on": [], "do": "hang"}, "expected an object"),
    ],
)
def test_an_invalid_rule_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        faults.parse(given)


@pytest.mark.usefixtures("node")
def test_the_module_prints_the_remaining_rules(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"on": {"method": "GET", "path": "/version"}, "do": "fail", "text": "no", "times": 3}
    assert faults.main(["add", json.dumps(given)]) == 0
    assert json.loads(capsys.readouterr().out) == [given]
    assert faults.main(["clear"]) == 0
    assert json.loads(capsys.readouterr().out) == []
