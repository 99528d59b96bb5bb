"""Recorded answers of PVE 9.2 fed to the client: typed errors, awaited tasks, readers that never crash."""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from recorded import RECORDED, Recorded, ended, log

from pytest_nestedpve.pve import agent, errors, qemu, tasks
from pytest_nestedpve.pve.answers import entries, flag, mapping, read_answer, text, whole
from pytest_nestedpve.pve.api import call_limit
from pytest_nestedpve.pve.errors import ApiError, UnreadableAnswer, classify
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.pve.pvesh import PveshApi

# What the client makes of the words of each recorded failure, whichever command printed them.
FAILURES: dict[type[ApiError], str] = {
    errors.GuestNotFound: "basic-104 basic-108 basic-141 basic-142 cluster-040",
    errors.NotFound: "basic-077 basic-078 power-038 power-044 clone-009 snapshot-013 snapshot-031 create-052 "
    "tasks-014 cluster-057 storage-005 pveum-005 pveum-025",
    errors.AlreadyExists: "clone-005 snapshot-003 snapshot-028 destroy-041 create-003 create-056 pveum-007 "
    "ownF-036 ownL-005",
    errors.Running: "power-002 power-008 power-009 destroy-003 cluster-036",
    errors.NotRunning: "power-018 agent-015 agent-018",
    errors.Locked: "lock-001 lock-008 lock-009",
    errors.LockTimeout: "tasks-025 concurrency-017",
    errors.Protected: "protection-002",
    errors.InUse: "clone-018 clone-020 destroy-024 ownB-043 ownB-040",
    errors.Changed: "ownD-007",
    errors.AgentUnavailable: "agent-001 agent-007 agent-012",
    errors.NoQuorum: "noquorum-007 noquorum-011 noquorum-020 noquorum-023",
    errors.ClusterFilesystemDown: "services-024",
    errors.NodeUnreachable: "nodedown-022 basic-079",
    errors.BadParameter: "basic-084 basic-094 basic-096 tasks-016 config-008",
    errors.StartFailed: "power-033 power-034",
    errors.GuestTimeout: "power-045 power-048",
    errors.Unsupported: "storage-047",
    errors.WrongState: "power-057 clone-023",
    errors.WrongContent: "ownL-007",
    errors.DownloadFailed: "ownL-009",
}


# -- calls --------------------------------------------------------------------------------------------


def test_a_call_is_one_pvesh_with_quoted_parameters() -> None:
    ssh = Recorded((0, "", ""))
    PveshApi(ssh).put(
        "/access/acl", path="/pool/x", roles=["A", "B"], propagate=True, delete=None, comment="ä b"
    )
    assert [shlex.join(words) for words in ssh.asked] == [
        "env LC_ALL=C.UTF-8 pvesh set /access/acl --path /pool/x --roles A --roles B --propagate 1 "
        "--comment 'ä b' --output-format json"
    ]


def test_secret_values_are_in_no_message() -> None:
    words = "400 Parameter verification failed.\ncipassword: 'hunter22' is too short"
    ssh = Recorded((2, "", words))
    with pytest.raises(errors.BadParameter) as caught:
        PveshApi(ssh).post("/nodes/father/qemu/100/config", cipassword="hunter22")
    assert ssh.secret == [True]
    assert "hunter22" not in str(caught.value) + repr(caught.value.text)


def test_the_value_of_a_new_token_is_in_no_message() -> None:
    ssh = Recorded((0, '{"value":"hunter22"', ""))
    with pytest.raises(UnreadableAnswer) as caught:
        PveshApi(ssh).post("/access/users/root@pam/token/npve-1")
    assert ssh.secret == [True]
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("path", ["nodes", "", "/a\0b"])
def test_a_path_that_is_none_is_not_sent(path: str) -> None:
    ssh = Recorded()
    with pytest.raises(errors.BadParameter):
        PveshApi(ssh).get(path)
    assert ssh.asked == []


def test_reads_are_limited_tighter_than_calls_that_last_as_long_as_their_task() -> None:
    ssh = Recorded((0, "[]", ""), (0, "", ""), (0, "", ""))
    api = PveshApi(ssh)
    api.get("/nodes")
    api.post("/nodes/father/qemu")
    with call_limit(5):
        api.post("/nodes/father/qemu")
    assert ssh.limits == [60.0, 900.0, 5]


