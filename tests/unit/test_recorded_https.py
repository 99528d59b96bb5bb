"""Answers recorded of PVE 9.2 over HTTPS, byte by byte through TLS: errors and texts are those of pvesh, and
so are the reactions to them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from https_host import HttpsHost, Request, serve_https_host
from recorded import EVERY, HTTPS, Recorded
from standin_connections import StandinApi, StandinSsh
from standin_environment import ours
from standin_host import StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.discover import discover
from pytest_nestedpve.ownership.pool import create_pool, pool_name, read_pool
from pytest_nestedpve.ownership.proof import RunProver
from pytest_nestedpve.pve import agent, errors, qemu, tasks
from pytest_nestedpve.pve.errors import ApiError, classify
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.https import ReplyLost, Unauthorized
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.transports import HostApi
from pytest_nestedpve.teardown.destroy import Outcome, destroy
from pytest_nestedpve.teardown.teardown import teardown

VM = "/nodes/father/qemu/99901"
GUESTS = "/nodes/father/qemu"

KINDS: dict[type[ApiError], str] = {
    errors.AgentUnavailable: "https-027",
    errors.AlreadyExists: "https-006 https-013",
    errors.BadParameter: "https-014 ownA-155 ownD-033 ownJ-001 ownJ-005 ownJ-009 ownL-038 ownL-040",
    errors.Changed: "ownD-004",
    errors.GuestNotFound: "https-008",
    errors.GuestTimeout: "ownA-101",
    errors.InUse: "ownB-042 ownB-111",
    errors.LockTimeout: "ownE-008",
    errors.NotFound: "https-011 ownB-083 ownA-022 ownA-038",
    errors.PermissionDenied: "ownA-007 ownA-011 ownA-020 ownA-023 ownA-024 ownA-035 ownA-039 ownA-042 "
    "ownA-123 ownA-251 ownB-028 ownB-033 ownE-065",
    errors.Running: "ownA-125",
    Unauthorized: "https-002 https-030 https-031",
    ApiError: "ownA-104",
}
# Recordings of the same error by pvesh or qm, with other names and ids.
PAIRS = {
    "https-006": "create-055", "https-008": "basic-137", "https-013": "create-049", "https-014": "basic-096",
    "https-027": "agent-012", "ownA-022": "clone-009", "ownA-125": "destroy-004", "ownB-042": "ownB-043",
    "ownB-111": "destroy-024", "ownD-004": "ownD-007", "ownE-008": "tasks-025",
}  # fmt: skip


def status_of(name: str) -> int:
    return int(HTTPS[name]["stdout"].split()[1])


def replayed(name: str, *, only: str = "", times: int = 1) -> Callable[[Any], bool]:
    """Answers requests whose path contains `only` by the bytes that were recorded."""
    text = HTTPS[name]["stdout"].encode()
    remaining = [times]

    def reply(handler: Any) -> bool:
        if only not in handler.path or not remaining[0]:
            return False
        remaining[0] -= 1
        handler.wfile.write(text)
        handler.close_connection = b"Connection: close\r\nDate" in text
        return True

    return reply


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpsHost]:
    with serve_https_host(tmp_path_factory.mktemp("https")) as https:
        yield https


@pytest.fixture
def https(served: HttpsHost) -> HttpsHost:
    served.answers.clear()
    served.commands.clear()
    served.requests.clear()
    return served


@pytest.fixture
def api(https: HttpsHost) -> HostApi:
    return HostApi(https)


def raised(api: Any, name: str) -> ApiError:
    """The error that the recorded answer to a read raises."""
    api.shared.tokens.see_client()
    with pytest.raises(ApiError) as caught:
        api.get(f"{VM}/config")
    assert caught.value.rc == status_of(name)
    return caught.value


# -- the error and its text ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in KINDS.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_recorded_answer_is_the_error_of_its_kind_with_the_hosts_own_text(
    https: HttpsHost, api: HostApi, kind: type[ApiError], name: str
) -> None:
    https.answers.append(replayed(name, only="/config", times=2))
    error = raised(api, name)
    assert type(error) is kind
    head, _, body = HTTPS[name]["stdout"].partition("\r\n\r\n")
    status, _, reason = head.split("\r\n")[0].partition(" ")[2].partition(" ")
    lines = error.text.split("\n")
    assert lines[0] == (reason if status == "500" else f"{status} {reason}")
    parameters = json.loads(body).get("errors", {}) if body.startswith("{") else {}
    assert lines[1:] == [f"{key}: {why.strip()}" for key, why in parameters.items()]
    assert str(error) == f"get {VM}/config: {error.text}"
    assert https.pvesh() == [], "repeated as root"


def test_every_recorded_answer_that_is_an_error_is_accounted_for() -> None:
    known = {name for names in KINDS.values() for name in names.split()}
    assert {name for name in HTTPS if status_of(name) >= 300} == known


def test_an_error_over_https_has_the_type_and_text_of_pveshs(https: HttpsHost, api: HostApi) -> None:
    for name, other in PAIRS.items():
        https.answers[:] = [replayed(name, only="/config")]
        error = raised(api, name)
        record = EVERY[other]
        if record["rc"] and record["cmd"].startswith("pvesh"):
            with pytest.raises(ApiError) as caught:
                PveshApi(Recorded(record)).get("/x")
            same = caught.value
        else:
            same = classify(record["stderr"])
        texts = [re.sub(r"npve-\w+|'\w+'|\d+", "N", e.text) for e in (error, same)]
        assert (type(error), texts[0]) == (type(same), texts[1])


def test_every_recorded_error_of_a_command_is_the_same_error_over_https(
    https: HttpsHost, api: HostApi
) -> None:
    """In the form of the pairs above: the status before the text, parameters in `errors`."""
    compared = 0
    for name, record in EVERY.items():
        same = classify(record["stderr"], record["rc"])
        if record["rc"] in (0, None) or not re.match(
            "pvesh (get|set|create|delete)|qm|pvesm|pveum", record["cmd"]
        ):
            continue
        if isinstance(same, (errors.ClusterFilesystemDown, errors.NoPve)) or same.text.startswith("ERROR"):
            continue  # errors of the commands themselves, which the API does not have
        status, _, first = same.text.partition(" ")
        if not re.fullmatch(r"[45]\d\d", status):
            status, first = "500", same.text
        reason, *parameters = first.split("\n")
        answer: dict[str, Any] = {"data": None, "message": reason + "\n"}
        if status == "400" and all(re.match(r"[\w.-]+: ", line) for line in parameters):
            answer["errors"] = {
                key: why + "\n" for key, _, why in (line.partition(": ") for line in parameters)
            }
        else:
            answer["message"] = first + "\n"
        https.answers[:] = [answer_with(int(status), reason, answer)]
        with pytest.raises(ApiError) as caught:
            api.get(f"{VM}/config")
        kind = Unauthorized if status == "401" else type(same)
        assert (type(caught.value), caught.value.text) == (kind, same.text), name
        compared += 1
    assert compared > 90


def answer_with(status: int, reason: str, answer: Any, *, only: str = "/config") -> Callable[[Any], bool]:
    """Answers every request whose path contains `only`."""

    def reply(handler: Any) -> bool:
        if only not in handler.path:
            return False
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.send_answer(status, reason.encode().decode("latin-1"), body)
        return True

    return reply


def test_the_reason_of_a_status_line_is_read_as_utf_8(https: HttpsHost, api: HostApi) -> None:
    https.answers.append(answer_with(500, "volume 'local:iso/für.iso' does not exist", b""))
    with pytest.raises(errors.NotFound, match="für"):
        api.get(f"{VM}/config")


def test_recorded_results_are_returned(https: HttpsHost, api: HostApi) -> None:
    def answer(name: str, verb: str = "get") -> Any:
        https.answers[:] = [replayed(name, only="/config")]
        return getattr(api.free(), verb)(f"{VM}/config")

    assert answer("https-001")["release"] == "9.2"
    assert answer("https-005") == "100"
    assert answer("ownA-257", "put") is None
    assert tasks.parse_upid(answer("https-012", "post")).user == "root@pam!tofu"
    assert [line["t"] for line in answer("https-024")][-1] == "TASK OK"


# -- reactions -----------------------------------------------------------------------------------------


def test_a_task_that_fails_after_its_200_is_the_error_that_pvesh_prints(
    https: HttpsHost, api: HostApi
) -> None:
    https.answers += [replayed("https-018", only="/status/start"), replayed("https-019", only="/tasks/")]
    # A start of a VM that runs already has reached its aim.
    assert qemu.start(api.free(), "father", 99901) is None
    https.answers[:] = [replayed("https-018", only="/config"), replayed("https-019", only="/tasks/")]
    with pytest.raises(errors.Running) as caught:
        qemu.configure(api.free(), "father", 99901, memory=64)
    assert caught.value.text == classify(EVERY["power-008"]["stderr"]).text.replace("103", "140")


@pytest.mark.parametrize("name", ["https-002", "https-031"])
def test_a_refused_token_is_replaced_once_and_then_an_error(
    https: HttpsHost, api: HostApi, name: str
) -> None:
    https.answers[:] = [replayed(name, only="/version")]
    assert api.get("/version") == {"by": "https"}
    assert sum("pveum" in command for command in https.commands) == 2
    https.answers[:] = [replayed(name, only="/version", times=2)]
    with pytest.raises(Unauthorized):
        api.get("/version")


def test_an_agent_that_does_not_run_is_no_error_and_one_without_permission_is(
    https: HttpsHost, api: HostApi
) -> None:
    https.answers[:] = [replayed("https-027", only="/agent/")]
    assert agent.ping(api.free(), "father", 99901) is False
    https.answers[:] = [replayed("ownA-007", only="/agent/")]
    with pytest.raises(errors.PermissionDenied):
        agent.ping(api.free(), "father", 99901)


@pytest.mark.parametrize("status", [596, 597, 599])
def test_a_read_whose_answer_the_proxy_lost_is_repeated_and_a_change_is_not(
    https: HttpsHost, api: HostApi, status: int
) -> None:
    lost = [answer_with(status, "Connection timed out", b"", only=only) for only in ("/version", "/start")]

    def once(handler: Any) -> bool:
        return bool(lost) and lost[0](handler) and bool(lost.pop(0))

    https.answers[:] = [once]
    assert api.get("/version") == {"by": "https"}
    with pytest.raises(ReplyLost, match=f"{status} Connection timed out"):
        api.free().post(f"{VM}/status/start")
    paths = [request.path for request in https.requests if "/access" not in request.path]
    assert [path.rpartition("/")[2] for path in paths] == ["version", "version", "start"]


class BothWays:
    """A stand-in host behind TLS and behind a login: root's pvesh and the proxy serve the same host."""

    def __init__(self, https: HttpsHost, host: StandinHost) -> None:
        self.https, self.api, self.ssh = https, StandinApi(host), StandinSsh(host)
        self.calls: list[str] = []
        https.answers[:] = [self.answer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ssh, name)

    def open_channel(self, host: str, port: int) -> Any:
        return self.https.open_channel(host, port)

    def run(self, command: Any, **options: Any) -> Any:
        text = command if isinstance(command, str) else " ".join(command)
        if "pve-ssl.pem" in text or "pveum" in text:
            return self.https.run(command, **options)
        if " pvesh " in text:
            verb, path = text.partition(" pvesh ")[2].split()[:2]
            method = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}[verb]
            self.calls.append(f"root {method} {path}")
        return self.ssh.run(command, **options)

    def answer(self, handler: Any) -> bool:
        """The stand-in's answer, as the proxy gives it; tokens and rights are those of `https`."""
        request = self.https.requests[-1]
        if "/token" in request.path or request.path == "/access/acl":
            return False
        self.calls.append(f"{request.method} {request.path}")
        try:
            handler.data(self.call(request))
        except ApiError as error:
            status, _, text = error.text.partition(" ")
            code = int(status) if re.fullmatch(r"[45]\d\d", status) else 500
            text = text if code != 500 else error.text
            handler.send_answer(
                code, text.split("\n")[0], json.dumps({"data": None, "message": text}).encode()
            )
        return True

    def call(self, request: Request) -> Any:
        params = {name: values[0] if len(values) == 1 else values for name, values in request.params.items()}
        return self.api._call(request.method.lower(), request.path, params)


