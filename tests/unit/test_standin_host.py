"""The host of the fast tests: stand-ins in this process, shared, prepared and with faults."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from standin_host import IMAGE, StandinHost

from pytest_nestedpve.pve.errors import (
    ApiError,
    CommandTimeout,
    GuestNotFound,
    NodeUnreachable,
    NotFound,
)

QEMU = "/nodes/father/qemu"


@pytest.fixture
def host(tmp_path: Path) -> Iterator[StandinHost]:
    standin = StandinHost(tmp_path / "host")
    yield standin
    standin.close()


def exit_status(host: StandinHost, upid: str) -> str | None:
    status = host.connect().api.get(f"/nodes/father/tasks/{upid}/status")
    return status.get("exitstatus") if status["status"] == "stopped" else None


def test_a_task_ends_inside_its_call_with_log_and_exit_status(host: StandinHost) -> None:
    api = host.connect().api
    upid = api.post(QEMU, vmid=100, name="a", scsi0="local:1")
    assert exit_status(host, upid) == "OK"
    log = [line["t"] for line in api.get(f"/nodes/father/tasks/{upid}/log")]
    assert "scsi0: successfully created disk 'local:100/vm-100-disk-0.raw,size=1G'" in log
    assert log[-1] == "TASK OK"
    failed = api.post(f"{QEMU}/101/status/stop")
    assert exit_status(host, failed) == "unable to find configuration file for VM 101 on node 'father'"
    assert upid != failed


def test_nothing_of_a_call_is_printed(host: StandinHost, capfd: pytest.CaptureFixture[str]) -> None:
    host.create_vm(100, scsi0=f"local:0,import-from={IMAGE}", ide2="local:cloudinit")
    host.connect().api.put(f"{QEMU}/100/config", scsi1="local:1")
    assert capfd.readouterr() == ("", "")


def test_errors_are_those_of_the_real_transports(host: StandinHost) -> None:
    api = host.connect().api
    with pytest.raises(GuestNotFound):
        api.get(f"{QEMU}/100/config")
    with pytest.raises(NotFound, match="No 'get' handler"):
        api.get("/no/such/path")
    with pytest.raises(NodeUnreachable):
        api.get("/nodes/nowhere/qemu")


def test_threads_and_processes_share_a_host(host: StandinHost) -> None:
    def create(first: int) -> None:
        api = StandinHost(host.path).connect().api
        for vmid in range(first, first + 5):
            api.post(QEMU, vmid=vmid, scsi0="local:1")
            api.put(f"{QEMU}/{vmid}/config", description="made")

    threads = [threading.Thread(target=create, args=(first,)) for first in (100, 200, 300)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            create(400)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert host.vms() == [first + n for first in (100, 200, 300, 400) for n in range(5)]
    assert {host.config(vmid)["description"] for vmid in host.vms()} == {"made"}
    assert {task.status for task in host.tasks("qmcreate")} == {"OK"}


def test_a_lost_reply_is_a_timeout_after_the_work(host: StandinHost) -> None:
    host.fault("POST", QEMU, do="drop")
    with pytest.raises(CommandTimeout):
        host.connect().api.post(QEMU, vmid=100)
    assert host.vms() == [100]


def test_a_call_that_hangs_is_a_timeout_and_nothing_is_done(host: StandinHost) -> None:
    host.fault("POST", QEMU, do="hang")
    with pytest.raises(CommandTimeout):
        host.connect().api.post(QEMU, vmid=100)
    assert host.vms() == []


def test_the_leftovers_of_a_slow_task_with_a_killed_worker_are_as_recorded(host: StandinHost) -> None:
    host.create_vm(100, name="a", scsi0="local:1")
    host.slow(qmdestroy=60)
    upid = host.connect().api.delete(f"{QEMU}/100")
    assert exit_status(host, upid) is None
    host.kill_task()
    assert exit_status(host, upid) == "unexpected status"
    assert host.config(100) == {"lock": "destroyed"}
    assert host.volumes() == [IMAGE]
    with pytest.raises(ApiError, match="Result verification failed"):
        host.connect().api.get(f"{QEMU}/100/config")


def test_a_new_vm_has_no_name_until_ten_seconds_have_passed(host: StandinHost) -> None:
    host.create_vm(100, name="a")
    api = host.connect().api
    (row,) = api.get("/cluster/resources", type="vm")
    assert (row["status"], "name" in row) == ("unknown", False)
    host.advance(11)
    (row,) = api.get("/cluster/resources", type="vm")
    assert (row["status"], row["name"]) == ("stopped", "a")


def test_answers_use_the_clock_of_the_node(host: StandinHost) -> None:
    before = int(host.connect().ssh.run(["date", "+%s"]).stdout)
    host.advance(4000)
    assert 4000 <= int(host.connect().ssh.run(["date", "+%s"]).stdout) - before < 4060
    host.create_vm(100)
    assert host.tasks()[0].starttime >= before + 4000


def test_a_second_node_answers_for_its_own_vms_while_it_is_online(host: StandinHost) -> None:
    host.join("father2")
    api = host.connect().api
    host.create_vm(100, scsi0="local:1")
    host.set_running(100, True)
    host.migrate(100, "father2")
    assert api.get("/nodes/father2/qemu/100/status/current")["status"] == "running"
    assert host.volumes("father2") == ["local:100/vm-100-disk-0.raw", IMAGE]
    assert host.volumes("father") == [IMAGE]
    with pytest.raises(GuestNotFound):
        api.get(f"{QEMU}/100/config")
    host.set_online("father2", False)
    assert {row["node"]: row["status"] for row in api.get("/nodes")} == {
        "father": "online",
        "father2": "offline",
    }
    with pytest.raises(NodeUnreachable, match="Connection refused"):
        api.get("/nodes/father2/qemu")


def test_commands_and_files_are_those_of_the_node(host: StandinHost) -> None:
    ssh = host.connect().ssh
    host.create_vm(100, name="a")
    assert "a" in ssh.run("qm list").stdout
    assert ssh.run(["cat", "--", "/etc/pve/nodes/father/qemu-server/100.conf"]).stdout == host.configuration(
        100
    )
    ssh.put(b"text", "/var/lib/vz/snippets/npve-1.yaml")
    find = ["find", "/var/lib/vz/snippets", "-name", "npve-*"]
    assert ssh.run(find).stdout == "/var/lib/vz/snippets/npve-1.yaml\n"
    assert ssh.get("/var/lib/vz/snippets/npve-1.yaml") == b"text"
    assert ssh.run([*find, "-delete"]).ok
    assert not host.file("/var/lib/vz/snippets/npve-1.yaml").exists()
    assert ssh.run("reboot").rc == 127
    assert ssh.run(["pvesh", "get", "/nodes/father/qemu/101/config"]).rc == 2


def test_a_saved_host_is_restored(host: StandinHost, tmp_path: Path) -> None:
    host.create_vm(100, scsi0="local:1")
    before = host.state()
    host.save(tmp_path / "copy")
    host.connect().api.delete(f"{QEMU}/100")
    host.set_pool("theirs", "a: b", [100])
    assert host.state() != before
    host.restore(tmp_path / "copy")
    assert host.state() == before


def test_an_action_runs_before_the_next_matching_call(host: StandinHost) -> None:
    host.create_vm(100)
    host.before("GET", f"{QEMU}/100/config", lambda: host.edit_vm(100, description="meanwhile"))
    assert host.connect().api.get(f"{QEMU}/100/config")["description"] == "meanwhile"
    assert host.calls()[-1] == f"GET {QEMU}/100/config"


def test_an_answer_can_be_replaced(host: StandinHost) -> None:
    host.change_answers("GET", "/version", lambda answer: {**answer, "version": None})
    assert host.connect().api.get("/version")["version"] is None


def test_a_vm_is_available_on_the_nodes_that_have_all_of_its_volumes(host: StandinHost) -> None:
    for node in ("father2", "father3"):
        host.join(node)
    host.storage("nas", "nfs", "images", shared=1)
    host.storage("san", "nfs", "images", shared=1, nodes="father,father3")
    api, disks = host.connect().api, ("nas:1", "san:1", "local:1")
    for number, expected in enumerate((["father", "father2", "father3"], ["father", "father3"], ["father"])):
        options = {f"scsi{index}": disk for index, disk in enumerate(disks[: number + 1])}
        host.create_vm(100 + number, **options)
        answer = api.get(f"{QEMU}/{100 + number}/feature", feature="copy")
        assert answer == {"hasFeature": 1, "nodes": expected}
