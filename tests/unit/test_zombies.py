"""What a killed create or destroy leaves is ours only by its newest task; anything else stays."""

from __future__ import annotations

from typing import Any

import pytest
from memory_host import MemoryHost
from memory_model import Model

from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.killed_tasks import bare_lock, find_leftover
from pytest_nestedpve.pve.host import PveHost

VMID = 99920


@pytest.fixture
def host(memory: MemoryHost) -> PveHost:
    return memory.connect()


def killed(memory: MemoryHost, host: PveHost, kind: str = "qmcreate") -> str:
    """Begin a create or a destroy and kill its worker; the task's UPID."""
    with memory.open() as model:
        model.state["delays"]["*"] = 60
    path = "/nodes/father/qemu"
    upid = str(
        host.api.post(path, vmid=VMID, name="nested-pve-x")
        if kind == "qmcreate"
        else host.api.delete(f"{path}/{VMID}")
    )
    with memory.open() as model:
        model.kill(next(task for task in model.state["tasks"] if task["upid"] == upid))
        model.state["delays"].clear()
    return upid


def began(model: Model, number: int, shift: float) -> str:
    """Let a task have begun `shift` seconds later; its id then, for the id names that second."""
    task = model.state["tasks"][number]
    task["start"] += shift
    parts = task["upid"].split(":")
    task["upid"] = ":".join([*parts[:4], f"{int(task['start']):08X}", *parts[5:]])
    return str(task["upid"])


def test_a_killed_create_of_ours_is_ours(memory: MemoryHost, host: PveHost) -> None:
    upid = killed(memory, host)
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert (found.lock, found.ours, found.running) == ("create", True, False)


def test_a_killed_destroy_of_ours_is_ours_though_pve_does_not_print_it(
    memory: MemoryHost, host: PveHost
) -> None:
    host.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x")
    with memory.open() as model:  # the create is older
        began(model, 0, -60)
    upid = killed(memory, host, "qmdestroy")
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert (found.lock, found.ours) == ("destroyed", True)


def test_what_somebody_elses_task_left_is_not_ours(memory: MemoryHost, host: PveHost) -> None:
    killed(memory, host)
    found = find_leftover(
        host, "father", VMID, frozenset({"UPID:father:00000001:00000001:00000001:qmcreate:1:root@pam:"})
    )
    assert found is not None
    assert not found.ours
    assert "not by a task of this run" in found.reason


@pytest.mark.parametrize(
    "end", [f"unable to create VM {VMID} - VM {VMID} already exists on node 'father'", "OK"]
)
def test_a_create_of_ours_that_was_refused_does_not_make_the_thing_ours(
    memory: MemoryHost, host: PveHost, end: str
) -> None:
    killed(memory, host)
    with memory.open() as model:  # another's, and older
        began(model, -1, -60)
        model.state["tasks"].append(
            {**model.state["tasks"][-1], "start": model.now, "end": model.now, "exit": end}
        )
        ours = model.state["tasks"][-1]["upid"] = "UPID:father:0000AAAA:0000AAAA:" + (
            f"{int(model.now):08X}:qmcreate:{VMID}:root@pam:"
        )
    found = find_leftover(host, "father", VMID, frozenset({ours}))
    assert found is not None
    assert not found.ours
    assert end in found.reason or repr(end) in found.reason


def test_a_newer_task_of_another_makes_it_theirs(memory: MemoryHost, host: PveHost) -> None:
    upid = killed(memory, host)
    with memory.open() as model:
        began(model, -1, -60)
        model.state["vms"].clear()
    killed(memory, host)
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert not found.ours


def test_two_tasks_of_one_second_have_both_to_be_ours(memory: MemoryHost, host: PveHost) -> None:
    first = killed(memory, host)
    with memory.open() as model:
        model.state["vms"].clear()
    second = killed(memory, host)
    with memory.open() as model:
        apart = model.state["tasks"][1]["start"] - model.state["tasks"][0]["start"]
        first = began(model, 0, apart)
    for ours, expected in (({first}, False), ({second}, False), ({first, second}, True)):
        found = find_leftover(host, "father", VMID, frozenset(ours))
        assert found is not None
        assert found.ours is expected


def test_a_create_that_still_works_is_not_touched(memory: MemoryHost, host: PveHost) -> None:
    with memory.open() as model:
        model.state["delays"]["*"] = 60
    upid = str(host.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x"))
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert found.running
    assert not found.ours


def test_a_create_that_ends_while_it_is_judged_is_no_leftover(
    memory: MemoryHost, host: PveHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    with memory.open() as model:
        model.state["delays"]["*"] = 60
    host.api.post("/nodes/father/qemu", vmid=VMID, name="nested-pve-x")
    running_tasks = killed_tasks.running_tasks

    def ended_by_now(*given: Any) -> list[str]:
        with memory.open() as model:
            model.state["tasks"][-1]["due"] = model.now
            model.settle()
        return running_tasks(*given)

    monkeypatch.setattr(killed_tasks, "running_tasks", ended_by_now)
    assert find_leftover(host, "father", VMID, frozenset()) is None


def test_a_start_of_ours_does_not_make_a_bare_lock_ours(memory: MemoryHost, host: PveHost) -> None:
    host.api.post("/nodes/father/qemu", vmid=VMID, name="x")
    with memory.open() as model:
        for number in range(len(model.state["tasks"])):
            began(model, number, -60)
    upid = str(host.api.post(f"/nodes/father/qemu/{VMID}/status/start"))
    with memory.open() as model:
        model.state["vms"][str(VMID)].update(config={"lock": "create"}, running=False)
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert not found.ours


@pytest.mark.parametrize(
    "config",
    [
        {"lock": "destroyed", "name": "precious"},
        {"lock": "destroyed", "description": "mine"},
        {"lock": "create", "memory": "512"},
        {"name": "precious"},
        {},
    ],
    ids=str,
)
def test_a_configuration_with_anything_else_in_it_is_no_zombie(
    memory: MemoryHost, host: PveHost, config: dict[str, str]
) -> None:
    upid = killed(memory, host)
    with memory.open() as model:
        model.state["vms"][str(VMID)]["config"] = config
    assert bare_lock(host, "father", VMID) is None
    assert find_leftover(host, "father", VMID, frozenset({upid})) is None


@pytest.mark.parametrize("lock", ["backup", "migrate", "snapshot"])
def test_another_lock_alone_is_nobodys_zombie(memory: MemoryHost, host: PveHost, lock: str) -> None:
    upid = killed(memory, host)
    with memory.open() as model:
        model.state["vms"][str(VMID)]["config"] = {"lock": lock}
    found = find_leftover(host, "father", VMID, frozenset({upid}))
    assert found is not None
    assert not found.ours
