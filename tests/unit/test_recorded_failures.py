"""Each kind of failure that was recorded of PVE 9.2: its typed error, its words, and what is done next."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from memory_environment import environments
from memory_host import MemoryApi, MemoryHost
from recorded import EVERY, FAILURES, Recorded, ended, log

from pytest_nestedpve.creation import create_marked
from pytest_nestedpve.destroy import Outcome, destroy
from pytest_nestedpve.discovery import Candidate, discover
from pytest_nestedpve.environment import Environment
from pytest_nestedpve.ownership import create_pool, prove, read_pool
from pytest_nestedpve.pve import agent, errors, guests, tasks
from pytest_nestedpve.pve.answers import entries, read_answer
from pytest_nestedpve.pve.errors import ApiError, UnreadableAnswer, classify, plain
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.transport import PveshApi
from pytest_nestedpve.teardown import teardown

# By kind, not by text: several commands and several words for each. What recorded_answers.jsonl has of
# them is classified in test_transport.
KINDS: dict[type[ApiError], str] = {
    errors.AgentFailed: "agent-029",
    errors.AgentUnavailable: "agent-005 agent-012",
    errors.AlreadyExists: "storage-035 create-049 create-055 clone-012 snapshot-028 destroy-041 pveum-029 "
    "concurrency-009 content-006 network-003 cluster-006 ownL-005",
    errors.BadParameter: "basic-065 basic-085 basic-087 basic-099 basic-105 basic-111 basic-112 basic-115 "
    "storage-004 storage-013 create-005 create-006 create-007 create-009 create-010 create-011 create-015 "
    "create-020 create-047 agent-020 clone-006 pveum-016 config-005 config-011 config-012 config-015 "
    "content-011 network-004 snapshot-005 extra-027 ownH-023 ownL-016 ownL-017 ownL-020 ownL-021",
    errors.Changed: "ownD-007",
    errors.ClusterFilesystemDown: "services-024",
    errors.DownloadFailed: "ownL-009 ownL-010 ownL-011 ownL-027",
    errors.WrongContent: "ownL-006 ownL-007 ownL-012",
    errors.GuestNotFound: "basic-137 basic-122 tasks-003 basic-141 basic-142",
    errors.GuestTimeout: "power-045 power-048",
    errors.HostFault: "basic-030",
    errors.InUse: "clone-018 clone-020 destroy-024 ownB-044",
    errors.LockTimeout: "tasks-025 concurrency-017 concurrency-018",
    errors.Locked: "ownI-008 lock-008 ownE-041",
    errors.NoQuorum: "noquorum-008 noquorum-011 noquorum-029 cluster-121",
    errors.NodeUnreachable: "basic-079 nodedown-022",
    errors.NotFound: "basic-077 basic-078 basic-129 pvecm-001 pvecm-009 storage-005 storage-006 storage-012 "
    "storage-041 import-003 import-015 power-038 power-044 clone-009 snapshot-013 snapshot-031 pveum-025 "
    "pveum-018 tasks-014 network-013 ownB-046 ownF-027 create-045 create-046 create-052",
    errors.NotRunning: "power-018 power-020 power-023 agent-018",
    errors.Protected: "protection-003",
    errors.Running: "power-002 power-008 destroy-004 cluster-056",
    errors.StartFailed: "power-029 power-033 power-034",
    errors.Unsupported: "storage-039 storage-048 import-014 snapshot-033 snapshot-035",
    errors.WrongState: "power-057 state-007 clone-023 snapshot-032",
    # Nothing follows from these but that it failed, and with which words.
    ApiError: "basic-040 power-072 network-008 extra-009 cluster-002 cluster-003 nodedown-023",
}
# Said beside a result: the command did what it was to do.
SUCCEEDED = "ownI-011 destroy-034 ownB-015 ownF-024 ownF-029"

# The whole text of those whose words stand among others.
TEXTS = {
    "services-024": "Unable to load access control list: Connection refused",
    "basic-087": "ERROR: unknown command 'pvesh frobnicate'",
    "basic-099": "ERROR: unknown command 'qm frobnicate'",
    "basic-111": "Unknown option: nosuch\n400 unable to parse option",
    "basic-142": "unable to find configuration file for VM 999 on node 'father'",
    "storage-006": "400 Parameter verification failed.\nstorage: No such storage.",
    "tasks-025": "can't lock file '/var/lock/qemu-server/lock-103.conf' - got timeout",
    "ownE-041": "VM is locked (create)",
    "power-023": "VM 108 not running",
    "noquorum-011": "generating token failed: cfs-lock 'file-user_cfg' error: no quorum!",
}


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in KINDS.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_each_recorded_failure_has_the_type_of_its_kind_and_the_hosts_own_words(
    kind: type[ApiError], name: str
) -> None:
    record = EVERY[name]
    if record["rc"] and record["cmd"].startswith("pvesh"):
        with pytest.raises(ApiError) as caught:
            PveshApi(Recorded(record)).get("/x")
        error = caught.value
    else:
        error = classify(record["stderr"], record["rc"])
    assert type(error) is kind
    lines = error.text.split("\n")
    said = [line.strip() for line in record["stderr"].splitlines()]
    assert all(line in said for line in lines), "words that PVE did not say"
    assert len(set(lines)) == len(lines), "a line twice"
    assert plain(error.text) == error.text
    assert not re.search(
        r"ipcc_send_rec|Traceback|USAGE|trying to acquire|<(?:api_path|vmid)>|UPID:", error.text
    )
    assert error.text == TEXTS.get(name, error.text)


def test_every_recorded_failure_is_accounted_for() -> None:
    known = {name for names in (*KINDS.values(), SUCCEEDED) for name in names.split()}
    assert {name for name, record in FAILURES.items() if record["rc"] or record["stderr"].strip()} <= known


@pytest.mark.parametrize("name", SUCCEEDED.split())
def test_words_beside_a_result_are_no_failure(name: str) -> None:
    record = EVERY[name]
    answer = record["stdout"] if record["stdout"].startswith(("{", "update VM")) else ""
    PveshApi(Recorded((record["rc"], answer, record["stderr"]))).put("/x")


def test_the_words_of_unseen_failures_of_a_known_kind_have_its_type() -> None:
    for words, kind in (
        (
            "proxy handler failed: unable to find configuration file for VM 9 on node 'b'",
            errors.GuestNotFound,
        ),
        ("TASK ERROR: can't lock file '/var/lock/qemu-server/lock-9.conf' - got timeout", errors.LockTimeout),
        ("ssh: connect to host 10.0.0.9 port 22: No route to host", errors.NodeUnreachable),
        ("ipcc_send_rec[1] failed: Transport endpoint is not connected", errors.ClusterFilesystemDown),
        ("close (rename) atomic file '/etc/pve/user.cfg' failed: Permission denied", errors.NoQuorum),
        ("CT is locked (snapshot)", errors.Locked),
        ("storage 'nas' is not online", errors.Unsupported),
        ("VM 9 qmp command 'query-status' failed - got timeout", errors.GuestTimeout),
        ("interrupted by signal", errors.Interrupted),
        ("Undefined subroutine &PVE::X::y called at /usr/share/perl5/PVE/X.pm line 7.", errors.HostFault),
    ):
        assert type(classify(words)) is kind, words


def test_warnings_in_front_do_not_hide_the_reason_and_are_not_in_it() -> None:
    warnings = (
        "perl: warning: Setting locale failed.\nperl: warning: Please check that your locale settings:\n"
        '\tLANGUAGE = (unset),\n\tLC_ALL = "de_DE.UTF-8",\n\tLANG = "en_US.UTF-8"\n'
        "    are supported and installed on your system.\n"
        'perl: warning: Falling back to the standard locale ("C").\n'
        "Use of uninitialized value $x in concatenation (.) or string at /usr/share/perl5/PVE/X.pm line 7.\n"
    )
    error = classify(f"{warnings}\x1b[31mVM is locked (backup)\x1b[0m\r\n", 255)
    assert (type(error), error.text) == (errors.Locked, "VM is locked (backup)")
    with pytest.raises(errors.StartFailed, match=r": start failed: QEMU exited with code 1\Z"):
        PveshApi(Recorded((255, "start failed: QEMU exited with code 1\n", warnings))).get("/x")


# -- what looks like success --------------------------------------------------------------------------

BEHIND_EXIT_0 = [
    name
    for name, record in EVERY.items()
    if record["rc"] == 0
    and record["stderr"].strip()
    and "UPID:" in record["stdout"]
    and record["cmd"].startswith(("pvesh create", "pvesh delete"))
]


@pytest.mark.parametrize("name", BEHIND_EXIT_0)
def test_a_call_that_exits_with_0_fails_as_its_task_did(name: str) -> None:
    record = EVERY[name]
    said = record["stderr"].strip().splitlines()[-1]
    api = PveshApi(Recorded(record, ended(said), log("TASK ERROR: " + said)))
    with pytest.raises(ApiError) as caught:
        guests.awaited(api, lambda: api.post("/x"), 5, again=False)
    kind = type(classify(record["stderr"]))
    assert type(caught.value) is (errors.TaskFailed if kind is ApiError else kind)
    assert said in str(caught.value)


def test_there_are_such_recordings() -> None:
    assert len(BEHIND_EXIT_0) >= 15


@pytest.mark.parametrize("name", ["import-014", "import-015", "noquorum-029"])
def test_qm_that_says_an_error_and_exits_with_0_is_not_what_calls_are_made_by(name: str) -> None:
    # `qm` does so for some commands; whatever changes something is an API call whose task is read.
    assert EVERY[name]["rc"] == 0
    package = Path(__file__).parents[2] / "pytest_nestedpve"
    for module in package.rglob("*.py"):
        if "lab" not in module.relative_to(package).parts:
            assert not re.search(r'\["qm"|"qm ', module.read_text(encoding="utf-8")), module


UPID = "UPID:father:00001037:0008381C:6B04D317:qmcreate:150:root@pam:"
PERL = 'perl: warning: Setting locale failed.\n\tLANG = "de_DE"\n    are supported and installed.\n'


@pytest.mark.parametrize(
    "printed",
    [
        f"{UPID}\n",
        f'"{UPID}"\n',
        f'creating a clone of VM 101 with ID 105"{UPID}"\n',
        f'transferred 1.0 GiB of 1.0 GiB (100.00%)\ntrying to acquire lock...\n"{UPID}"\n',
        f'WARN: no efidisk configured! Using temporary efivars disk.\n"{UPID}"\n',
        f'{PERL}"{UPID}"\n',
        f'\x1b[33mWARN: x\x1b[0m\r\n"{UPID}"\r\n',
        f'downloading http://x/y.img to /var/lib/vz\n 0K .......... .......... 50% 3.1M 0s\r100%\n"{UPID}"\n',
        f'{UPID.replace("150", "149")}\n"{UPID}"\n',
    ],
    ids=["bare", "quoted", "glued", "log", "warn", "perl", "colours", "wget", "another's before it"],
)
def test_the_task_of_a_call_is_found_behind_whatever_it_printed(printed: str) -> None:
    ssh = Recorded((0, printed, ""), ended("OK"))
    done = guests.create_diskless(PveshApi(ssh), "father", 150, name="x")
    assert done.upid == UPID
    assert ssh.asked[1][4] == f"/nodes/father/tasks/{UPID}/status"


@pytest.mark.parametrize(
    "printed",
    [
        "",
        "null\n",
        "{}\n",
        '"done"\n',
        "OK\n",
        '"UPID:father:1:2:3:qmcreate:150:root@pam:"\n',
        f'["{UPID}"]\n',
    ],
)
def test_a_call_that_must_fork_a_task_and_names_none_did_not_succeed(printed: str) -> None:
    with pytest.raises(UnreadableAnswer):
        guests.create_diskless(PveshApi(Recorded((0, printed, ""))), "father", 150, name="x")


def test_downloads_print_wgets_output_in_front_of_their_task() -> None:
    for name in ("ownL-005", "ownL-006", "ownL-007", "ownL-009", "ownL-010"):
        upid = read_answer(EVERY[name]["stdout"])
        assert tasks.parse_upid(upid).type == "download"


@pytest.mark.parametrize("exitstatus", ["WARNINGS: 1", "WARNINGS: 12"])
def test_warnings_are_success_and_are_told(exitstatus: str) -> None:
    done = tasks.wait_task(PveshApi(Recorded(ended(exitstatus))), UPID, timeout=5)
    assert done.warnings


@pytest.mark.parametrize("exitstatus", ["WARNINGS: none", "WARNINGS: 1 and then it failed", "ok", "OK?"])
def test_only_pves_own_two_words_are_success(exitstatus: str) -> None:
    with pytest.raises(errors.TaskFailed):
        tasks.wait_task(PveshApi(Recorded(ended(exitstatus), log())), UPID, timeout=5)


def test_a_task_that_failed_with_control_sequences_is_told_without_them() -> None:
    api = PveshApi(Recorded(ended("\x1b[31mboom\x1b[0m\x00"), log("\x1b]0;title\x07line")))
    with pytest.raises(errors.TaskFailed) as caught:
        tasks.wait_task(api, UPID, timeout=5)
    assert str(caught.value) == f"task {UPID} ended: boom\n    line"


def test_the_index_of_a_missing_vm_is_no_vm() -> None:
    index = EVERY["basic-136"]
    assert index["rc"] == 0
    for read in (guests.guest_config, guests.guest_status):
        with pytest.raises(UnreadableAnswer):
            read(PveshApi(Recorded(index)), "father", 999)


def test_an_empty_list_is_one_and_nothing_at_all_is_none() -> None:
    assert guests.list_guests(PveshApi(Recorded((0, "[]\n", "")))) == []
    for printed in ("", "\n", f"{PERL}\n"[:1], "null\n", "{}\n"):
        with pytest.raises(UnreadableAnswer):
            guests.list_guests(PveshApi(Recorded((0, printed, ""))))
    with pytest.raises(UnreadableAnswer):
        entries(None)


# -- what is done next --------------------------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    with environments(MemoryHost(tmp_path / "host.json"), tmp_path) as make:
        yield make()


@pytest.fixture
def memory(env: Environment, tmp_path: Path) -> MemoryHost:
    create_pool(env.outer.api, env.run, env.settings, 1_800_000_000)
    return MemoryHost(tmp_path / "host.json")


class Spoilt(MemoryApi):
    """A host whose answers to some calls somebody else gives; None: the host's own."""

    def __init__(self, host: MemoryHost, instead: Callable[[str, str, dict[str, Any]], Any]) -> None:
        super().__init__(host)
        self.memory = host
        self.instead = instead

    def _call(self, method: str, path: str, params: dict[str, Any]) -> Any:
        given = self.instead(method, path, params)
        return super()._call(method, path, params) if given is None else given


