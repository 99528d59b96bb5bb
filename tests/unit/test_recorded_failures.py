"""Every kind of failure recorded on PVE 9.2: the type and the text of its error."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import EVERY, FAILURES, Recorded, ended, log

from pytest_nestedpve.pve import errors, qemu, tasks
from pytest_nestedpve.pve.answers import entries, read_answer
from pytest_nestedpve.pve.errors import ApiError, UnreadableAnswer, classify, is_noise, plain
from pytest_nestedpve.pve.pvesh import PveshApi

# By kind, not by text: several commands and several texts for each kind. The failures in
# recorded_answers.jsonl are classified in test_transport.
KINDS: dict[type[ApiError], str] = {
    errors.AgentFailed: "agent-029",
    errors.AgentUnavailable: "agent-005 agent-012",
    errors.AlreadyExists: "storage-035 create-049 create-055 clone-012 snapshot-028 destroy-041 pveum-029 "
    "concurrency-009 content-006 network-003 cluster-006 ownL-005",
    errors.BadParameter: "basic-065 basic-085 basic-087 basic-099 basic-105 basic-111 basic-112 basic-115 "
    "storage-004 storage-013 create-005 create-006 create-007 create-009 create-010 create-011 create-015 "
    "create-020 create-047 agent-020 clone-006 pveum-016 config-005 config-011 config-012 "
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
    "pveum-018 tasks-014 network-013 ownB-046 ownF-027 create-045 create-046 create-052 "
    "config-015 extra-009",
    errors.NotRunning: "power-018 power-020 power-023 agent-018",
    errors.Protected: "protection-003",
    errors.Running: "power-002 power-008 destroy-004 cluster-056",
    errors.StartFailed: "power-029 power-033 power-034",
    errors.Unsupported: "storage-039 storage-048 import-014 snapshot-033 snapshot-035",
    errors.WrongState: "power-057 state-007 clone-023 snapshot-032",
    # Failures without a type of their own.
    ApiError: "basic-040 power-072 network-008 cluster-002 cluster-003 nodedown-023",
}
# Messages beside a result: the command succeeded.
SUCCEEDED = "ownI-011 destroy-034 ownB-015 ownF-024 ownF-029"

# The whole text of errors whose message is printed among other lines.
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
def test_each_recorded_failure_has_the_type_of_its_kind_and_the_hosts_text(
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
    printed = [line.strip() for line in record["stderr"].splitlines()]
    assert all(line in printed for line in lines), "a line that PVE did not print"
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
def test_messages_beside_a_result_are_no_failure(name: str) -> None:
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
        ("error during cfs-locked 'file-user_cfg' operation: got lock request timeout", errors.LockTimeout),
        ("error during cfs-locked 'storage-x' operation: no such volume 'x:1'", errors.NotFound),
        ("qemu-img: /x.raw: error while writing: No space left on device", errors.StorageFull),
        ("zfs error: cannot create 'tank/vm-9-disk-0': out of space", errors.StorageFull),
        ("VM 9 qmp command 'guest-ping' failed - client closed connection", errors.AgentUnavailable),
        ("VM 9 qmp command 'guest-exec-status' failed - PID 7 does not exist", errors.AgentFailed),
        ("VM 9 qmp command 'guest-exec' failed - VM 9 not running", errors.NotRunning),
        ("There is a replication job '9-0' for guest '9' - Please remove that first.", errors.InUse),
        ("proxy handler failed: root@10.0.0.9: Permission denied (publickey).", errors.NodeUnreachable),
        ("Undefined subroutine &PVE::X::y called at /usr/share/perl5/PVE/X.pm line 7.", errors.HostFault),
        ("400 Parameter verification failed.\nstorage: storage 'nas-2' does not exist", errors.NotFound),
        ("illegal name 'x.raw' - should be 'vm-900-*'", errors.BadParameter),
        ("parameter 'storage' not allowed for linked clones", errors.BadParameter),
        ("unable to parse zfs volume name 'x'", errors.BadParameter),
        ("update storage failed: can't change value of fixed parameter 'path'", errors.BadParameter),
        ("create storage failed: missing value for required option 'path'", errors.BadParameter),
        ("MAX 2 vcpus allowed per VM on this node", errors.BadParameter),
        ("storage 'nas' does not support content-type 'images'", errors.Unsupported),
        ("unable to activate storage 'nas' - directory '/x' does not exist", errors.Unsupported),
        ("Can't clone VM to node 'pve-2' (VM uses local storage)", errors.Unsupported),
        ("error with cfs lock 'storage-nas': got lock request timeout", errors.LockTimeout),
        ("CT 100 is locked (backup)", errors.Locked),
        ("wait failed - got timeout", errors.GuestTimeout),
        ("you can't convert a VM to template if VM is running", errors.Running),
        ("unable to destroy CT 200 - container is running", errors.Running),
        ("you can't take a snapshot if it's a template", errors.WrongState),
        ("unable to use incomplete snapshot (snapstate = prepare)", errors.WrongState),
        ("can't rollback, 'a' is not most recent snapshot on 'zfs:vm-9-disk-0'", errors.WrongState),
        ("detected modified configuration - file changed by other user? Try again.", errors.Changed),
        ("update pools failed: VM 9 is not a pool member", errors.NotFound),
        ("modify user failed: no such user ('x@pve')", errors.NotFound),
        ("unable to restore VM 9 - can't find file '/x'", errors.NotFound),
        ('Failed to find logical volume "pve/vm-9-disk-0"', errors.NotFound),
        ("TASK ERROR: unexpected status", errors.Interrupted),
        ("unable to read tail (got 0 bytes)", errors.Interrupted),
        ("migration aborted: Can't connect to destination address using public key", errors.NodeUnreachable),
        ("500 Can't connect to 10.0.0.9:8006 (Connection refused)", errors.NodeUnreachable),
        # Not InUse, which ends the attempts to destroy: this state may be temporary.
        ("zfs error: cannot destroy 'tank/vm-9-disk-0': dataset is busy", ApiError),
        ("lvremove 'pve/vm-9' error:   Logical volume pve/vm-9 in use.", ApiError),
        ("env: \u201epvesh\u201c: Datei oder Verzeichnis nicht gefunden", errors.NoPve),
    ):
        assert type(classify(words)) is kind, words


def test_a_stopped_import_is_an_interrupted_one() -> None:
    exitstatus = json.loads(EVERY["ownG-015"]["stdout"])["exitstatus"]
    for words in (exitstatus, f"TASK ERROR: unable to create VM 501 - {exitstatus}", f"{exitstatus}."):
        assert type(classify(words)) is errors.Interrupted, words
    interrupt = "command 'x' failed: received interrupt"
    assert type(classify(f"{interrupt}\nstorage 'nas' is not online")) is errors.Unsupported


ELSEWHERE: dict[str, Callable[[str], str]] = {
    "other nodes": lambda text: re.sub(r"\b(?:father|node[ab])\b", "pve-07-rack2", text),
    "ZFS": lambda text: re.sub(r"\blocal\b(?! node)", "local-zfs", text),
    "a share": lambda text: re.sub(r"\b(?:local|second)\b(?! node)", "nas_1.x", text),
    "nine digits": lambda text: re.sub(r"(?<![\w.:-])(?!4\d\d |50\d )(\d{3})(?![\w:])", r"999999\1", text),
    "other pools": lambda text: re.sub(r"npve-\w+", "a.b/c_d/npve-0123456789ab", text),
    "LVM warns": lambda text: (
        "  WARNING: You have not turned on protection against thin pools running out of space.\n"
        f"  WARNING: Sum of all thin volume sizes exceeds the size of thin pool pve/data.\n{text}"
    ),
    "PVE warns": lambda text: f"WARN: no efidisk configured! Using temporary efivars disk.\n{text}",
    "ssh warns": lambda text: (
        f"Warning: Permanently added 'x' (ED25519) to the list of known hosts.\r\n{text}"
    ),
    "line ends": lambda text: text.replace("\n", "\r\n"),
    "no line end": lambda text: text.rstrip("\n"),
    "a full stop": lambda text: text.rstrip("\n.") + ".\n",
    "of a task": lambda text: f"TASK ERROR: {text}",
    "of another node": lambda text: f"proxy handler failed: {text}",
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_the_type_of_a_failure_is_the_same_with_other_names_and_words_around_it(where: str) -> None:
    texts = {record["stderr"] for record in EVERY.values() if not is_noise(record["stderr"])}
    assert len(texts) > 100
    for words in texts:
        assert type(classify(ELSEWHERE[where](words))) is type(classify(words)), ELSEWHERE[where](words)


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


# -- failures behind status 0 -------------------------------------------------------------------------

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
    reason = record["stderr"].strip().splitlines()[-1]
    api = PveshApi(Recorded(record, ended(reason), log("TASK ERROR: " + reason)))
    with pytest.raises(ApiError) as caught:
        qemu.awaited(api, lambda: api.post("/x"), 5, again=False)
    kind = type(classify(record["stderr"]))
    assert type(caught.value) is (errors.TaskFailed if kind is ApiError else kind)
    assert reason in str(caught.value)


def test_there_are_such_recordings() -> None:
    assert len(BEHIND_EXIT_0) >= 15


@pytest.mark.parametrize("name", ["import-014", "import-015", "noquorum-029"])
def test_no_module_calls_qm_which_can_print_an_error_and_exit_with_0(name: str) -> None:
    # `qm` does so for some commands; changes are API calls whose task is read.
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
def test_the_task_of_a_call_is_found_behind_other_output(printed: str) -> None:
    ssh = Recorded((0, printed, ""), ended("OK"))
    done = qemu.create_diskless(PveshApi(ssh), "father", 150, name="x")
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
        qemu.create_diskless(PveshApi(Recorded((0, printed, ""))), "father", 150, name="x")


def test_downloads_print_wgets_output_in_front_of_their_task() -> None:
    for name in ("ownL-005", "ownL-006", "ownL-007", "ownL-009", "ownL-010"):
        upid = read_answer(EVERY[name]["stdout"])
        assert tasks.parse_upid(upid).type == "download"


@pytest.mark.parametrize("exitstatus", ["WARNINGS: 1", "WARNINGS: 12"])
def test_warnings_are_success_and_are_reported(exitstatus: str) -> None:
    done = tasks.wait_task(PveshApi(Recorded(ended(exitstatus))), UPID, timeout=5)
    assert done.warnings


@pytest.mark.parametrize("exitstatus", ["WARNINGS: none", "WARNINGS: 1 and then it failed", "ok", "OK?"])
def test_only_pves_own_two_words_are_success(exitstatus: str) -> None:
    with pytest.raises(errors.TaskFailed):
        tasks.wait_task(PveshApi(Recorded(ended(exitstatus), log())), UPID, timeout=5)


def test_a_task_that_failed_with_control_sequences_is_reported_without_them() -> None:
    api = PveshApi(Recorded(ended("\x1b[31mboom\x1b[0m\x00"), log("\x1b]0;title\x07line")))
    with pytest.raises(errors.TaskFailed) as caught:
        tasks.wait_task(api, UPID, timeout=5)
    assert str(caught.value) == f"task {UPID} ended: boom\n    line"


def test_the_index_of_a_missing_vm_is_no_vm() -> None:
    index = EVERY["basic-136"]
    assert index["rc"] == 0
    for read in (qemu.guest_config, qemu.guest_status):
        with pytest.raises(UnreadableAnswer):
            read(PveshApi(Recorded(index)), "father", 999)


def test_an_empty_list_is_one_and_nothing_at_all_is_none() -> None:
    assert qemu.list_guests(PveshApi(Recorded((0, "[]\n", "")))) == []
    for printed in ("", "\n", f"{PERL}\n"[:1], "null\n", "{}\n"):
        with pytest.raises(UnreadableAnswer):
            qemu.list_guests(PveshApi(Recorded((0, printed, ""))))
    with pytest.raises(UnreadableAnswer):
        entries(None)
