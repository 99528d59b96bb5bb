"""Readers of any output of a host: a usable value or an error of the package, within seconds."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_answers import ODD, printed
from recorded import EVERY, Recorded

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.create import free_ids
from pytest_nestedpve.ownership.discover import Candidate, discover
from pytest_nestedpve.ownership.lease import parse_lease
from pytest_nestedpve.ownership.marker import parse_marker
from pytest_nestedpve.ownership.pool import read_pool
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve import agent, qemu, tasks
from pytest_nestedpve.pve.answers import entries, mapping, read_answer, shown
from pytest_nestedpve.pve.errors import ApiError, PveError, classify, plain
from pytest_nestedpve.pve.host import NODE_NAME, PveHost
from pytest_nestedpve.pve.pvesh import PveshApi
from pytest_nestedpve.pve.ssh.connection import CommandResult
from pytest_nestedpve.teardown.unmarked import _Jobs
from pytest_nestedpve.teardown.volumes import Volumes, belongs

RUN = "3fa9c2d1e0ab"
POOL = f"npve-{RUN}"
UPID = "UPID:father:00001037:0008381C:6B04D317:qmcreate:101:root@pam:"
GUEST = {
    "vmid": 101,
    "node": "father",
    "type": "qemu",
    "name": "nested-pve-x",
    "status": "running",
    "pool": POOL,
}
TASK = {"upid": UPID, "id": "101", "type": "qmcreate", "starttime": 0x6B04D317, "status": "OK"}
CONFIG = {
    "name": "nested-pve-x",
    "digest": "d",
    "description": "x",
    "smbios1": "uuid=1",
    "scsi0": "local:101/x",
}
STATUS = {"status": "stopped", "vmid": 101, "ha": {"managed": 0}, "exitstatus": "OK"}


class Prints(Recorded):
    """A host that prints the same output for every call."""

    def __init__(self, stdout: bytes, rc: int = 0, stderr: bytes = b"") -> None:
        super().__init__()
        self.result = CommandResult("", rc, stdout, stderr, 1.0)

    def run(self, command: str | Sequence[str], **_options: Any) -> CommandResult:
        self.asked.append([command] if isinstance(command, str) else list(command))
        return self.result


def usable_guests(values: list[qemu.Guest]) -> None:
    for guest in values:
        assert type(guest.vmid) is int
        assert qemu.is_vmid(guest.vmid)
        assert NODE_NAME.match(guest.node)


def usable_interfaces(interfaces: tuple[agent.Interface, ...]) -> None:
    for interface in interfaces:
        assert re.fullmatch(r"(?:[0-9a-f]{2}:){5}[0-9a-f]{2}", interface.mac)
        assert all(re.fullmatch(r"[0-9.]+", address) for address in interface.ipv4)


def usable_pool(pool: Any) -> None:
    for _, vmid, node in pool.members if pool else ():
        assert qemu.is_vmid(vmid)
        assert NODE_NAME.match(node)


def usable_tasks(states: list[tuple[tasks.Upid, bool]]) -> None:
    for task, over in states:
        assert tasks.parse_upid(task.text) == task
        assert isinstance(over, bool)


def usable_ids(vmid: int) -> None:
    assert qemu.is_vmid(vmid)


def nothing(_value: Any) -> None:
    """Check nothing: the value is used unchanged."""


def jobs(host: PveHost) -> None:
    _Jobs.read(host)


KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGRv"
SETTINGS = Settings()
READERS: dict[str, tuple[Callable[[PveHost], Any], Any, Callable[[Any], None]]] = {
    "guests": (lambda h: qemu.list_guests(h.api), [GUEST, GUEST | {"vmid": 102}], usable_guests),
    "config": (lambda h: qemu.guest_config(h.api, "father", 101), CONFIG, nothing),
    "status": (lambda h: qemu.guest_status(h.api, "father", 101), STATUS, nothing),
    "node": (lambda h: h.node, [{"type": "node", "local": 1, "name": "father"}], nothing),
    "pool": (
        lambda h: read_pool(h.api, POOL), [{"poolid": POOL, "comment": "c", "members": [GUEST]}], usable_pool
    ),
    "task": (lambda h: tasks.wait_task(h.api, UPID, timeout=0.01), STATUS, nothing),
    "task log": (lambda h: tasks.task_log(h.api, UPID), [{"n": 1, "t": "TASK OK"}], nothing),
    "tasks": (lambda h: killed_tasks.read_tasks(h.api, "father"), [TASK, TASK], usable_tasks),
    "running tasks": (lambda h: killed_tasks.running_tasks(h.api, "father", 101), [TASK, TASK], nothing),
    "leftover": (
        lambda h: killed_tasks.find_leftover(h, "father", 101, frozenset()), {"lock": "create"}, nothing
    ),
    "proof": (
        lambda h: prove(h.api, SETTINGS, Candidate(101, "father", ""), RUN), CONFIG | STATUS, nothing
    ),
    "discovery": (lambda h: discover(h, SETTINGS, RUN), [GUEST | {"poolid": POOL}], nothing),
    "ping": (lambda h: agent.ping(h.api, "father", 101), None, nothing),
    "interfaces": (
        lambda h: agent.interfaces(h.api, "father", 101),
        {"result": [{"name": "e", "hardware-address": "BC:24:11:00:00:01",
                     "ip-addresses": [{"ip-address": "10.0.0.1"}]}]},
        usable_interfaces,
    ),
    "host keys": (lambda h: agent.host_keys(h.api, "father", 101), {"content": KEY}, nothing),
    "volumes": (
        lambda h: Volumes(h.api).note("father", 101, CONFIG),
        [{"storage": "local", "vmid": 101, "volid": "local:101/vm-101-disk-0.raw"}],
        nothing,
    ),
    "free ids": (
        lambda h: next(free_ids(h, SETTINGS)),
        [{"storage": "local", "content": "images", "vmid": 99901, "node": "father", "type": "qemu"}],
        usable_ids,
    ),
    "jobs": (jobs, [{"vmid": "101,102", "guest": "7", "all": 0}], nothing),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@given(data=st.data())
@settings(max_examples=60)
def test_any_output_gives_a_usable_value_or_an_error_of_the_package(name: str, data: st.DataObject) -> None:
    read, truth, check = READERS[name]
    ssh = Prints(data.draw(printed(truth)))
    try:
        value = read(PveHost("father", ssh, PveshApi(ssh), "father" if name != "node" else None))
    except PveError as error:
        message = str(error)
        assert message
        assert len(message) < 5000
    else:
        check(value)
    for words in ssh.asked:
        # Values of an answer become parts of paths and must not change their structure.
        assert all(re.fullmatch(r"[ -~]+", word) for word in words), words
        assert not any("/../" in word or "//" in word for word in words if word.startswith("/")), words


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(1, 255))
@settings(max_examples=60)
def test_any_failure_is_an_error_of_the_package(out: bytes, err: bytes, rc: int) -> None:
    with pytest.raises(ApiError) as caught:
        PveshApi(Prints(out, rc, err)).get("/x")
    assert caught.value.text
    assert plain(caught.value.text) == caught.value.text


@given(st.sampled_from(ODD) | st.text(), st.sampled_from(["node", "name", "upid", "volid", "vmid"]))
@settings(max_examples=80)
def test_names_of_a_host_are_checked_before_they_are_used(value: Any, what: str) -> None:
    if what == "upid":
        with pytest.raises(PveError):
            tasks.wait_task(PveshApi(Prints(b"{}")), value, timeout=1)
    elif what == "volid":
        assert not belongs(str(value), 101)
    else:
        guest = qemu.read_guest(GUEST | {what: value})
        assert guest is None or (NODE_NAME.match(guest.node) and qemu.is_vmid(guest.vmid))


@pytest.mark.parametrize(
    "upid",
    [
        UPID.replace("qmcreate", "../../x"),
        UPID.replace("101", "1/../../2"),
        UPID.replace("root@pam", "root@pam;reboot"),
        UPID.replace("root@pam", "$(reboot)@pam"),
        UPID.replace("father", "../etc"),
        UPID.replace("father", "father\n"),
        UPID.replace("101", "\x1b[2J"),
        UPID.replace("101", "\u202e1"),
        UPID + "\n",
        UPID * 2,
        UPID.replace("101", "1" * 5000),
    ],
)
def test_an_id_of_a_task_that_would_leave_its_path_is_none(upid: str) -> None:
    ssh = Prints(b"{}")
    with pytest.raises(PveError):
        tasks.wait_task(PveshApi(ssh), upid, timeout=1)
    assert ssh.asked == []


@pytest.mark.parametrize(
    ("volid", "whose"),
    [
        ("local:101/vm-101-disk-0.raw", True),
        ("lvm:vm-101-disk-0", True),
        ("zfs:base-100-disk-0/vm-101-disk-0", True),
        ("local:101/base-101-disk-0.raw", True),
        ("local:101/odd.name.raw", True),
        ("zfs:base-101-disk-0/vm-102-disk-0", False),
        ("local:101/base-101-disk-0.raw/102/vm-102-disk-0.qcow2", False),
        ("local:1010/vm-1010-disk-0.raw", False),
        ("local:import/x.qcow2", False),
        ("local:101/../102/vm-102-disk-0.raw", False),
        ("local:../101/x", False),
        ("local:101/vm-101-disk-0.raw?force=1", False),
        ("local:101/vm-101-disk-0.raw\n", False),
        ("-x:101/vm-101-disk-0.raw", False),
    ],
)
def test_a_volume_belongs_to_the_guest_whose_name_it_bears(volid: str, whose: bool) -> None:
    assert belongs(volid, 101) is whose


BIG = 5_000_000
LONG = {
    "nested lists": "[" * BIG,
    "a number": "1" * BIG,
    "a half list": json.dumps(
        [{"vmid": n, "name": "\u00e4" * 50} for n in range(40_000)], ensure_ascii=False
    )[:-3],
    "control sequences": "\x1b[0" * (BIG // 3),
    "titles": "\x1b]" * (BIG // 2),
    "half a task": "UPID:" + "a-" * (BIG // 2),
    "many tasks": "UPID:father:" * (BIG // 12),
    "nothing": "\0" * BIG,
    "lines": "\n" * BIG,
    "options": "qm " + "<a" * (BIG // 2),
    "errors": "400 Parameter verification failed.\n" * (BIG // 35),
    "volumes": "local:" + "../" * (BIG // 3),
}


@pytest.mark.parametrize("name", LONG)
def test_five_megabytes_of_anything_are_read_in_about_a_second(name: str) -> None:
    value = LONG[name]
    readers: tuple[Callable[[str], Any], ...] = (
        read_answer, classify, tasks.parse_upid, agent.one_key, parse_marker, parse_lease, shown,
        entries, mapping, lambda text: belongs(text, 101),
    )  # fmt: skip
    for read in readers:
        began = time.process_time()
        try:
            read(value)
        except PveError as error:
            assert len(str(error)) < 5000  # noqa: PT017
        # CPU time of this process: the machine may be busy.
        assert time.process_time() - began < 2.0, read


# -- defects that the properties above found ----------------------------------------------------------


def test_a_digit_that_is_no_number_crashes_no_pool() -> None:
    # `"²".isdigit()` is true, and int() refuses it.
    pool = read_pool(_prints([{"poolid": POOL, "members": [GUEST | {"vmid": "\u00b2"}]}]), POOL)
    assert pool is not None
    assert pool.members == ()


@pytest.mark.parametrize("members", [7, "x", True, {"vmid": 1}])
def test_members_that_are_no_list_are_no_pool(members: Any) -> None:
    with pytest.raises(PveError):
        read_pool(_prints([{"poolid": POOL, "members": members}]), POOL)


def test_a_member_on_a_node_that_is_none_is_left_out() -> None:
    pool = read_pool(_prints([{"poolid": POOL, "members": [GUEST | {"node": "../../etc"}]}]), POOL)
    assert pool is not None
    assert pool.members == ()


def test_a_task_that_cannot_be_read_is_not_passed_over() -> None:
    # The newest task decides who owns a bare lock; without it an older task of ours would decide.
    for entry in ({"upid": None}, {"upid": "x"}, {}, 7):
        with pytest.raises(PveError):
            killed_tasks.read_tasks(_prints([TASK, entry]), "father")


@pytest.mark.parametrize("name", [None, 7, "../local", "local/x"])
def test_ids_are_free_only_when_every_storage_was_read(name: Any) -> None:
    ssh = Prints(json.dumps([{"content": "images", "storage": name}]).encode())
    with pytest.raises(PveError, match="name of a storage"):
        next(free_ids(PveHost("father", ssh, PveshApi(ssh), "father"), SETTINGS))


def test_a_task_began_at_the_time_in_its_id_and_ended_only_after_that() -> None:
    later = UPID.replace("6B04D317", "6B04D318")
    listed = [TASK | {"starttime": 2**40}, TASK | {"upid": later, "starttime": None, "endtime": 7}]
    assert killed_tasks._newest_tasks(_prints(listed), "father", 101) == [later]
    for endtime in (7, "x", None, True, 2**70, [1]):
        states = killed_tasks.read_tasks(_prints([TASK | {"endtime": endtime}]), "father")
        assert [over for _, over in states] == [False], endtime


def test_a_task_without_an_exit_status_proves_nothing() -> None:
    ends: tuple[Any, ...] = (None, "", 7, [])
    for end in ends:
        with pytest.raises(PveError):
            killed_tasks._ended(_prints({"status": "stopped", "exitstatus": end}), "father", UPID)


def _prints(answer: Any) -> PveshApi:
    return PveshApi(Prints(json.dumps(answer).encode()))


def test_the_recordings_are_read_as_they_are() -> None:
    for name in ("tasks-009", "agent-024"):
        mapping(read_answer(EVERY[name]["stdout"]))