def spoilt(memory: MemoryHost, instead: Callable[[str, str, dict[str, Any]], Any]) -> PveHost:
    connected = memory.connect()
    return PveHost(connected.name, connected.ssh, Spoilt(memory, instead), connected.node)


def failing(memory: MemoryHost, verb: str, path: str, words: str, *, behind: bool, times: int) -> PveHost:
    """A host on which some calls fail `times` times with these words: refused, or `behind` exit status 0."""
    left = [times]

    def instead(method: str, asked: str, _params: dict[str, Any]) -> Any:
        if method != verb or not re.fullmatch(path, asked) or left[0] == 0:
            return None
        left[0] -= 1
        with memory.open() as model:
            model.state["commands"].append(f"{method} {asked}")
            if not behind:
                raise classify(words, 255, f"{method} {asked}")
            effect = {"do": "fail", "node": "father", "params": {"text": words.strip().splitlines()[-1]}}
            return model.fork("qmdestroy", asked.rpartition("/")[2], effect)

    return spoilt(memory, instead)


def one_of_ours(env: Environment) -> Candidate:
    vmid = create_marked(env.outer, env.run, env.settings).vmid
    return next(each for each in discover(env.outer, env.settings, env.run.id) if each.vmid == vmid)


def end(env: Environment, host: PveHost, candidate: Candidate, budget: float = 0.6) -> Outcome:
    return destroy(host, env.settings, env.run.id, [candidate], budget=budget)[0]


