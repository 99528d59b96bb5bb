"""HTTPS with tokens and pvesh as root: the transport of request call, and the behaviour when one fails."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from https_host import HttpsHost, create_certificate, serve_https_host
from logged_calls import Calls

from pytest_nestedpve.pve import tokens
from pytest_nestedpve.pve.api import call_limit
from pytest_nestedpve.pve.errors import (
    ApiError,
    BadParameter,
    CommandTimeout,
    GuestNotFound,
    NodeUnreachable,
    NotFound,
    PermissionDenied,
    UnreadableAnswer,
)
from pytest_nestedpve.pve.https import ReplyLost, Unauthorized
from pytest_nestedpve.pve.identity import Grant, Identity, grants, identity_of, storages
from pytest_nestedpve.pve.tokens import remove_grants, run_tokens
from pytest_nestedpve.pve.transports import HostApi
from pytest_nestedpve.run.audit_log import AuditLog

POOL = "npve-a1b2c3d4e5f6"
VM = "/nodes/father/qemu/99901"
# Of a cluster member without quorum [noquorum-011], and while another process holds the lock.
NO_QUORUM = "generating token failed: cfs-lock 'file-user_cfg' error: no quorum!"
LOCKED = "generating token failed: cfs-lock 'file-user_cfg' error: got lock request timeout"
GONE = "Configuration file 'nodes/father/qemu-server/99901.conf' does not exist"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[HttpsHost]:
    with serve_https_host(tmp_path) as host:
        host.pools.add(POOL)
        yield host


@pytest.fixture
def api(host: HttpsHost) -> HostApi:
    return HostApi(host).within(lambda: POOL)


def answer_with(status: int, reason: str, answer: Any, *, only: str = "", times: int = 1) -> Any:
    """A handler that answers the first `times` requests whose path contains `only`."""
    remaining = [times]

    def reply(handler: Any) -> bool:
        if only not in handler.path or not remaining[0]:
            return False
        remaining[0] -= 1
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_answer(status, reason, body)
        return True

    return reply


# -- the transport of a call -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "params", "pool", "expected"),
    [
        ("get", "/cluster/resources", {}, POOL, Identity.SEE),
        ("get", f"{VM}/config", {}, POOL, Identity.SEE),
        ("post", "/pools", {"poolid": POOL}, POOL, Identity.SEE),
        ("put", "/pools", {"poolid": POOL, "comment": "x"}, POOL, Identity.ACT),
        ("put", "/pools", {"poolid": POOL, "vms": 99901}, POOL, Identity.SEE),
        ("put", "/pools", {"poolid": "npve-000000000000", "comment": "x"}, POOL, Identity.SEE),
        ("delete", "/pools", {"poolid": POOL}, POOL, Identity.SEE),
        ("post", "/nodes/father/qemu", {"vmid": 99901}, POOL, Identity.ACT),
        ("delete", VM, {}, POOL, Identity.ACT),
        ("delete", VM, {}, None, Identity.ROOT),
        ("delete", VM, {"skiplock": True}, POOL, Identity.ROOT),
        ("post", f"{VM}/status/stop", {}, POOL, Identity.ACT),
        ("post", f"{VM}/agent/exec", {"command": ["id"]}, POOL, Identity.ACT),
        ("post", f"{VM}/monitor", {"command": "info"}, POOL, Identity.ROOT),
        ("post", f"{VM}/config", {"args": "-device x"}, POOL, Identity.ROOT),
        ("put", f"{VM}/config", {"delete": "lock"}, POOL, Identity.ROOT),
        ("put", f"{VM}/config", {"delete": "description"}, POOL, Identity.ACT),
        ("post", f"{VM}/config", {"scsi0": "local:0,import-from=/tmp/x.raw"}, POOL, Identity.ROOT),
        ("post", f"{VM}/config", {"scsi0": "local:0,import-from=local:import/x.raw"}, POOL, Identity.ACT),
        ("post", f"{VM}/config", {"serial0": "socket"}, POOL, Identity.ACT),
        ("post", f"{VM}/config", {"serial0": "/dev/ttyS0"}, POOL, Identity.ROOT),
        ("delete", "/nodes/father/storage/local/content/local:99901/x.raw", {}, POOL, Identity.ROOT),
        ("delete", "/nodes/father/tasks/UPID:x", {}, POOL, Identity.ROOT),
        ("delete", "/nodes/father/lxc/100", {}, POOL, Identity.ACT),
        ("post", "/nodes/father/storage/local/download-url", {"url": "x"}, POOL, Identity.SEE),
        ("put", "/storage/local", {"content": "images"}, POOL, Identity.ROOT),
        ("post", "/nodes/father/status", {"command": "reboot"}, POOL, Identity.ROOT),
    ],
)
def test_changes_of_guests_are_sent_with_the_token_of_the_pool_or_by_root(
    method: str, path: str, params: dict[str, Any], pool: str | None, expected: Identity
) -> None:
    assert identity_of(method, path, params, pool=pool) is expected


def test_the_page_lists_everything_that_the_session_token_may_change() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transports.md").read_text(encoding="utf-8")
    paragraph = next(line for line in page.splitlines() if line.startswith("- **The session token.**"))
    outer, _, nested = paragraph.partition("A nested PVE")
    for name, path in (
        ("pools", "/pools"),
        ("tokens", "/access/users/root@pam/token/x"),
        ("access rights", "/access/acl"),
        ("download", "/nodes/father/storage/local/download-url"),
        ("everything", VM),
    ):
        free = name == "everything"
        assert identity_of("post", path, {}, pool=None, free=free) is Identity.SEE
        assert name in (nested if free else outer)


def test_the_token_of_a_pool_gets_grants_for_the_storages_and_bridges_of_a_call_only() -> None:
    params = {
        "scsi0": "fast:0,import-from=local:import/debian.qcow2,format=qcow2",
        "ide2": "slow:cloudinit",
        "cicustom": "vendor=snips:snippets/npve.yaml",
        "net0": "virtio,bridge=vmbr1,firewall=0",
        "smbios1": "uuid=0:1",
        "description": "/vms/100:x",
    }
    assert set(grants(f"{VM}/config", params)) == {
        Grant("/storage/fast", "PVEDatastoreUser"),
        Grant("/storage/local", "PVEDatastoreUser"),
        Grant("/storage/slow", "PVEDatastoreUser"),
        Grant("/storage/snips", "PVEDatastoreUser"),
        Grant("/sdn/zones/localnetwork/vmbr1", "PVESDNUser"),
    }
    assert grants(VM, {}) == []
    assert grants("/nodes/father/qemu/9000/clone", {"newid": 99901, "storage": "fast"}) == [
        Grant("/storage/fast", "PVEDatastoreUser"),
        Grant("/vms/9000", "PVETemplateUser"),
    ]
    config = {"scsi0": "lvm:base-9000-disk-0,size=4G", "ide2": "none,media=cdrom", "net0": "virtio=AA:BB"}
    assert storages(config) == {"lvm"}


def test_reads_use_https_without_a_command(host: HttpsHost, api: HostApi) -> None:
    for _ in range(5):
        assert api.get("/version") == {"by": "https"}
    assert host.pvesh() == []
    assert sum("pveum" in command for command in host.commands) == 1
    assert host.connections == 2  # the first one before the token existed
    assert api.transport.startswith("HTTPS")


def test_the_reading_token_never_changes_a_guest(host: HttpsHost, api: HostApi) -> None:
    api.get(f"{VM}/config")
    api.post("/nodes/father/qemu", vmid=99901, pool=POOL)
    api.delete(VM)
    senders = {(request.method, request.token.startswith("npve-see-")) for request in host.guest_calls()}
    assert senders == {("GET", True), ("POST", False), ("DELETE", False)}
    acting = {request.token for request in host.guest_calls() if request.method != "GET"}
    assert len(acting) == 1
    assert acting.pop().startswith(f"{POOL}-")


def test_calls_that_only_root_may_make_use_pvesh(host: HttpsHost, api: HostApi) -> None:
    assert api.delete(VM, skiplock=True) == {"by": "pvesh"}
    assert host.pvesh() == [f"delete {VM} --skiplock 1 --output-format json"]
    assert host.guest_calls() == []


def test_without_a_pool_guests_are_changed_by_root(host: HttpsHost) -> None:
    assert HostApi(host).delete(VM) == {"by": "pvesh"}
    assert host.guest_calls() == []


def test_a_free_api_changes_guests_without_a_pool(host: HttpsHost, api: HostApi) -> None:
    assert api.free().post("/nodes/father/qemu", vmid=500) == {"by": "https"}
    assert api.free().delete("/nodes/father/storage/local/content/local:500/x.raw") == {"by": "https"}
    assert {request.token.startswith("npve-see-") for request in host.guest_calls()} == {True}
    assert host.pvesh() == []
    assert api.free().put(f"{VM}/config", args="-device x") == {"by": "pvesh"}


def test_an_unfenced_api_changes_guests_as_root(host: HttpsHost, api: HostApi) -> None:
    assert api.unfenced().put(f"{VM}/config", tags="x") == {"by": "pvesh"}
    assert host.guest_calls() == []


def test_parameters_arrive_unchanged(host: HttpsHost, api: HostApi) -> None:
    value = "a b&c=d\nü%41+\"';"
    api.post(f"{VM}/agent/exec", command=["sh", "-c", value], flag=True, off=False, left_out=None)
    (request,) = host.guest_calls()
    assert request.params == {"command": ["sh", "-c", value], "flag": ["1"], "off": ["0"]}
    api.get("/nodes/father/tasks", vmid=99901, source="active")
    assert host.requests[-1].params == {"vmid": ["99901"], "source": ["active"]}


@pytest.mark.parametrize("path", ["version", "/a/../b", "/a\0"])
def test_an_invalid_path_is_refused_before_a_request(host: HttpsHost, api: HostApi, path: str) -> None:
    with pytest.raises(BadParameter):
        api.get(path)
    assert [request for request in host.requests if not request.path.startswith("/access")] == []


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "reason", "answer", "kind", "text"),
    [
        # Messages and statuses are from recordings of PVE 9.2 over HTTPS.
        (403, "Permission check failed (/vms/99901, VM.Audit)",
         {"data": None, "message": "Permission check failed (/vms/99901, VM.Audit)\n"},
         PermissionDenied, "403 Permission check failed (/vms/99901, VM.Audit)"),
        (500, GONE, {"data": None, "message": f"{GONE}\n"}, GuestNotFound, GONE),
        (400, "Parameter verification failed.",
         {"data": None, "message": "Parameter verification failed.\n",
          "errors": {"vmid": "invalid format - value does not look like a valid VM ID\n"}},
         BadParameter, "400 Parameter verification failed.\nvmid: invalid format"),
        (596, "Broken pipe", b"", NodeUnreachable, "596 Broken pipe"),
        (200, "OK", b"<html>not the API</html>", UnreadableAnswer, "expected an object with `data`"),
        (200, "OK", b'{"data": ', UnreadableAnswer, "expected an object with `data`"),
        (502, "Bad Gateway", b"<html>a proxy in between</html>", ApiError, "502 Bad Gateway"),
    ],
)  # fmt: skip
def test_errors_are_the_same_as_with_pvesh(
    host: HttpsHost, api: HostApi, status: int, reason: str, answer: Any, kind: type[ApiError], text: str
) -> None:
    host.answers.append(answer_with(status, reason, answer, only="/config", times=2))
    with pytest.raises(kind) as caught:
        api.get(f"{VM}/config")
    assert type(caught.value) is kind
    assert text in caught.value.text
    assert host.pvesh() == []


def test_a_refused_change_is_never_repeated_as_root(host: HttpsHost, api: HostApi) -> None:
    words = "Permission check failed (/vms/99901, VM.Allocate)"
    host.answers.append(
        answer_with(403, words, {"data": None, "message": words + "\n"}, only="/qemu/", times=9)
    )
    with pytest.raises(PermissionDenied, match=r"VM\.Allocate"):
        api.delete(VM)
    assert [request.method for request in host.guest_calls()] == ["DELETE"]
    assert host.pvesh() == []


def test_a_bridge_of_another_zone_is_granted_if_the_call_uses_it(host: HttpsHost, api: HostApi) -> None:
    words = "Permission check failed (/sdn/zones/lab/vnet7, SDN.Use)"
    host.answers.append(answer_with(403, words, {"data": None, "message": words + "\n"}, only="/config"))
    assert api.post(f"{VM}/config", net0="virtio,bridge=vnet7") == {"by": "https"}
    granted = [request.params["path"][0] for request in host.requests if request.path == "/access/acl"]
    assert granted[-1] == "/sdn/zones/lab/vnet7"
    host.answers.append(answer_with(403, words, {"data": None, "message": words + "\n"}, only="/config"))
    with pytest.raises(PermissionDenied):
        api.post(f"{VM}/config", net0="virtio,bridge=vmbr0")


# -- failures ----------------------------------------------------------------------------------------


def test_a_deleted_token_is_replaced_once(host: HttpsHost, api: HostApi) -> None:
    api.get("/version")
    host.tokens.clear()
    assert api.get("/version") == {"by": "https"}
    assert sum("pveum" in command for command in host.commands) == 2


def test_an_old_token_creates_its_successor_and_is_deleted(
    host: HttpsHost, api: HostApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.get("/version")
    (old,) = host.tokens
    monkeypatch.setattr(tokens, "SEE_SECONDS", 0)
    assert api.get("/version") == {"by": "https"}
    monkeypatch.undo()
    assert api.get("/version") == {"by": "https"}
    assert old not in host.tokens
    assert sum("pveum" in command for command in host.commands) == 1
    assert host.pvesh() == []


@pytest.mark.parametrize("error", [NO_QUORUM, LOCKED])
def test_a_token_that_cannot_be_replaced_is_used_until_it_expires_then_pvesh(
    host: HttpsHost, api: HostApi, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    api.get("/version")
    monkeypatch.setattr(tokens, "SEE_SECONDS", 0)
    monkeypatch.setattr("pytest_nestedpve.pve.api.LOCK_LIMIT", 0)
    host.pveum_error = error

    def refuse(handler: Any) -> bool:
        creates = handler.command == "POST" and "/token/" in handler.path
        return creates and not handler.send_answer(500, error, b"")

    host.answers.append(refuse)
    assert [api.get("/version") for _ in range(3)] == [{"by": "https"}] * 3
    assert [request.method for request in host.requests].count(
        "POST"
    ) == 1  # not with request call: PVE waits 10 s
    assert sum("pveum" in command for command in host.commands) == 1
    host.tokens.clear()
    assert api.get("/version") == {"by": "pvesh"}
    assert error in api.transport


def test_the_token_of_a_pool_is_replaced_only_while_the_pool_exists(host: HttpsHost, api: HostApi) -> None:
    api.post(f"{VM}/status/start")
    host.tokens = {name: value for name, value in host.tokens.items() if name.startswith("npve-see")}
    assert api.post(f"{VM}/status/stop") == {"by": "https"}
    host.tokens = {name: value for name, value in host.tokens.items() if name.startswith("npve-see")}
    host.pools.clear()
    with pytest.raises(NotFound, match="does not exist"):
        api.post(f"{VM}/status/start")
    assert host.pvesh() == []


def test_the_grants_of_a_replaced_token_are_deleted_before_it(host: HttpsHost, api: HostApi) -> None:
    api.post(f"{VM}/status/start")
    refused = next(name for name in host.tokens if name.startswith(POOL))
    host.rights = rights_of(refused)
    host.answers.append(answer_with(401, "Authentication failed!", b"", only="/status/stop"))
    assert api.post(f"{VM}/status/stop") == {"by": "https"}
    assert refused not in host.tokens
    assert_rights_first(host)


def test_a_token_that_is_refused_twice_is_an_error(host: HttpsHost, api: HostApi) -> None:
    host.answers.append(answer_with(401, "Authentication failed!", b"", only="/version", times=9))
    with pytest.raises(Unauthorized, match="401 Authentication failed!"):
        api.get("/version")
    assert [request.path for request in host.requests].count("/version") == 2


def test_a_new_certificate_is_accepted_if_root_reads_the_same(host: HttpsHost, api: HostApi) -> None:
    api.get("/version")
    pem = create_certificate()
    host.set_certificate(pem)
    host.read_pem = pem[0]
    api.shared.tokens.see_client().close()
    assert api.get("/version") == {"by": "https"}
    assert sum("pveum" in command for command in host.commands) == 1


def test_no_token_is_sent_to_another_certificate_than_root_reads(host: HttpsHost, api: HostApi) -> None:
    host.set_certificate(create_certificate())
    assert api.get("/version") == {"by": "pvesh"}
    assert host.requests == []
    assert host.tokens_created == 0
    assert "not the one that root reads" in api.transport


@pytest.mark.parametrize(
    ("pem", "reason"),
    [
        (create_certificate(days=-1), "expired"),
        (create_certificate(names=()), "no subject alternative name"),
        (("no certificate", ""), "cannot be read"),
    ],
)
def test_with_a_certificate_that_cannot_be_checked_pvesh_is_used(
    host: HttpsHost, api: HostApi, pem: tuple[str, str], reason: str
) -> None:
    if pem[1]:
        host.set_certificate(pem)
    host.read_pem = pem[0]
    assert api.get("/version") == {"by": "pvesh"}
    assert reason in api.transport
    assert host.requests == []
    assert host.tokens_created == 0


def test_a_wildcard_certificate_is_checked(tmp_path: Path) -> None:
    with serve_https_host(tmp_path) as host:
        pem = create_certificate(names=("*.example.org",))
        host.set_certificate(pem)
        host.read_pem = pem[0]
        assert HostApi(host).get("/version") == {"by": "https"}


def test_pvesh_is_used_while_the_proxy_is_down(
    host: HttpsHost, api: HostApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.listens = False
    assert api.get("/version") == {"by": "pvesh"}
    assert "port 8006" in api.transport
    assert host.tokens_created == 0
    host.listens = True
    assert api.get("/version") == {"by": "pvesh"}  # HTTPS is not retried at once
    later = time.monotonic() + 6
    monkeypatch.setattr("pytest_nestedpve.pve.deadline.time.monotonic", lambda: later)
    assert api.get("/version") == {"by": "https"}
    assert api.transport.startswith("HTTPS")


def test_a_call_waits_for_a_restarting_proxy(host: HttpsHost, api: HostApi) -> None:
    api.post(f"{VM}/status/start")
    host.listens = False
    api.shared.tokens.act_client(POOL, []).close()

    def listen() -> None:
        host.listens = True

    timer = threading.Timer(0.4, listen)
    timer.start()
    assert api.post(f"{VM}/status/stop") == {"by": "https"}
    timer.join()
    assert host.pvesh() == []


def test_pvesh_is_used_if_the_proxy_does_not_restart(
    host: HttpsHost, api: HostApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nestedpve.pve.transports.PROXY_RESTART", 0.3)
    api.get("/version")
    host.listens = False
    api.shared.tokens.see_client().close()
    assert api.get("/version") == {"by": "pvesh"}
    assert api.get("/version") == {"by": "pvesh"}


def test_a_request_that_the_proxy_could_not_deliver_uses_pvesh(host: HttpsHost, api: HostApi) -> None:
    host.answers.append(answer_with(595, "Connection refused", b"", only="/status/start"))
    assert api.post(f"{VM}/status/start") == {"by": "pvesh"}


def test_a_call_for_an_offline_node_fails_at_once_and_https_remains_in_use(
    host: HttpsHost, api: HostApi
) -> None:
    nodes = [{"node": "father", "status": "online"}, {"node": "father2", "status": "offline"}]
    host.answers.append(answer_with(595, "No route to host", b"", only="/nodes/father2/", times=9))
    host.answers.append(answer_with(200, "OK", {"data": nodes}, only="/api2/json/nodes", times=9))
    begun = time.monotonic()
    with pytest.raises(NodeUnreachable, match="the node father2 is offline"):
        api.get("/nodes/father2/tasks")
    with pytest.raises(NodeUnreachable, match="the node father2 is offline"):
        api.post("/nodes/father2/qemu/99901/config")
    assert time.monotonic() - begun < 4
    assert api.get("/version") == {"by": "https"}


def test_calls_wait_once_for_an_offline_node_and_succeed_when_it_is_online(
    host: HttpsHost, api: HostApi
) -> None:
    waited: list[str] = []
    state = {"node": "father2", "status": "offline"}

    def slow(handler: Any) -> bool:
        if handler.path.startswith("/api2/json/nodes/father2/") and state["status"] == "offline":
            waited.append(handler.path)
        return False

    host.answers.append(slow)
    offline = answer_with(595, "Connection timed out", b"", only="/nodes/father2/", times=99)
    host.answers.append(offline)
    host.answers.append(answer_with(200, "OK", {"data": [state]}, only="/api2/json/nodes", times=99))
    for _ in range(3):
        with pytest.raises(NodeUnreachable, match="the node father2 is offline"):
            api.get("/nodes/father2/tasks")
    assert len(waited) == 1
    state["status"] = "online"
    host.answers.remove(offline)
    assert api.get("/nodes/father2/tasks") == [state]


def test_a_read_whose_answer_is_lost_is_retried_and_a_change_is_not(host: HttpsHost, api: HostApi) -> None:
    def cut(handler: Any) -> bool:
        if handler.path.endswith(("/version", "/start")) and not cuts.get(handler.path):
            cuts[handler.path] = True
            handler.close_connection = True
            handler.connection.shutdown(2)
            return True
        return False

    cuts: dict[str, bool] = {}
    host.answers.append(cut)
    assert api.get("/version") == {"by": "https"}
    with pytest.raises(ReplyLost, match="ended before the answer"):
        api.post(f"{VM}/status/start")
    assert [request.path for request in host.guest_calls()] == [f"{VM}/status/start"]
    assert host.pvesh() == []


def test_an_endless_answer_is_interrupted_at_the_limit(host: HttpsHost, api: HostApi) -> None:
    api.get("/version")

    def drip(handler: Any) -> bool:
        if not handler.path.endswith("/slow"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)
        return True

    host.answers.append(drip)
    began = time.monotonic()
    with pytest.raises(CommandTimeout, match=r"no answer over HTTPS within 0\.5 s"), call_limit(0.5):
        api.get("/slow")
    assert time.monotonic() - began < 3
    assert api.get("/version") == {"by": "https"}


def test_no_token_is_in_an_error_or_in_the_log(host: HttpsHost, api: HostApi) -> None:
    log = Calls()
    api.logged(log)
    host.answers.append(answer_with(500, "boom", {"data": None, "message": "boom"}, only="/config"))
    with pytest.raises(ApiError) as caught:
        api.get(f"{VM}/config")
    api.post(f"{VM}/status/start")
    secrets = log.hidden
    assert len(secrets) == 2
    shown = repr((log.calls, str(caught.value), api.shared.tokens.see_client(), host.commands))
    assert not any(secret in shown for secret in secrets)
    assert "cafe" not in shown


def test_calls_that_create_tokens_are_logged_with_their_own_time(host: HttpsHost, tmp_path: Path) -> None:
    def slow(handler: Any) -> bool:
        if "/token/" in handler.path:
            time.sleep(0.05)
        return False

    host.answers.append(slow)
    log = AuditLog(tmp_path / "audit.jsonl", POOL[5:])
    api = HostApi(host, log.calls("father")).within(lambda: POOL)
    began = time.monotonic()
    api.post(f"{VM}/status/start")
    duration = (time.monotonic() - began) * 1000
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    created, *calls = [(line["cmd"].split()[:2], line["ms"]) for line in lines if line["event"] == "call"]
    assert created == (["pveum", "user"], 1.0)
    _, token, _, start = calls
    assert [name[0] for name, _ in calls] == ["get", "post", "put", "post"]
    assert token[1] >= 50
    assert start[1] + token[1] <= duration  # the time of the token is not counted twice
    assert all(ms > 0 for _, ms in calls)
    assert sum(ms for _, ms in calls) <= duration


# -- the end -------------------------------------------------------------------------------------------


def test_a_session_deletes_its_tokens_and_their_grants(host: HttpsHost, api: HostApi) -> None:
    api.post(f"{VM}/config", scsi0="local:1")
    name = next(name for name in host.tokens if name.startswith(POOL))
    host.rights = rights_of(name)
    api.close()
    assert host.tokens == {}
    assert_rights_first(host)


def rights_of(token: str) -> list[dict[str, str]]:
    return [
        {"path": f"/pool/{POOL}", "ugid": f"root@pam!{token}", "roleid": "PVEVMAdmin"},
        {"path": f"/pool/{POOL}", "ugid": f"root@pam!{token}", "roleid": "PVEPoolAdmin"},
        {"path": "/storage/local", "ugid": "root@pam!other", "roleid": "PVEDatastoreUser"},
    ]


def assert_rights_first(host: HttpsHost) -> None:
    deletions = [
        request for request in host.requests if "delete" in request.params or request.method == "DELETE"
    ]
    assert next((request.method, request.path.rpartition("/")[2]) for request in deletions) == ("PUT", "acl")
    assert [request.params["roles"] for request in deletions if request.method == "PUT"] == [
        ["PVEPoolAdmin,PVEVMAdmin"]
    ]


@pytest.mark.parametrize("lost", [False, True])
def test_tokens_are_deleted_as_root_when_https_fails(host: HttpsHost, api: HostApi, lost: bool) -> None:
    log = Calls()
    api.logged(log)
    api.post(f"{VM}/status/start")
    host.tokens["terraform"] = "other"
    host.rights = rights_of(next(name for name in host.tokens if name.startswith(POOL)))
    if lost:
        host.answers.append(answer_with(599, "Too many redirections", b"", only="/token/", times=9))
    else:
        host.listens = False
        api.shared.tokens.see_client().close()
    api.close()
    assert list(host.tokens) == ["terraform"]
    assert {call.cmd.split()[0] for call in log.calls if call.transport == "pvesh"} >= {"get", "delete"}
    assert lost or [call.split()[:2] for call in host.pvesh() if "/acl" in call] == [
        ["get", "/access/acl"],
        ["set", "/access/acl"],
    ]


def test_a_token_is_deleted_although_the_answer_to_its_creation_was_lost(
    host: HttpsHost, api: HostApi
) -> None:
    def lost(handler: Any) -> bool:
        if handler.command != "POST" or "/token/" not in handler.path:
            return False
        host.new_token(handler.path.rpartition("/")[2])
        handler.send_answer(599, "Too many redirections", b"")
        return True

    host.answers.append(lost)
    with pytest.raises(ReplyLost):
        api.shared.tokens.act_client(POOL, [])
    assert len(host.tokens) == 2
    api.close()
    assert host.tokens == {}


def test_only_tokens_and_grants_of_the_run_are_found_and_deleted() -> None:
    class TokenApi:
        def __init__(self) -> None:
            self.puts: list[dict[str, Any]] = []

        def get(self, path: str, /, **_: Any) -> Any:
            if path.endswith("/token"):
                names = (f"{POOL}-00000001", f"{POOL}-mine", "npve-a1b2c3d4e5f7-00000001", "npve-see-0a")
                return [{"tokenid": name} for name in (*names, "terraform", None)]
            return [
                {"path": "/", "ugid": f"root@pam!{POOL}-00000001", "roleid": "PVEAuditor"},
                {"path": "/", "ugid": "root@pam!terraform", "roleid": "Administrator"},
            ]

        def put(self, path: str, /, **params: Any) -> Any:
            self.puts.append({"acl": path, **params})

        post = delete = put

    api = TokenApi()
    assert run_tokens(api, "a1b2c3d4e5f6") == [f"{POOL}-00000001"]
    remove_grants(api, run_tokens(api, "a1b2c3d4e5f6"))
    assert [put["tokens"] for put in api.puts] == [f"root@pam!{POOL}-00000001"]
