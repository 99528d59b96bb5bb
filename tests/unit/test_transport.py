"""The client with recorded answers of PVE 9.2: typed errors, awaited tasks, robust readers."""

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

# The error type of each recorded failure, by the recording's name.
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


def test_a_call_is_a_pvesh_command_with_quoted_parameters() -> None:
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
def test_an_invalid_path_is_not_sent(path: str) -> None:
    ssh = Recorded()
    with pytest.raises(errors.BadParameter):
        PveshApi(ssh).get(path)
    assert ssh.asked == []


def test_reads_have_a_shorter_limit_than_calls_that_wait_for_a_task() -> None:
    ssh = Recorded((0, "[]", ""), (0, "", ""), (0, "", ""))
    api = PveshApi(ssh)
    api.get("/nodes")
    api.post("/nodes/father/qemu")
    with call_limit(5):
        api.post("/nodes/father/qemu")
    assert ssh.limits == [60.0, 900.0, 5]


def test_a_host_without_pvesh_is_reported_as_no_pve() -> None:
    for message in ("bash: line 1: pvesh: command not found", "env: 'pvesh': No such file or directory"):
        with pytest.raises(errors.NoPve):
            PveshApi(Recorded((127, "", message))).get("/version")


def test_a_killed_pvesh_is_an_error() -> None:
    with pytest.raises(errors.SshError, match="ended by a signal"):
        PveshApi(Recorded((-1, "", ""))).get("/version")


# -- failures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind, names in FAILURES.items() for name in names.split()],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_recorded_failure_has_its_error_type(kind: type[ApiError], name: str) -> None:
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
def test_the_id_of_a_recorded_task_is_read_after_any_output(name: str) -> None:
    record = RECORDED[name]
    upid = PveshApi(Recorded(record)).post("/x")
    task = tasks.parse_upid(upid)
    assert task.text == upid
    assert f"/nodes/{task.node}/" in record["cmd"]
    assert task.user == "root@pam"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("power-009", None),  # already running: no error for `start`
        ("basic-141", errors.GuestNotFound),
        ("lock-009", errors.Locked),
        ("clone-020", errors.InUse),
        ("snapshot-028", errors.AlreadyExists),
        ("create-052", errors.NotFound),
        ("power-034", errors.StartFailed),
        ("ownL-005", errors.AlreadyExists),
    ],
)
def test_a_failed_task_of_a_call_with_exit_status_0_is_an_error(
    name: str, kind: type[ApiError] | None
) -> None:
    record = RECORDED[name]
    reason = record["stderr"].splitlines()[0]
    api = PveshApi(Recorded(record, ended(reason), log("trying", f"TASK ERROR: {reason}")))
    if kind is None:
        assert qemu.start(api, "father", 103) is None
        return
    with pytest.raises(kind, match=re.escape(reason[:20])) as caught:
        qemu.awaited(api, lambda: api.post("/x"), 5)
    failed = caught.value if isinstance(caught.value, errors.TaskFailed) else caught.value.__cause__
    assert isinstance(failed, errors.TaskFailed)
    assert failed.log[-1] == f"TASK ERROR: {reason}"


@pytest.mark.parametrize(
    ("exitstatus", "succeeds", "warnings"),
    [("OK", True, False), ("WARNINGS: 1", True, True), ("unexpected status", False, False)],
)
def test_the_result_of_a_task_depends_on_its_exit_status(
    exitstatus: str, succeeds: bool, warnings: bool
) -> None:
    upid = "UPID:father:00001037:0008381C:6B04D317:qmcreate:150:root@pam:"
    api = PveshApi(Recorded(ended(exitstatus), log("line")))
    if succeeds:
        assert tasks.wait_task(api, upid, timeout=5) == tasks.TaskResult(upid, "father", exitstatus, warnings)
    else:
        with pytest.raises(errors.TaskFailed, match=exitstatus):
            tasks.wait_task(api, upid, timeout=5)


def test_waiting_for_a_task_ends_with_the_task_or_at_the_limit() -> None:
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


def test_a_stop_that_failed_by_a_held_lock_file_is_retried() -> None:
    lock = "can't lock file '/var/lock/qemu-server/lock-977.conf' - got timeout"
    upid = '"UPID:father:00001037:0008381C:6B04D317:qmstop:977:root@pam:"\n'
    ssh = Recorded((0, upid, lock), ended(lock), log(), (0, upid, ""), ended("OK"))
    assert qemu.stop(PveshApi(ssh), "father", 977, timeout=20).exitstatus == "OK"
    assert [words[3] for words in ssh.asked].count("create") == 2


def test_a_destroy_is_never_retried_and_never_purges() -> None:
    record = RECORDED["concurrency-017"]
    ssh = Recorded(record, ended(record["stderr"].strip()), log())
    with pytest.raises(errors.LockTimeout):
        qemu.destroy(PveshApi(ssh), "father", 153)
    assert shlex.join(ssh.asked[0]) == (
        "env LC_ALL=C.UTF-8 pvesh delete /nodes/father/qemu/153 --output-format json"
    )
    assert sum("delete" in words for words in ssh.asked) == 1


def test_a_diskless_vm_cannot_have_volumes() -> None:
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
    guests = qemu.list_guests(PveshApi(Recorded((0, json.dumps(answer), ""))))
    assert [(guest.vmid, guest.name, guest.kind, guest.template) for guest in guests] == [
        (100, "7", "qemu", False),
        (101, None, "qemu", False),
        (102, None, "lxc", True),
    ]
    assert (guests[0].tags, guests[0].pool, guests[0].lock) == (("b", "a"), "npve-1", "create")