def deletes(memory: MemoryHost, candidate: Candidate) -> list[str]:
    """What was asked about the VM, from its first delete on: `delete`, and what it was proved by."""
    with memory.open() as model:
        asked = [line for line in model.state["commands"] if f"/qemu/{candidate.vmid}" in line]
    words = ["delete" if line.startswith("DELETE") else line.split()[1].rpartition("/")[2] for line in asked]
    return words[words.index("delete") :] if "delete" in words else []


PASSES = (
    ("concurrency-017", True), ("destroy-004", False), ("services-024", False), ("noquorum-029", True),
    ("nodedown-022", False), ("basic-030", False), ("lock-008", True), ("power-072", True),
)  # fmt: skip
STAYS = (("protection-003", False), ("clone-020", True), ("destroy-024", False), ("basic-065", False))


@pytest.mark.parametrize(("name", "behind"), PASSES)
def test_a_destroy_that_failed_for_what_may_pass_is_tried_again_and_proved_before(
    env: Environment, memory: MemoryHost, name: str, behind: bool
) -> None:
    mine = one_of_ours(env)
    words = EVERY[name]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=behind, times=1)
    assert end(env, host, mine, budget=20).result == "gone"
    asked = deletes(memory, mine)
    assert asked.count("delete") == 2
    assert asked[asked.index("delete", 1) - 1] == "config"