@pytest.fixture
def both(https: HttpsHost, host: StandinHost) -> BothWays:
    return BothWays(https, host)


@pytest.fixture
def proxied(both: BothWays, env: Environment) -> PveHost:
    """The run's host by HTTPS, with the token of the pool."""
    api: Any = HostApi(both).within(lambda: pool_name(env.settings, env.run))
    return PveHost("father", both, api, "father")


def replace_answer(both: BothWays, verb: str, path: str, answer: Callable[[Any], bool]) -> None:
    """Let `answer` reply to calls whose path matches."""

    def reply(handler: Any) -> bool:
        request = both.https.requests[-1]
        return request.method == verb and re.fullmatch(path, request.path) is not None and answer(handler)

    both.https.answers.insert(0, reply)


def destroy_one(env: Environment, proxied: PveHost, vmid: int) -> Outcome:
    candidates = [vm for vm in discover(proxied, env.settings, env.run.id) if vm.vmid == vmid]
    prover = RunProver(proxied.api, env.settings, env.run.id)
    return destroy(proxied, prover, candidates, force_stop=True, budget=20)[0]


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownA-125", "ownE-008", "https-008", "https-031"])
def test_a_delete_that_was_refused_by_a_passing_error_is_proved_and_sent_again(
    env: Environment, proxied: PveHost, both: BothWays, host: StandinHost, name: str
) -> None:
    vmid = ours(env)
    replace_answer(both, "DELETE", f"{GUESTS}/{vmid}", replayed(name))
    assert destroy_one(env, proxied, vmid).result == "gone"
    assert host.vms() == []
    calls = [call for call in both.calls if "/qemu/" in call]
    assert calls[-1] == f"GET /nodes/father/qemu/{vmid}/status/current"
    assert not [call for call in both.calls if call.startswith("root DELETE")]


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownB-111", "ownE-065", "ownA-035", "ownJ-005"])
def test_a_delete_that_was_refused_by_a_lasting_error_is_given_up_and_not_repeated_as_root(
    env: Environment, proxied: PveHost, both: BothWays, host: StandinHost, name: str
) -> None:
    vmid = ours(env)
    replace_answer(both, "DELETE", f"{GUESTS}/{vmid}", replayed(name, times=9))
    outcome = destroy_one(env, proxied, vmid)
    reason = HTTPS[name]["stdout"].split("\r\n")[0].split(" ", 2)[2]
    assert (outcome.result, reason in outcome.reason) == ("left", True)
    assert not [call for call in both.calls if call.startswith("root")]
    assert vmid in host.vms()


