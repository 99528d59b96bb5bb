"""What was recorded of PVE 9.2 over HTTPS, byte by byte through TLS: the errors and words that pvesh has for
the same, and what is done next."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from https_host import HttpsHost, serve_https_host
from memory_host import MemoryApi, MemoryHost, MemorySsh
from recorded import EVERY, HTTPS, Recorded
from standin_environment import ours

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
# The same said by pvesh or qm, but for names and ids.
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
    left = [times]

    def answers(handler: Any) -> bool:
        if only not in handler.path or not left[0]:
            return False
        left[0] -= 1
        handler.wfile.write(text)
        handler.close_connection = b"Connection: close\r\nDate" in text
        return True

    return answers


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpsHost]:
    with serve_https_host(tmp_path_factory.mktemp("https")) as made:
        yield made


@pytest.fixture
def host(served: HttpsHost) -> HttpsHost:
    served.answers.clear()
    served.commands.clear()
    served.requests.clear()
    return served


@pytest.fixture
def api(host: HttpsHost) -> HostApi:
    return HostApi(host)


def raised(api: Any, name: str) -> ApiError:
    """What the recorded answer to a read raises."""
    api.shared.tokens.see_client()
    with pytest.raises(ApiError) as caught:
        api.get(f"{VM}/config")
    assert caught.value.rc == status_of(name)
    return caught.value


# -- the error and its words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in KINDS.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_recorded_answer_is_the_error_of_its_kind_in_the_hosts_own_words(
    host: HttpsHost, api: HostApi, kind: type[ApiError], name: str
) -> None:
    host.answers.append(replayed(name, only="/config", times=2))
    error = raised(api, name)
    assert type(error) is kind
    head, _, body = HTTPS[name]["stdout"].partition("\r\n\r\n")
    status, _, reason = head.split("\r\n")[0].partition(" ")[2].partition(" ")
    lines = error.text.split("\n")
    assert lines[0] == (reason if status == "500" else f"{status} {reason}")
    said = json.loads(body).get("errors", {}) if body.startswith("{") else {}
    assert lines[1:] == [f"{key}: {why.strip()}" for key, why in said.items()]
    assert str(error) == f"get {VM}/config: {error.text}"
    assert host.pvesh() == [], "asked again as root"


def test_every_recorded_answer_that_is_an_error_is_accounted_for() -> None:
    known = {name for names in KINDS.values() for name in names.split()}
    assert {name for name in HTTPS if status_of(name) >= 300} == known


def test_pvesh_says_the_same_of_the_same(host: HttpsHost, api: HostApi) -> None:
    for name, other in PAIRS.items():
        host.answers[:] = [replayed(name, only="/config")]
        error = raised(api, name)
        record = EVERY[other]
        if record["rc"] and record["cmd"].startswith("pvesh"):
            with pytest.raises(ApiError) as caught:
                PveshApi(Recorded(record)).get("/x")
            same = caught.value
        else:
            same = classify(record["stderr"])
        bare = [re.sub(r"npve-\w+|'\w+'|\d+", "N", each.text) for each in (error, same)]
        assert (type(error), bare[0]) == (type(same), bare[1])


def test_whatever_pvesh_was_recorded_to_say_is_the_same_error_over_https(
    host: HttpsHost, api: HostApi
) -> None:
    """In the form that the pairs above show: the status before the words, parameters in `errors`."""
    tried = 0
    for name, record in EVERY.items():
        same = classify(record["stderr"], record["rc"])
        if record["rc"] in (0, None) or not re.match(
            "pvesh (get|set|create|delete)|qm|pvesm|pveum", record["cmd"]
        ):
            continue
        if isinstance(same, (errors.ClusterFilesystemDown, errors.NoPve)) or same.text.startswith("ERROR"):
            continue  # said by the commands themselves, and by no API
        status, _, first = same.text.partition(" ")
        if not re.fullmatch(r"[45]\d\d", status):
            status, first = "500", same.text
        words, *parameters = first.split("\n")
        answer: dict[str, Any] = {"data": None, "message": words + "\n"}
        if status == "400" and all(re.match(r"[\w.-]+: ", line) for line in parameters):
            answer["errors"] = {
                key: why + "\n" for key, _, why in (line.partition(": ") for line in parameters)
            }
        else:
            answer["message"] = first + "\n"
        host.answers[:] = [said(int(status), words, answer)]
        with pytest.raises(ApiError) as caught:
            api.get(f"{VM}/config")
        kind = Unauthorized if status == "401" else type(same)
        assert (type(caught.value), caught.value.text) == (kind, same.text), name
        tried += 1
    assert tried > 90


def said(status: int, reason: str, answer: Any, *, only: str = "/config") -> Callable[[Any], bool]:
    def answers(handler: Any) -> bool:
        if only not in handler.path:
            return False
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.say(status, reason.encode().decode("latin-1"), body)
        return True

    return answers


def test_words_of_a_status_line_alone_are_read_as_utf_8(host: HttpsHost, api: HostApi) -> None:
    host.answers.append(said(500, "volume 'local:iso/für.iso' does not exist", b""))
    with pytest.raises(errors.NotFound, match="für"):
        api.get(f"{VM}/config")


def test_what_was_done_is_read_as_such(host: HttpsHost, api: HostApi) -> None:
    def answer(name: str, verb: str = "get") -> Any:
        host.answers[:] = [replayed(name, only="/config")]
        return getattr(api.free(), verb)(f"{VM}/config")

    assert answer("https-001")["release"] == "9.2"
    assert answer("https-005") == "100"
    assert answer("ownA-257", "put") is None
    assert tasks.parse_upid(answer("https-012", "post")).user == "root@pam!tofu"
    assert [line["t"] for line in answer("https-024")][-1] == "TASK OK"


# -- what is done next ---------------------------------------------------------------------------------


def test_a_task_that_failed_behind_its_200_is_the_error_that_pvesh_prints(
    host: HttpsHost, api: HostApi
) -> None:
    host.answers += [replayed("https-018", only="/status/start"), replayed("https-019", only="/tasks/")]
    # That it runs already is what was wanted of a start.
    assert qemu.start(api.free(), "father", 99901) is None
    host.answers[:] = [replayed("https-018", only="/config"), replayed("https-019", only="/tasks/")]
    with pytest.raises(errors.Running) as caught:
        qemu.configure(api.free(), "father", 99901, memory=64)
    assert caught.value.text == classify(EVERY["power-008"]["stderr"]).text.replace("103", "140")


@pytest.mark.parametrize("name", ["https-002", "https-031"])
def test_a_token_that_is_refused_is_replaced_once_and_then_told(
    host: HttpsHost, api: HostApi, name: str
) -> None:
    host.answers[:] = [replayed(name, only="/version")]
    assert api.get("/version") == {"by": "https"}
    assert sum("pveum" in command for command in host.commands) == 2
    host.answers[:] = [replayed(name, only="/version", times=2)]
    with pytest.raises(Unauthorized):
        api.get("/version")


def test_an_agent_that_does_not_run_is_waited_for_and_one_that_may_not_be_asked_is_told(
    host: HttpsHost, api: HostApi
) -> None:
    host.answers[:] = [replayed("https-027", only="/agent/")]
    assert agent.ping(api.free(), "father", 99901) is False
    host.answers[:] = [replayed("ownA-007", only="/agent/")]
    with pytest.raises(errors.PermissionDenied):
        agent.ping(api.free(), "father", 99901)


@pytest.mark.parametrize("status", [596, 597, 599])
def test_an_answer_that_the_proxy_lost_is_asked_for_again_and_a_change_is_not_sent_twice(
    host: HttpsHost, api: HostApi, status: int
) -> None:
    lost = [said(status, "Connection timed out", b"", only=only) for only in ("/version", "/start")]

    def once(handler: Any) -> bool:
        return bool(lost) and lost[0](handler) and bool(lost.pop(0))

    host.answers[:] = [once]
    assert api.get("/version") == {"by": "https"}
    with pytest.raises(ReplyLost, match=f"{status} Connection timed out"):
        api.free().post(f"{VM}/status/start")
    assert [each.path.rpartition("/")[2] for each in host.requests if "/access" not in each.path] == [
        "version", "version", "start",
    ]  # fmt: skip


class Both:
    """A memory host behind TLS and behind a login: root's pvesh and the proxy serve the same."""

    def __init__(self, served: HttpsHost, memory: MemoryHost) -> None:
        self.served, self.memory = served, memory
        self.ssh = MemorySsh(memory)
        self.asked: list[str] = []
        served.answers[:] = [self.answer]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ssh, name)

    def open_channel(self, host: str, port: int) -> Any:
        return self.served.open_channel(host, port)

    def run(self, command: Any, **more: Any) -> Any:
        text = command if isinstance(command, str) else " ".join(command)
        if "pve-ssl.pem" in text or "pveum" in text:
            return self.served.run(command, **more)
        if " pvesh " in text:
            return self._pvesh(list(command))
        return self.ssh.run(command, **more)

    def _pvesh(self, words: list[str]) -> Any:
        verb, path, *rest = words[words.index("pvesh") + 1 : -2]
        method = {"get": "GET", "create": "POST", "set": "PUT", "delete": "DELETE"}[verb]
        self.asked.append(f"root {method} {path}")
        params = {rest[n].removeprefix("--"): rest[n + 1] for n in range(0, len(rest), 2)}
        try:
            found = json.dumps(MemoryApi(self.memory)._call(method, path, params))
            return Recorded((0, found, "")).run("")
        except ApiError as error:
            return Recorded((255, "", error.text)).run("")

    def answer(self, handler: Any) -> bool:
        """The memory host's answer, as the proxy gives it."""
        asked = self.served.requests[-1]
        if "/token" in asked.path or asked.path == "/access/acl":
            return False
        self.asked.append(f"{asked.method} {asked.path}")
        params = {key: values[0] if len(values) == 1 else values for key, values in asked.params.items()}
        try:
            handler.data(MemoryApi(self.memory)._call(asked.method, asked.path, params))
        except ApiError as error:
            status, _, words = error.text.partition(" ")
            code = int(status) if re.fullmatch(r"[45]\d\d", status) else 500
            words = words if code != 500 else error.text
            handler.say(code, words.split("\n")[0], json.dumps({"data": None, "message": words}).encode())
        return True