@pytest.mark.parametrize(("name", "behind"), STAYS)
def test_a_destroy_that_failed_for_what_stays_is_given_up_with_pves_words(
    env: Environment, memory: MemoryHost, name: str, behind: bool
) -> None:
    mine = one_of_ours(env)
    words = EVERY[name]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=behind, times=99)
    outcome = end(env, host, mine, budget=20)
    assert (outcome.result, outcome.reason) == ("left", classify(words).text)
    # Once, and once more after the others, on which it may have hung.
    assert deletes(memory, mine).count("delete") == 2


def test_a_destroy_that_never_works_ends_with_its_budget_and_the_last_reason(
    env: Environment, memory: MemoryHost
) -> None:
    mine = one_of_ours(env)
    words = EVERY["services-024"]["stderr"]
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=False, times=99)
    outcome = end(env, host, mine)
    assert outcome.result == "left"
    assert outcome.reason.endswith("Unable to load access control list: Connection refused")


def test_a_vm_is_gone_when_the_host_shows_none_and_not_when_a_call_says_so(
    env: Environment, memory: MemoryHost
) -> None:
    mine = one_of_ours(env)
    words = f"Configuration file 'nodes/father/qemu-server/{mine.vmid}.conf' does not exist"
    host = failing(memory, "DELETE", f"/nodes/father/qemu/{mine.vmid}", words, behind=True, times=1)
    assert end(env, host, mine, budget=20).result == "gone"
    with memory.open() as model:
        assert str(mine.vmid) not in model.state["vms"]


