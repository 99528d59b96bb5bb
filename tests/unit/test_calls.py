"""The record of calls: one entry per call, whatever Api and transport it uses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from logged_calls import Calls
from sshd import Sshd

from pytest_nestedpve.pve import calls
from pytest_nestedpve.pve.api import Verbs
from pytest_nestedpve.pve.calls import ApiCall, Call, record_nested
from pytest_nestedpve.pve.errors import AlreadyExists, ApiError, CommandTimeout
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.ssh.connection import SshConnection
from pytest_nestedpve.run.audit_log import AuditLog

UPID = "UPID:father:00000001:00000001:00000001:qmcreate:100:root@pam:"


class Scripted(Verbs):
    """An Api without a log of its own; it returns or raises `result`."""

    def __init__(self, result: Any = None) -> None:
        self.result = result

    def within(self, pool: Callable[[], str]) -> Scripted:
        return Scripted(pool())

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        del verb, path, params
        if isinstance(self.result, BaseException):
            raise self.result
        return self.result


def logged(result: Any) -> tuple[PveHost, Calls]:
    log = Calls()
    ssh: Any = None
    return PveHost("father", ssh, Scripted(result), "father").logged(log), log


def test_an_api_call_by_pvesh_has_one_entry_and_a_command_has_another(server: Sshd) -> None:
    log = Calls()
    with SshConnection(server.target(), log=log) as ssh:
        host = PveHost("father", ssh, PveshApi(ssh)).logged(log)
        with pytest.raises(ApiError):
            host.api.put("/nodes/father/qemu/100/config", cipassword="s3cret")
        assert [call.cmd for call in log.calls] == ["put /nodes/father/qemu/100/config cipassword"]
        host.run(["pvesh", "get", "/version"])
        assert [(call.transport, call.cmd) for call in log.calls[1:]] == [("ssh", "pvesh get /version")]
    assert "s3cret" not in repr(log.calls)


def test_a_call_is_recorded_with_the_names_of_its_parameters_and_its_task() -> None:
    host, log = logged(UPID)
    assert host.api.post("/nodes/father/qemu", vmid=100, name="x") == UPID
    (call,) = log.calls
    assert (call.transport, call.cmd, call.rc, call.error) == (
        "api",
        "post /nodes/father/qemu name vmid",
        0,
        None,
    )
    assert log.tasks == [(UPID, "post /nodes/father/qemu")]


@pytest.mark.parametrize(
    ("verb", "path", "error", "rc", "cut_off"),
    [
        ("post", "/nodes/father/qemu", CommandTimeout("no answer"), 255, True),
        ("post", "/nodes/father/qemu/100/clone", KeyboardInterrupt(), 255, True),
        ("post", "/pools", CommandTimeout("no answer"), 255, True),
        ("post", "/pools", AlreadyExists("pool exists", rc=13), 13, False),
        ("put", "/pools", CommandTimeout("no answer"), 255, False),
        ("post", "/nodes/father/qemu/100/status/start", CommandTimeout("no answer"), 255, False),
    ],
)
def test_a_failed_call_is_recorded_with_its_reason_and_whether_something_may_be_created(
    verb: str, path: str, error: BaseException, rc: int, cut_off: bool
) -> None:
    host, log = logged(error)
    with pytest.raises(type(error)):
        getattr(host.api, verb)(path)
    (call,) = log.calls
    assert (call.rc, call.cut_off) == (rc, cut_off)
    assert call.error == (str(error) or "KeyboardInterrupt")


def test_the_time_of_inner_calls_is_left_out_of_the_outer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 1.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.setattr(calls, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    log = Calls()
    outer = ApiCall(log, "https:act", "post", "/a", ())
    inner = ApiCall(log, "https:see", "get", "/b", ())
    outer.send(lambda: inner.send(lambda: record_nested(log, Call("ssh", "pveum", 0, 500.0))))
    ApiCall(log, "https:see", "get", "/c", ()).send(lambda: None)
    assert [(call.cmd, call.ms) for call in log.calls] == [
        ("pveum", 500.0),
        ("get /b", 1500.0),
        ("post /a", 2000.0),
        ("get /c", 1000.0),
    ]


def test_a_foreign_api_keeps_its_restriction_to_a_pool() -> None:
    host, log = logged(None)
    assert host.within(lambda: "npve-1").api.get("/version") == "npve-1"
    assert len(log.calls) == 1


def test_lines_of_calls_in_the_audit_log(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl", "a1b2c3d4e5f6")
    audit.write("phase_start", phase="start_vm")
    audit.calls().record(Call("ssh", "true", 0, 1.5))
    assert audit.cut_off is None
    audit.calls("father").hide("s3cret")
    audit.calls("father").record(Call("https:act", "post /pools", 255, 2.0, error="s3cret", cut_off=True))
    assert audit.cut_off is not None
    audit.calls("father").record_task(UPID, "post /nodes/father/qemu")
    audit.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()][1:]
    for line in lines:
        assert line.pop("ts")
        assert (line.pop("run"), line.pop("phase")) == ("a1b2c3d4e5f6", "start_vm")
    assert lines == [
        {"event": "call", "transport": "ssh", "cmd": "true", "rc": 0, "ms": 1.5},
        {
            "event": "call",
            "host": "father",
            "transport": "https:act",
            "cmd": "post /pools",
            "rc": 255,
            "error": "********",
            "ms": 2.0,
        },
        {"event": "task", "upid": UPID, "host": "father", "cmd": "post /nodes/father/qemu"},
    ]