def test_a_host_without_pvesh_is_no_pve() -> None:
    for words in ("bash: line 1: pvesh: command not found", "env: 'pvesh': No such file or directory"):
        with pytest.raises(errors.NoPve):
            PveshApi(Recorded((127, "", words))).get("/version")


def test_a_pvesh_that_was_killed_is_no_answer() -> None:
    with pytest.raises(errors.SshError, match="ended by a signal"):
        PveshApi(Recorded((-1, "", ""))).get("/version")


# -- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in FAILURES.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_recorded_words_become_their_typed_error(kind: type[ApiError], name: str) -> None:
    record = RECORDED[name]
    error = classify(record["stderr"], record["rc"], "call")
    assert type(error) is kind
    assert error.rc == record["rc"]
    assert error.text
    assert "<api_path>" not in error.text


@pytest.mark.parametrize("name", [name for name, record in RECORDED.items() if record["rc"]])
def test_a_recorded_exit_status_other_than_0_raises(name: str) -> None:
    with pytest.raises(ApiError) as caught:
        PveshApi(Recorded(RECORDED[name])).post("/x")
    assert caught.value.text in caught.value.args[0]


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, record in RECORDED.items()
        if record["cmd"].startswith(("pvesh create", "pvesh delete"))
        and record["rc"] == 0
        and "UPID:" in record["stdout"]
    ],
)
def test_a_recorded_task_gives_its_id_whatever_stands_before_it(name: str) -> None:
    record = RECORDED[name]
    upid = PveshApi(Recorded(record)).post("/x")
    task = tasks.parse_upid(upid)
    assert task.text == upid
    assert f"/nodes/{task.node}/" in record["cmd"]
    assert task.user == "root@pam"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("power-009", None),  # running already: `start` takes it for done
        ("basic-141", errors.GuestNotFound),
        ("lock-009", errors.Locked),
        ("clone-020", errors.InUse),
        ("snapshot-028", errors.AlreadyExists),
        ("create-052", errors.NotFound),
        ("power-034", errors.StartFailed),
        ("ownL-005", errors.AlreadyExists),
    ],
)
def test_a_task_that_failed_behind_exit_0_is_found_out(name: str, kind: type[ApiError] | None) -> None:
    record = RECORDED[name]
    said = record["stderr"].splitlines()[0]
    api = PveshApi(Recorded(record, ended(said), log("trying", f"TASK ERROR: {said}")))
    if kind is None:
        assert qemu.start(api, "father", 103) is None
        return
    with pytest.raises(kind, match=re.escape(said[:20])) as caught:
        qemu.awaited(api, lambda: api.post("/x"), 5)
    failed = caught.value if isinstance(caught.value, errors.TaskFailed) else caught.value.__cause__
    assert isinstance(failed, errors.TaskFailed)
    assert failed.log[-1] == f"TASK ERROR: {said}"


@pytest.mark.parametrize(
    ("exitstatus", "good", "warnings"),
    [("OK", True, False), ("WARNINGS: 1", True, True), ("unexpected status", False, False)],
)
def test_how_a_task_ended_is_read_from_its_exit_status(exitstatus: str, good: bool, warnings: bool) -> None:
    upid = "UPID:father:00001037:0008381C:6B04D317:qmcreate:150:root@pam:"
    api = PveshApi(Recorded(ended(exitstatus), log("line")))
    if good:
        assert tasks.wait_task(api, upid, timeout=5) == tasks.TaskResult(upid, "father", exitstatus, warnings)
    else:
        with pytest.raises(errors.TaskFailed, match=exitstatus):
            tasks.wait_task(api, upid, timeout=5)


def test_a_task_is_awaited_while_it_runs_and_given_up_at_the_limit() -> None:
    upid = "UPID:father:00001037:0008381C:6B04D317:qmcreate:150:root@pam:"
    running = (0, '{"status":"running"}\n', "")
    assert (
        tasks.wait_task(PveshApi(Recorded(running, running, ended("OK"))), upid, timeout=5).exitstatus == "OK"
    )
    with pytest.raises(errors.CommandTimeout, match=r"the end of task UPID:.*last seen: status 'running'"):
        tasks.wait_task(PveshApi(Recorded(*[running] * 50)), upid, timeout=0.3)