@pytest.fixture
def both(host: HttpsHost, memory: MemoryHost) -> Both:
    return Both(host, memory)


@pytest.fixture
def far(both: Both, env: Environment) -> PveHost:
    """The run's host, spoken to over HTTPS by the pool's token."""
    api: Any = HostApi(both).within(lambda: pool_name(env.settings, env.run))
    return PveHost("father", both, api, "father")


def instead(both: Both, verb: str, path: str, answer: Callable[[Any], bool]) -> None:
    """Have the answer to calls whose path matches be another one."""

    def answers(handler: Any) -> bool:
        asked = both.served.requests[-1]
        return asked.method == verb and re.fullmatch(path, asked.path) is not None and answer(handler)

    both.served.answers.insert(0, answers)


def ended(env: Environment, far: PveHost, vmid: int) -> Outcome:
    found = discover(far, env.settings, env.run.id)
    prover = RunProver(far.api, env.settings, env.run.id)
    candidates = [each for each in found if each.vmid == vmid]
    return destroy(far, prover, candidates, force_stop=True, budget=20)[0]


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownA-125", "ownE-008", "https-008", "https-031"])
def test_a_delete_that_was_refused_for_what_may_pass_is_proved_and_sent_again(
    env: Environment, far: PveHost, both: Both, memory: MemoryHost, name: str
) -> None:
    vmid = ours(env)
    instead(both, "DELETE", f"{GUESTS}/{vmid}", replayed(name))
    assert ended(env, far, vmid).result == "gone"
    with memory.open() as model:
        assert model.state["vms"] == {}
    asked = [each for each in both.asked if "/qemu/" in each or each == "DELETE"]
    assert asked[-1] == f"GET /nodes/father/qemu/{vmid}/status/current"
    assert not [each for each in both.asked if each.startswith("root DELETE")]


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownB-111", "ownE-065", "ownA-035", "ownJ-005"])
def test_a_delete_that_was_refused_for_what_stays_is_given_up_with_pves_words_and_not_done_as_root(
    env: Environment, far: PveHost, both: Both, memory: MemoryHost, name: str
) -> None:
    vmid = ours(env)
    instead(both, "DELETE", f"{GUESTS}/{vmid}", replayed(name, times=9))
    outcome = ended(env, far, vmid)
    reason = HTTPS[name]["stdout"].split("\r\n")[0].split(" ", 2)[2]
    assert (outcome.result, reason in outcome.reason) == ("left", True)
    assert not [each for each in both.asked if each.startswith("root")]
    with memory.open() as model:
        assert str(vmid) in model.state["vms"]


