"""Leftovers of a killed create or destroy are ours only by their newest task; all others are kept."""

from __future__ import annotations

from typing import Any

import pytest
from standin_host import StandinHost

from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.killed_tasks import bare_lock, find_leftover
from pytest_nestedpve.pve.host import PveHost

VMID = 99920


@pytest.fixture
def outer(host: StandinHost) -> PveHost:
    return host.connect()


def killed(host: StandinHost, outer: PveHost, kind: str = "qmcreate") -> str:
    """Begin a create or a destroy and kill its worker; the task's UPID."""
    host.slow(all=60)
    path = "/nodes/father/qemu"
    upid = str(
        outer.api.post(path, vmid=VMID, name="nested-pve-x")
        if kind == "qmcreate"
        else outer.api.delete(f"{path}/{VMID}")
    )
    host.kill_task(upid)
    host.clear_faults()
    return upid


def test_a_killed_create_of_ours_is_ours(host: StandinHost, outer: PveHost) -> None:
    upid = killed(host, outer)
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert (leftover.lock, leftover.ours, leftover.running) == ("create", True, False)


def test_a_killed_destroy_of_ours_is_ours_though_pve_does_not_print_it(
    host: StandinHost, outer: PveHost
) -> None:
    outer.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x")
    host.shift_task(host.tasks()[0].upid, -60)  # the create is older
    upid = killed(host, outer, "qmdestroy")
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert (leftover.lock, leftover.ours) == ("destroyed", True)


def test_a_leftover_of_a_task_of_another_is_not_ours(host: StandinHost, outer: PveHost) -> None:
    killed(host, outer)
    leftover = find_leftover(
        outer, "father", VMID, frozenset({"UPID:father:00000001:00000001:00000001:qmcreate:1:root@pam:"})
    )
    assert leftover is not None
    assert not leftover.ours
    assert "not by a task of this run" in leftover.reason


@pytest.mark.parametrize(
    "end", [f"unable to create VM {VMID} - VM {VMID} already exists on node 'father'", "OK"]
)
def test_a_create_of_ours_that_was_refused_does_not_make_the_vm_ours(
    host: StandinHost, outer: PveHost, end: str
) -> None:
    host.shift_task(killed(host, outer), -60)  # another's, and older
    ours = host.add_task("qmcreate", VMID, end)
    leftover = find_leftover(outer, "father", VMID, frozenset({ours}))
    assert leftover is not None
    assert not leftover.ours
    assert end in leftover.reason or repr(end) in leftover.reason


def test_a_leftover_with_a_newer_task_of_another_is_not_ours(host: StandinHost, outer: PveHost) -> None:
    upid = killed(host, outer)
    host.shift_task(upid, -60)
    host.clear()
    killed(host, outer)
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert not leftover.ours


def test_two_tasks_of_one_second_have_both_to_be_ours(host: StandinHost, outer: PveHost) -> None:
    first = killed(host, outer)
    host.clear()
    second = killed(host, outer)
    newest, oldest = host.tasks()
    first = host.shift_task(first, newest.starttime - oldest.starttime)
    for ours, expected in (({first}, False), ({second}, False), ({first, second}, True)):
        leftover = find_leftover(outer, "father", VMID, frozenset(ours))
        assert leftover is not None
        assert leftover.ours is expected


def test_a_running_create_is_not_touched(host: StandinHost, outer: PveHost) -> None:
    host.slow(all=60)
    upid = str(outer.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x"))
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert leftover.running
    assert not leftover.ours


def test_a_create_that_ends_while_it_is_examined_is_no_leftover(
    host: StandinHost, outer: PveHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x")
    whole = host.config(VMID)
    host.replace_config(VMID, {"lock": "create"})
    running_tasks = killed_tasks.running_tasks

    def ended_by_now(*arguments: Any) -> list[str]:
        host.replace_config(VMID, whole)
        return running_tasks(*arguments)

    monkeypatch.setattr(killed_tasks, "running_tasks", ended_by_now)
    assert find_leftover(outer, "father", VMID, frozenset()) is None


def test_a_start_of_ours_does_not_make_a_bare_lock_ours(host: StandinHost, outer: PveHost) -> None:
    outer.api.post("/nodes/father/qemu", vmid=VMID, name="x")
    host.shift_task(host.tasks()[0].upid, -60)
    upid = str(outer.api.post(f"/nodes/father/qemu/{VMID}/status/start"))
    host.set_running(VMID, False)
    host.replace_config(VMID, {"lock": "create"})
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert not leftover.ours


@pytest.mark.parametrize(
    "config",
    [
        {"lock": "destroyed", "name": "precious"},
        {"lock": "destroyed", "description": "mine"},
        {"lock": "create", "host": "512"},
        {"name": "precious"},
        {},
    ],
    ids=str,
)
def test_a_configuration_with_anything_else_in_it_is_no_zombie(
    host: StandinHost, outer: PveHost, config: dict[str, str]
) -> None:
    upid = killed(host, outer)
    host.replace_config(VMID, config)
    assert bare_lock(outer, "father", VMID) is None
    assert find_leftover(outer, "father", VMID, frozenset({upid})) is None


@pytest.mark.parametrize("lock", ["backup", "migrate", "snapshot"])
def test_a_vm_with_only_another_lock_is_not_ours(host: StandinHost, outer: PveHost, lock: str) -> None:
    upid = killed(host, outer)
    host.replace_config(VMID, {"lock": lock})
    leftover = find_leftover(outer, "father", VMID, frozenset({upid}))
    assert leftover is not None
    assert not leftover.ours