def test_recorded_task_states_and_logs_are_read() -> None:
    upid = "UPID:father:0000103E:00083967:6B04D31A:qmstart:999:root@pam:"
    with pytest.raises(errors.TaskFailed) as caught:
        tasks.wait_task(PveshApi(Recorded(RECORDED["tasks-009"], log())), upid, timeout=5)
    assert type(caught.value.__cause__) is errors.GuestNotFound
    assert tasks.task_log(PveshApi(Recorded(RECORDED["tasks-006"])), upid) == ("TASK OK",)


def test_a_stop_that_met_a_held_lock_file_is_tried_again() -> None:
    lock = "can't lock file '/var/lock/qemu-server/lock-977.conf' - got timeout"
    upid = '"UPID:father:00001037:0008381C:6B04D317:qmstop:977:root@pam:"\n'
    ssh = Recorded((0, upid, lock), ended(lock), log(), (0, upid, ""), ended("OK"))
    assert qemu.stop(PveshApi(ssh), "father", 977, timeout=20).exitstatus == "OK"
    assert [words[3] for words in ssh.asked].count("create") == 2


def test_a_destroy_is_never_sent_again_by_itself_and_never_purges() -> None:
    record = RECORDED["concurrency-017"]
    ssh = Recorded(record, ended(record["stderr"].strip()), log())
    with pytest.raises(errors.LockTimeout):
        qemu.destroy(PveshApi(ssh), "father", 153)
    assert shlex.join(ssh.asked[0]) == (
        "env LC_ALL=C.UTF-8 pvesh delete /nodes/father/qemu/153 --output-format json"
    )
    assert sum("delete" in words for words in ssh.asked) == 1


def test_a_vm_is_made_without_volumes() -> None:
    with pytest.raises(errors.BadParameter, match="scsi0"):
        qemu.create_diskless(PveshApi(Recorded()), "father", 150, name="x", scsi0="local:4")
    for node, vmid in (("a/b", 150), ("", 150), ("father", 99), ("father", True)):
        with pytest.raises(errors.BadParameter):
            qemu.destroy(PveshApi(Recorded()), node, vmid)


# -- guests and agents --------------------------------------------------------------------------------


def test_guests_are_read_from_the_resources() -> None:
    answer = [
        {"type": "qemu", "vmid": 101, "node": "father", "name": "VM 101", "status": "stopped", "template": 0},
        {
            "type": "qemu",
            "vmid": "100",
            "node": "father",
            "name": 7,
            "tags": "B;a",
            "pool": "npve-1",
            "lock": "create",
        },
        {"type": "lxc", "vmid": 102, "node": "father", "template": "1", "future": {"x": 1}},
        {"type": "storage", "storage": "local"},
        {"type": "qemu", "vmid": None, "node": "father"},
        {"type": "qemu", "vmid": 103, "node": "../x"},
        "nonsense",
    ]
    found = qemu.list_guests(PveshApi(Recorded((0, json.dumps(answer), ""))))
    assert [(guest.vmid, guest.name, guest.kind, guest.template) for guest in found] == [
        (100, "7", "qemu", False),
        (101, None, "qemu", False),
        (102, None, "lxc", True),
    ]
    assert (found[0].tags, found[0].pool, found[0].lock) == (("b", "a"), "npve-1", "create")


def test_the_local_node_is_asked_once() -> None:
    ssh = Recorded((0, '[{"type":"node","name":"father","local":1,"nodeid":0}]', ""))
    host = PveHost("outer", ssh, PveshApi(ssh))
    assert (host.node, host.node) == ("father", "father")
    for answer in (
        "[]",
        "{}",
        '[{"type":"node","name":"a/b","local":1}]',
        '[{"type":"node","name":"x","local":0}]',
    ):
        ssh = Recorded((0, answer, ""))
        with pytest.raises(UnreadableAnswer):
            _ = PveHost("outer", ssh, PveshApi(ssh)).node


@pytest.mark.parametrize("name", ["agent-007", "agent-015"])
def test_an_agent_that_is_not_there_yet_is_no_error_to_a_ping(name: str) -> None:
    assert agent.ping(PveshApi(Recorded(RECORDED[name])), "father", 104) is False
    assert agent.ping(PveshApi(Recorded((0, "", ""))), "father", 104) is True