def test_the_local_node_is_read_once() -> None:
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
def test_a_ping_without_a_running_agent_is_false(name: str) -> None:
    assert agent.ping(PveshApi(Recorded(RECORDED[name])), "father", 104) is False
    assert agent.ping(PveshApi(Recorded((0, "", ""))), "father", 104) is True


def test_a_ping_on_a_faulty_host_is_an_error() -> None:
    with pytest.raises(errors.ClusterFilesystemDown):
        agent.ping(PveshApi(Recorded(RECORDED["services-024"])), "father", 104)


def test_the_address_is_that_of_the_interface_with_the_mac() -> None:
    interfaces = agent.interfaces(PveshApi(Recorded(RECORDED["agent-024"])), "father", 120)
    assert interfaces[0].name == "lo"
    macs = {interface.mac: interface.ipv4 for interface in interfaces}
    mac, addresses = next((mac, ipv4) for mac, ipv4 in macs.items() if not mac.startswith("00:00:00"))
    assert agent.ipv4_for_mac(interfaces, mac.upper()) == (addresses[0] if addresses else None)
    assert agent.ipv4_for_mac(interfaces, "00:00:00:00:00:00") is None
    assert agent.ipv4_for_mac(interfaces, "02:00:00:00:00:01") is None


def _blob(kind: str, size: int = 51) -> str:
    name = kind.encode()
    return base64.b64encode(len(name).to_bytes(4, "big") + name + bytes(size)).decode()


def test_a_host_key_is_one_line_of_type_and_base64() -> None:
    key = f"ssh-ed25519 {_blob('ssh-ed25519')}"
    assert agent.one_key(f"{key} root@guest\n") == key
    for invalid in (
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
            agent.one_key(invalid)


def test_host_keys_are_read_from_the_guest() -> None:
    key = f"ssh-ed25519 {_blob('ssh-ed25519')}"
    missing = (255, "", "Agent error: Guest agent command failed, error was 'Failed to open file'")
    present = (0, json.dumps({"bytes-read": 90, "content": f"{key} root@x\n"}), "")
    assert agent.host_keys(PveshApi(Recorded(present, missing, missing)), "father", 120) == (key,)
    with pytest.raises(UnreadableAnswer, match="found none"):
        agent.host_keys(PveshApi(Recorded(missing, missing, missing)), "father", 120)
    with pytest.raises(errors.AgentUnavailable):
        agent.host_keys(PveshApi(Recorded(RECORDED["agent-007"])), "father", 120)


_MESSAGES = [record["stderr"] for record in RECORDED.values()]

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
def test_an_answer_is_read_after_any_output(data: Any, noise: list[str]) -> None:
    printed = "".join(f"{line}\n" for line in noise) + json.dumps(data, ensure_ascii=False) + "\n"
    assert read_answer(printed) == data


@given(UPIDS, NOISE, st.booleans(), st.booleans())
def test_a_task_id_is_read_bare_quoted_and_after_text_on_its_line(
    upid: str, noise: list[str], quoted: bool, same_line: bool
) -> None:
    front = "".join(f"{line}\n" for line in noise)
    text_before = "creating a clone of VM 101 with ID 105" if same_line else ""
    printed = f'{front}{text_before}"{upid}"\n' if quoted or same_line else f"{front}{upid}\n"
    assert read_answer(printed) == upid
    assert tasks.parse_upid(upid).text == upid


@pytest.mark.parametrize("log", ["", "creating a clone of VM 101 with ID 105", "update VM 105: -memory 64"])
def test_the_output_of_another_node_as_one_string_is_read(log: str) -> None:
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
def test_the_reader_never_crashes(printed: str) -> None:
    try:
        answer = read_answer(printed)
    except UnreadableAnswer:
        return
    json.dumps(answer, ensure_ascii=False).encode("utf-8")


@given(JSON.filter(lambda data: isinstance(data, (list, dict)) and bool(data)), st.data())
def test_an_incomplete_answer_is_an_error(data: Any, draw: st.DataObject) -> None:
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


@given(st.text(max_size=300) | st.lists(st.sampled_from(_MESSAGES), max_size=3).map("\n".join))
def test_the_classification_never_crashes(message: str) -> None:
    error = classify(message, 255, "get /x")
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
def test_an_invalid_entry_is_no_guest_and_a_doubtful_one_is_a_template(entry: dict[str, Any]) -> None:
    guest = qemu.read_guest(entry)
    if guest is None:
        return
    assert type(guest.vmid) is int
    assert guest.vmid >= 100
    assert guest.kind in ("qemu", "lxc")
    # A doubtful value counts as a template, which is not changed.
    assert guest.template == (entry.get("template") not in (None, 0, "0", "", False))


@given(JSON)
def test_readers_of_values_accept_any_value(value: Any) -> None:
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
def test_readers_of_the_agents_answers_never_crash(answer: Any) -> None:
    printed = (0, json.dumps(answer), "")
    for call in (agent.interfaces, agent.host_keys, qemu.guest_config, qemu.guest_status):
        try:
            call(PveshApi(Recorded(*[printed] * 3)), "father", 120)
        except UnreadableAnswer:
            continue