@pytest.mark.usefixtures("pool")
def test_a_create_that_met_somebodys_id_takes_the_next_one(
    env: Environment, far: PveHost, both: Both, memory: MemoryHost
) -> None:
    instead(both, "POST", GUESTS, replayed("https-013"))
    made = create_marked(far, env.run, env.settings)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(made.vmid)]
    assert both.asked.count("POST /nodes/father/qemu") == 1


@pytest.mark.usefixtures("pool")
def test_a_create_whose_answer_the_proxy_lost_is_read_and_is_ours(
    env: Environment, far: PveHost, both: Both, memory: MemoryHost
) -> None:
    lost: list[bool] = []

    def losing(handler: Any) -> bool:
        if lost:
            return False
        lost.append(True)
        asked = both.served.requests[-1]
        MemoryApi(memory)._call("POST", asked.path, {key: values[0] for key, values in asked.params.items()})
        handler.say(596, "Broken pipe", b"")
        return True

    instead(both, "POST", GUESTS, losing)
    made = create_marked(far, env.run, env.settings)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(made.vmid)]


@pytest.mark.usefixtures("pool")
def test_tags_that_only_a_lock_is_in_the_way_of_are_set_all_the_same(
    env: Environment, far: PveHost, both: Both, memory: MemoryHost
) -> None:
    instead(both, "PUT", f"{GUESTS}/.*/config", replayed("ownE-008"))
    made = create_marked(far, env.run, env.settings)
    with memory.open() as model:
        assert env.run.tag in model.state["vms"][str(made.vmid)]["config"]["tags"]