@pytest.mark.parametrize("name", ["create-049", "clone-012", "destroy-041"])
def test_an_id_that_is_taken_meanwhile_is_passed_over(
    env: Environment, memory: MemoryHost, name: str
) -> None:
    host = failing(memory, "POST", "/nodes/father/qemu", EVERY[name]["stderr"], behind=False, times=1)
    made = create_marked(host, env.run, env.settings)
    assert prove(env.outer.api, env.settings, made, env.run).ok


def test_a_create_that_was_refused_for_good_is_given_up(env: Environment, memory: MemoryHost) -> None:
    host = failing(memory, "POST", "/nodes/father/qemu", EVERY["create-007"]["stderr"], behind=False, times=9)
    with pytest.raises(errors.BadParameter, match="valid DNS name"):
        create_marked(host, env.run, env.settings)
    with memory.open() as model:
        assert model.state["vms"] == {}
        assert [line for line in model.state["commands"] if line == "POST /nodes/father/qemu"] != []


def test_a_create_whose_worker_was_killed_takes_another_id_and_the_teardown_takes_the_rest(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pytest_nestedpve.creation._SETTLE", 0.3)
    killed: list[str] = []

    def instead(method: str, path: str, params: dict[str, Any]) -> Any:
        if (method, path) != ("POST", "/nodes/father/qemu") or killed:
            return None
        with memory.open() as model:
            model.begin_create("father", params)
            killed.append(model.fork("qmcreate", str(params["vmid"]), {"do": "wait", "node": "father"}))
            model.kill(model.state["tasks"][-1])
        return killed[0]

    made = create_marked(spoilt(memory, instead), env.run, env.settings)
    assert prove(env.outer.api, env.settings, made, env.run).ok
    env.audit.write("task", upid=killed[0])
    assert teardown(env).left == ()
    with memory.open() as model:
        assert model.state["vms"] == {}


def test_a_guest_whose_agent_or_itself_is_down_is_asked_again_and_a_host_in_trouble_is_told() -> None:
    for name in ("agent-005", "agent-012", "agent-018"):
        assert agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104) is False
    for name, kind in (("services-024", errors.ClusterFilesystemDown), ("basic-137", errors.GuestNotFound)):
        with pytest.raises(kind):
            agent.ping(PveshApi(Recorded(EVERY[name])), "father", 104)