@pytest.mark.usefixtures("pool")
def test_a_create_whose_id_is_in_use_uses_the_next_one(
    env: Environment, proxied: PveHost, both: BothWays, host: StandinHost
) -> None:
    replace_answer(both, "POST", GUESTS, replayed("https-013"))
    created = create_marked(proxied, env.run, env.settings)
    assert host.vms() == [created.vmid]
    assert both.calls.count("POST /nodes/father/qemu") == 1


@pytest.mark.usefixtures("pool")
def test_a_vm_whose_create_lost_its_answer_in_the_proxy_is_ours(
    env: Environment, proxied: PveHost, both: BothWays, host: StandinHost
) -> None:
    lost: list[bool] = []

    def losing(handler: Any) -> bool:
        if lost:
            return False
        lost.append(True)
        both.call(both.https.requests[-1])
        handler.send_answer(596, "Broken pipe", b"")
        return True

    replace_answer(both, "POST", GUESTS, losing)
    created = create_marked(proxied, env.run, env.settings)
    assert host.vms() == [created.vmid]


@pytest.mark.usefixtures("pool")
def test_tags_are_set_after_a_lock_timeout(
    env: Environment, proxied: PveHost, both: BothWays, host: StandinHost
) -> None:
    replace_answer(both, "PUT", f"{GUESTS}/.*/config", replayed("ownE-008"))
    created = create_marked(proxied, env.run, env.settings)
    assert env.run.tag in host.config(created.vmid)["tags"]


CFS = "cfs-lock 'file-user_cfg' error: got lock request timeout"


def test_a_pool_is_created_and_removed_with_its_run_after_lock_timeouts(
    env: Environment, host: StandinHost
) -> None:
    host.fault("POST", "/pools", text=f"create pool failed: {CFS}", times=2)
    create_pool(env.outer.api, env.run, env.settings, int(time.time()))
    host.fault("DELETE", "/pools", text=f"delete pool failed: {CFS}", times=2)
    host.fault("GET", "/access/acl", text=CFS)
    assert teardown(env).left == ()
    assert host.pools() == {}


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownB-042", "https-011", "ownB-046"])
def test_a_pool_is_gone_when_the_host_lists_none_and_not_by_the_error_of_a_delete(
    env: Environment, host: StandinHost, name: str
) -> None:
    text = HTTPS[name]["stdout"].split("\r\n")[0].split(" ", 1)[1] if name in HTTPS else EVERY[name]["stderr"]
    host.fault("DELETE", "/pools", text=text.removeprefix("500 "), times=9)
    pool = pool_name(env.settings, env.run)
    (line,) = teardown(env).left
    assert line.startswith(f"pool {pool}: ")
    assert read_pool(env.outer.api, pool) is not None