def test_an_agent_of_a_host_in_trouble_is_an_error() -> None:
    with pytest.raises(errors.ClusterFilesystemDown):
        agent.ping(PveshApi(Recorded(RECORDED["services-024"])), "father", 104)


def test_the_address_is_that_of_the_mac_and_no_other() -> None:
    found = agent.interfaces(PveshApi(Recorded(RECORDED["agent-024"])), "father", 120)
    assert found[0].name == "lo"
    macs = {interface.mac: interface.ipv4 for interface in found}
    mac, addresses = next((mac, ipv4) for mac, ipv4 in macs.items() if not mac.startswith("00:00:00"))
    assert agent.ipv4_for_mac(found, mac.upper()) == (addresses[0] if addresses else None)
    assert agent.ipv4_for_mac(found, "00:00:00:00:00:00") is None
    assert agent.ipv4_for_mac(found, "02:00:00:00:00:01") is None


def _blob(kind: str, size: int = 51) -> str:
    name = kind.encode()
    return base64.b64encode(len(name).to_bytes(4, "big") + name + bytes(size)).decode()


def test_a_host_key_is_one_line_of_type_and_base64() -> None:
    key = f"ssh-ed25519 {_blob('ssh-ed25519')}"
    assert agent.one_key(f"{key} root@guest\n") == key
    for poison in (
        f"{key}\n* {key}\n",
        f"{key} x\r* {key}\n",
        f"* {key}\n",
        f"@cert-authority * {key}\n",
        f"ssh-ed25519 {_blob('ssh-rsa')}\n",
        f"ssh-dss {_blob('ssh-dss')}\n",
        "ssh-ed25519 AAAA\n",
        "ssh-ed25519 !!!!\n",
        f"{key}\0\n",
        "",
    ):
        with pytest.raises(UnreadableAnswer):
            agent.one_key(poison)


def test_host_keys_of_a_guest_are_those_it_has() -> None:
    key = f"ssh-ed25519 {_blob('ssh-ed25519')}"
    missing = (255, "", "Agent error: Guest agent command failed, error was 'Failed to open file'")
    given_key = (0, json.dumps({"bytes-read": 90, "content": f"{key} root@x\n"}), "")
    assert agent.host_keys(PveshApi(Recorded(given_key, missing, missing)), "father", 120) == (key,)
    with pytest.raises(UnreadableAnswer, match="found none"):
        agent.host_keys(PveshApi(Recorded(missing, missing, missing)), "father", 120)
    with pytest.raises(errors.AgentUnavailable):
        agent.host_keys(PveshApi(Recorded(RECORDED["agent-007"])), "father", 120)


_WORDS = [record["stderr"] for record in RECORDED.values()]

# -- readers ------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
UPIDS = st.builds(
    "UPID:{}:{:08X}:{:08X}:{:08X}:{}:{}:{}:".format,
    st.sampled_from(["father", "node-b", "n1"]),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**36 - 1),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["qmcreate", "imgdel", "download"]),
    st.sampled_from(["150", "", "102@local"]),
    st.sampled_from(["root@pam", "root@pam!npve-1a2b3c4d5e6f"]),
)
NOISE = st.lists(
    st.sampled_from(
        [
            "WARN: something is odd",
            "trying to acquire lock...",
            "transferred 1.0 GiB of 1.0 GiB (100.00%)",
            "\x1b[33mwarning\x1b[0m",
            "100",
            '{"half": ',
            "\ufffd\x00\x07",
            "user config - ignore invalid acl token 'root@pam!x'",
        ]
    ),
    max_size=4,
)


@given(JSON, NOISE)
def test_an_answer_is_read_whatever_stands_in_front(data: Any, noise: list[str]) -> None:
    printed = "".join(f"{line}\n" for line in noise) + json.dumps(data, ensure_ascii=False) + "\n"
    assert read_answer(printed) == data