CFS = "cfs-lock 'file-user_cfg' error: got lock request timeout"


def test_a_pool_that_only_a_lock_is_in_the_way_of_is_made_and_goes_with_its_run(
    env: Environment, memory: MemoryHost
) -> None:
    memory.fault("POST", "/pools", text=f"create pool failed: {CFS}", times=2)
    create_pool(env.outer.api, env.run, env.settings, int(time.time()))
    memory.fault("DELETE", "/pools", text=f"delete pool failed: {CFS}", times=2)
    memory.fault("GET", "/access/acl", text=CFS)
    assert teardown(env).left == ()
    with memory.open() as model:
        assert model.state["pools"] == {}


@pytest.mark.usefixtures("pool")
@pytest.mark.parametrize("name", ["ownB-042", "https-011", "ownB-046"])
def test_a_pool_is_gone_when_the_host_shows_none_and_not_by_what_the_delete_said(
    env: Environment, memory: MemoryHost, name: str
) -> None:
    words = (
        HTTPS[name]["stdout"].split("\r\n")[0].split(" ", 1)[1] if name in HTTPS else EVERY[name]["stderr"]
    )
    memory.fault("DELETE", "/pools", text=words.removeprefix("500 "), times=9)
    pool = pool_name(env.settings, env.run)
    (line,) = teardown(env).left
    assert line.startswith(f"pool {pool}: ")
    assert read_pool(env.outer.api, pool) is not None