def test_a_start_that_failed_is_told_and_one_that_was_needless_is_done() -> None:
    for name, kind in (("power-034", errors.StartFailed), ("clone-023", errors.WrongState)):
        said = EVERY[name]["stderr"].strip()
        with pytest.raises(kind, match=re.escape(said)):
            guests.start(PveshApi(Recorded(EVERY[name], ended(said), log())), "father", 101)
    said = EVERY["power-008"]["stderr"].strip()
    assert guests.start(PveshApi(Recorded(EVERY["power-008"], ended(said), log())), "father", 103) is None


def test_a_guest_that_does_not_go_down_in_time_is_told() -> None:
    record = EVERY["power-048"]
    with pytest.raises(errors.GuestTimeout, match="got timeout"):
        guests.shutdown(
            PveshApi(Recorded(record, ended(record["stderr"].strip()), log())), "father", 103, timeout=5
        )


def test_a_pool_is_gone_when_pve_says_that_and_not_for_other_words() -> None:
    gone = "pool 'npve-1' does not exist"
    assert read_pool(PveshApi(Recorded((2, "", gone))), "npve-1") is None
    for answer in (
        (2, "", "no such resource '/pools'"),
        (255, "", EVERY["ownB-046"]["stderr"]),
        (0, "", ""),
        (0, "{}", ""),
        (0, "[]", ""),
        (0, '[{"poolid":"npve-2","comment":""}]', ""),
    ):
        with pytest.raises(ApiError):
            read_pool(PveshApi(Recorded(answer)), "npve-1")


@pytest.mark.parametrize("name", ["nodedown-022", "basic-079"])
def test_a_node_that_is_off_holds_up_no_teardown_on_the_others(
    env: Environment, memory: MemoryHost, name: str
) -> None:
    mine = one_of_ours(env)
    listed = {"type": "qemu", "vmid": 99_999, "node": "gone", "status": "unknown"}

    def instead(_method: str, path: str, params: dict[str, Any]) -> Any:
        if path.startswith("/nodes/gone/"):
            raise classify(EVERY[name]["stderr"], 255, path)
        if path == "/cluster/resources":
            return [*MemoryApi(memory).get(path, **params), listed]
        return None

    host = spoilt(memory, instead)
    assert [each.vmid for each in discover(host, env.settings, env.run.id)] == [mine.vmid]