@given(UPIDS, NOISE, st.booleans(), st.booleans())
def test_a_task_id_is_read_bare_quoted_and_without_a_newline_before_it(
    upid: str, noise: list[str], quoted: bool, glued: bool
) -> None:
    front = "".join(f"{line}\n" for line in noise)
    glue = "creating a clone of VM 101 with ID 105" if glued else ""
    printed = f'{front}{glue}"{upid}"\n' if quoted or glued else f"{front}{upid}\n"
    assert read_answer(printed) == upid
    assert tasks.parse_upid(upid).text == upid


@pytest.mark.parametrize("log", ["", "creating a clone of VM 101 with ID 105", "update VM 105: -memory 64"])
def test_another_nodes_output_as_one_string_is_read(log: str) -> None:
    upid = "UPID:nodea:00000322:000A44B9:6B04D856:qmclone:101:root@pam:"
    assert read_answer(json.dumps(f'{log}"{upid}"') + "\n") == upid
    assert read_answer(json.dumps("update VM 105: -memory 64")) is None
    assert read_answer(json.dumps(f"see {upid}")) == f"see {upid}"


@given(st.text() | st.binary().map(lambda raw: raw.decode("utf-8", "replace")))
@example("[" * 100_000)
@example('{"a": NaN}')
@example("1" * 5000)
@example('"\\ud800"')
@example("\x1b[")
@example("UPID:father:0:0:0:x:y:z:")
def test_no_answer_crashes_the_reader(printed: str) -> None:
    try:
        answer = read_answer(printed)
    except UnreadableAnswer:
        return
    json.dumps(answer, ensure_ascii=False).encode("utf-8")


@given(JSON.filter(lambda data: isinstance(data, (list, dict)) and bool(data)), st.data())
def test_half_an_answer_is_no_answer(data: Any, draw: st.DataObject) -> None:
    printed = json.dumps(data)
    cut = draw.draw(st.integers(1, len(printed) - 1))
    with pytest.raises(UnreadableAnswer):
        read_answer(printed[:cut])


def test_five_megabytes_are_read() -> None:
    data = [{"vmid": n, "name": "ä" * 50, "node": "father"} for n in range(40_000)]
    printed = "WARN: x\n" + json.dumps(data, ensure_ascii=False) + "\n"
    assert len(printed.encode()) > 5_000_000
    assert read_answer(printed) == data
    with pytest.raises(UnreadableAnswer) as caught:
        read_answer(printed[:-3])
    assert len(str(caught.value)) < 1000


@given(st.text(max_size=300) | st.lists(st.sampled_from(_WORDS), max_size=3).map("\n".join))
def test_no_words_crash_the_classification(words: str) -> None:
    error = classify(words, 255, "get /x")
    assert isinstance(error, ApiError)
    assert error.text
    str(error).encode("utf-8", "replace")


FIELD = JSON | st.sampled_from(["1", "0", "qemu", "father", "100", "a;b"])


@given(
    st.dictionaries(
        st.sampled_from(["vmid", "node", "type", "name", "status", "pool", "tags", "template", "lock", "x"]),
        FIELD,
    )
)
def test_a_strange_entry_is_no_guest_or_one_that_can_be_trusted(entry: dict[str, Any]) -> None:
    guest = qemu.read_guest(entry)
    if guest is None:
        return
    assert type(guest.vmid) is int
    assert guest.vmid >= 100
    assert guest.kind in ("qemu", "lxc")
    # What is not surely "no template" is one, and stays untouched.
    assert guest.template == (entry.get("template") not in (None, 0, "0", "", False))


@given(JSON)
def test_small_readers_take_anything(value: Any) -> None:
    assert whole(value) is None or type(whole(value)) is int
    assert isinstance(flag(value), bool)
    assert text(value) is None or isinstance(text(value), str)
    assert isinstance(qemu.read_tags(value), tuple)
    readers: tuple[Callable[[Any], Any], ...] = (entries, mapping, tasks.parse_upid)
    for reader in readers:
        try:
            reader(value)
        except UnreadableAnswer:
            continue


@given(JSON)
def test_no_agent_answer_crashes(answer: Any) -> None:
    printed = (0, json.dumps(answer), "")
    for call in (agent.interfaces, agent.host_keys, qemu.guest_config, qemu.guest_status):
        try:
            call(PveshApi(Recorded(*[printed] * 3)), "father", 120)
        except UnreadableAnswer:
            continue
