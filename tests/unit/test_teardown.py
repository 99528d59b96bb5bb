"""Exactly what is proved ours goes; the rest keeps its configuration to the byte."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from memory_host import MemoryHost
from standin_environment import ours

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.environment.phases import Listener, Phase, PhaseEnded
from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.create import NoFreeId, create_marked
from pytest_nestedpve.ownership.discover import discover
from pytest_nestedpve.ownership.marker import Marker, new_uuid
from pytest_nestedpve.ownership.pool import create_pool, pool_name
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.deadline import set_scale
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.report.audit_model import TEARDOWN_PHASES
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.teardown.destroy import BUDGET
from pytest_nestedpve.teardown.teardown import TeardownReport, teardown

LOW, HIGH = 99900, 99999

pytestmark = pytest.mark.usefixtures("pool")


def foreign(env: Environment, vmid: int, name: str | None, **options: Any) -> int:
    """A VM that somebody else made."""
    given = {"vmid": vmid, "name": name, "scsi0": "local:4", **options}
    env.outer.api.post("/nodes/father/qemu", **{k: v for k, v in given.items() if v is not None})
    return vmid


def age(memory: MemoryHost) -> None:
    """Let pvestatd tell everybody about every guest."""
    with memory.open() as model:
        for vm in model.state["vms"].values():
            vm["born"] -= 60


def marker(env: Environment, vmid: int, uuid: str, run: str | None = None) -> str:
    return Marker(run or env.run.id, vmid, uuid).to_text()


@pytest.mark.parametrize("fresh", [True, False], ids=["not yet broadcast", "broadcast"])
def test_of_a_dozen_look_alikes_exactly_ours_go(env: Environment, memory: MemoryHost, fresh: bool) -> None:
    mine = [ours(env, running=True), ours(env)]
    api, uuid, pool = env.outer.api, new_uuid(), pool_name(env.settings, env.run)
    free = iter(v for v in range(LOW, HIGH) if v not in mine)
    name = "nested-pve-" + env.run.id
    other = "npve-" + "ab" * 6
    api.post("/pools", poolid=other, comment="somebody's")
    kept = [
        foreign(env, 500, name),
        foreign(env, next(free), "database"),
        foreign(env, next(free), name, pool=other),
        foreign(env, next(free), name, description=marker(env, 99_000, uuid), smbios1=f"uuid={uuid}"),
        foreign(env, next(free), None),
    ]
    forged = next(free)
    kept.append(foreign(env, forged, name, description=marker(env, forged, new_uuid()), pool=pool))
    another = next(free)
    kept.append(
        foreign(
            env,
            another,
            name,
            description=marker(env, another, uuid, "cd" * 6),
            smbios1=f"uuid={uuid}",
            pool=pool,
        )
    )
    outside = next(free)
    kept.append(
        foreign(
            env, outside, name, description=marker(env, outside, uuid), smbios1=f"uuid={uuid}", pool=other
        )
    )
    clone = next(free)
    api.post(f"/nodes/father/qemu/{mine[1]}/clone", newid=clone, name=name, pool=pool)
    kept.append(clone)
    protected = ours(env)
    api.put(f"/nodes/father/qemu/{protected}/config", protection=1)
    template = ours(env)
    api.post(f"/nodes/father/qemu/{template}/template")
    managed = ours(env)
    container = next(v for v in free if v not in (protected, template, managed))
    with memory.open() as model:
        model.state["ha"].append(f"vm:{managed}")
        model.state["vms"][str(container)] = {
            "kind": "lxc", "node": "father", "config": {"name": name}, "snapshots": {}, "running": True,
            "paused": False, "born": 0,
        }  # fmt: skip
    kept += [protected, template, managed, container]
    if not fresh:
        age(memory)
    before = {vmid: memory.configuration(vmid) for vmid in kept}

    report = teardown(env)

    with memory.open() as model:
        assert sorted(map(int, model.state["vms"])) == sorted(kept)
        assert not [v for v in model.state["volumes"] if f"/vm-{mine[0]}-" in v or f"/vm-{mine[1]}-" in v]
        sent = [c for c in model.state["commands"] if c.startswith("DELETE /nodes/father/qemu")]
    assert {vmid: memory.configuration(vmid) for vmid in kept} == before
    assert sorted(report.destroyed) == sorted(f"VM {vmid}" for vmid in mine)
    assert len(sent) == len(mine)
    # What cannot be proved ours keeps the pool from going, and that is said.
    assert [line for line in report.left if line.startswith(f"pool {pool}")]


def test_a_clean_run_leaves_no_pool_volume_or_snippet(env: Environment, memory: MemoryHost) -> None:
    ours(env, running=True)
    env.outer.ssh.put(b"#cloud-config\n", f"/var/lib/vz/snippets/npve-{env.run.id}-vendor.yaml")
    env.outer.ssh.put(b"#cloud-config\n", f"/var/lib/vz/snippets/npve-{'ab' * 6}-vendor.yaml")
    report = teardown(env)
    assert report.left == ()
    with memory.open() as model:
        assert (model.state["vms"], model.state["pools"]) == ({}, {})
        assert list(model.state["files"]) == [f"/var/lib/vz/snippets/npve-{'ab' * 6}-vendor.yaml"]
        assert [v for v in model.state["volumes"] if "/vm-" in v] == []


def test_a_vm_swapped_in_between_stop_and_delete_is_not_destroyed(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env, running=True)
    stop = qemu.stop

    def stop_and_swap(api: Any, node: str, which: int, **kwargs: Any) -> Any:
        result = stop(api, node, which, **kwargs)
        with memory.open() as model:
            model.state["vms"][str(vmid)]["config"] = {"name": "somebodys", "smbios1": f"uuid={new_uuid()}"}
        return result

    monkeypatch.setattr(qemu, "stop", stop_and_swap)
    report = teardown(env)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(vmid)]
    assert any("no marker" in line for line in report.kept)


def test_a_failed_destroy_is_tried_again_and_the_others_go_on(env: Environment, memory: MemoryHost) -> None:
    first, second = ours(env), ours(env)
    memory.fault("DELETE", f"/nodes/father/qemu/{first}", text="can't lock file '/x' - got timeout", times=2)
    report = teardown(env)
    assert sorted(report.destroyed) == sorted([f"VM {first}", f"VM {second}"])
    assert report.left == ()


def test_what_a_killed_create_of_ours_left_is_removed(env: Environment, memory: MemoryHost) -> None:
    upid = env.outer.api.post("/nodes/father/qemu", vmid=LOW, name="nested-pve-x")
    with memory.open() as model:
        model.state["vms"][str(LOW)]["config"] = {"lock": "create"}
        model.state["tasks"][-1]["exit"] = "unexpected status"
    assert upid.startswith("UPID:")
    assert teardown(env).left == ()
    with memory.open() as model:
        assert model.state["vms"] == {}


def test_a_bare_lock_by_somebody_elses_task_stays(env: Environment, memory: MemoryHost) -> None:
    memory.connect().api.post("/nodes/father/qemu", vmid=LOW, name="nested-pve-x")
    with memory.open() as model:
        model.state["vms"][str(LOW)]["config"] = {"lock": "create"}
    report = teardown(env)
    assert any("not by a task of this run" in line for line in report.kept)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(LOW)]


def test_a_lost_reply_to_a_create_is_answered_by_reading(env: Environment, memory: MemoryHost) -> None:
    memory.fault("POST", "/nodes/father/qemu", do="lose")
    vmid = ours(env)
    assert [each.vmid for each in discover(env.outer, env.settings, env.run.id)] == [vmid]


def test_an_id_with_somebodys_volumes_is_never_drawn(env: Environment, memory: MemoryHost) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=((LOW, LOW + 1),))
    with memory.open() as model:
        model.state["volumes"][f"local:{LOW}/vm-{LOW}-disk-0.raw"] = {
            "content": "images", "format": "raw", "size": 1, "vmid": LOW,
        }  # fmt: skip
    assert create_marked(env.outer, env.run, settings).vmid == LOW + 1


def test_a_running_vm_stays_and_is_named_when_force_stop_is_off(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env, running=True)
    env.settings = dataclasses.replace(env.settings, force_stop=False)
    report = teardown(env)
    assert any(f"VM {vmid}" in line and "force_stop" in line for line in report.left)
    with memory.open() as model:
        assert model.state["vms"][str(vmid)]["running"]


def test_a_clone_from_a_snapshot_and_the_next_user_of_a_dead_id_stay(
    env: Environment, memory: MemoryHost
) -> None:
    mine, short = ours(env), ours(env)
    api, name, pool = env.outer.api, f"nested-pve-{env.run.id}", pool_name(env.settings, env.run)
    api.post(f"/nodes/father/qemu/{mine}/snapshot", snapname="before")
    clone = 99_800
    api.post(f"/nodes/father/qemu/{mine}/clone", newid=clone, name=name, pool=pool, snapname="before")
    age(memory)
    api.delete(f"/nodes/father/qemu/{short}")
    # Until the next broadcast the host shows this one under the dead VM's name.
    foreign(env, short, "database", description="the data")
    before = {vmid: memory.configuration(vmid) for vmid in (clone, short)}
    report = teardown(env)
    assert report.destroyed == (f"VM {mine}",)
    assert {vmid: memory.configuration(vmid) for vmid in (clone, short)} == before


def test_two_runs_on_one_host_take_only_their_own(
    env: Environment, memory: MemoryHost, tmp_path: Path
) -> None:
    other = Run.create(env.settings, tmp_path)
    create_pool(env.outer.api, other, env.settings, 1_800_000_000)
    theirs = create_marked(env.outer, other, env.settings).vmid
    mine = ours(env)
    before = memory.configuration(theirs)
    report = teardown(env)
    assert (report.destroyed, report.left, report.kept) == ((f"VM {mine}",), (), ())
    assert memory.configuration(theirs) == before
    with memory.open() as model:
        assert list(model.state["pools"]) == [pool_name(env.settings, other)]


@pytest.mark.parametrize(
    "change",
    [{"protection": 1}, {"name": "mine-now"}, {"template": 1}],
    ids=lambda change: next(iter(change)),
)
def test_one_of_ours_that_must_not_be_taken_is_named_as_left(
    env: Environment, memory: MemoryHost, change: dict[str, Any]
) -> None:
    vmid = ours(env)
    with memory.open() as model:
        model.state["vms"][str(vmid)]["config"].update(change)
    report = teardown(env)
    assert any(f"VM {vmid}" in line and "ours by its marker, but" in line for line in report.left), report
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(vmid)]


def test_one_of_ours_that_somebody_took_out_of_the_pool_is_named_as_left(
    env: Environment, memory: MemoryHost
) -> None:
    vmid = ours(env)
    with memory.open() as model:
        model.state["pools"][pool_name(env.settings, env.run)]["vms"].clear()
    assert any("it is not in the pool" in line for line in teardown(env).left)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(vmid)]


def test_ids_of_a_context_file_pass_the_same_proof(
    env: Environment, memory: MemoryHost, tmp_path: Path
) -> None:
    mine = ours(env)
    theirs = [foreign(env, 105, "from-earlier"), foreign(env, 99_800, f"nested-pve-{env.run.id}")]
    file = tmp_path / "context.json"
    file.write_text(
        json.dumps({"nested-pve_vm_id": mine, "old_vm_id": "105", "provisioned_vms": [99_800, None]})
    )
    env.settings = dataclasses.replace(env.settings, context_file=file)
    before = {vmid: memory.configuration(vmid) for vmid in theirs}
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {mine}",), ())
    assert {vmid: memory.configuration(vmid) for vmid in theirs} == before


def test_the_lock_of_a_dead_task_is_lifted_on_our_own_vm(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    with memory.open() as model:
        model.state["vms"][str(vmid)]["config"]["lock"] = "snapshot"
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {vmid}",), ())


def test_a_task_of_ours_that_still_works_is_stopped_and_anothers_is_waited_for(
    env: Environment, memory: MemoryHost
) -> None:
    mine, busy = ours(env), ours(env)
    with memory.open() as model:
        model.state["delays"].update(qmconfig=600, qmsnapshot=1.0)
    env.outer.api.post(f"/nodes/father/qemu/{mine}/config", scsi1="local:4")
    upid = memory.connect().api.post(f"/nodes/father/qemu/{busy}/snapshot", snapname="theirs")
    report = teardown(env)
    assert sorted(report.destroyed) == sorted([f"VM {mine}", f"VM {busy}"])
    with memory.open() as model:
        tasks = {task["upid"]: task for task in model.state["tasks"]}
        ends = [task["exit"] for task in tasks.values() if task["id"] == str(mine)]
        sent = [c for c in model.state["commands"] if c.startswith("DELETE /nodes/father/tasks")]
    assert "received interrupt" in ends
    assert tasks[upid]["exit"] == "OK"
    assert not [c for c in sent if upid in c]


def test_a_create_that_was_cut_off_and_ends_during_the_teardown_is_found(
    env: Environment, memory: MemoryHost
) -> None:
    with memory.open() as model:
        model.state["delays"]["qmcreate"] = 2.0
    # Behind the harness's back: its answer, the task's id, never came.
    made_late(memory, env, new_uuid())
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {LOW}",), ())


def test_a_create_that_ends_between_two_looks_at_its_configuration_is_proved_again(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_leftover = killed_tasks.find_leftover

    def ended_by_now(*given: Any) -> Any:
        with memory.open() as model:
            for task in model.state["tasks"]:
                task["due"] = min(task["due"], model.now)
            model.settle()
        return find_leftover(*given)

    with memory.open() as model:
        model.state["delays"]["qmcreate"] = 600.0
    made_late(memory, env, new_uuid())
    monkeypatch.setattr(killed_tasks, "find_leftover", ended_by_now)
    report = teardown(env)
    assert (report.destroyed, report.left, report.kept) == ((f"VM {LOW}",), (), ())


def test_what_a_call_that_was_cut_off_makes_later_is_waited_for(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: Any, **_params: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(env.outer.api.wrapped, "post", interrupted)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        ours(env)
    monkeypatch.undo()
    uuid = new_uuid()
    late = threading.Timer(1.5, made_late, [memory, env, uuid])
    late.start()
    report = teardown(env)
    late.join()
    assert (report.destroyed, report.left) == ((f"VM {LOW}",), ())


def made_late(memory: MemoryHost, env: Environment, uuid: str) -> None:
    memory.connect().api.post(
        "/nodes/father/qemu",
        vmid=LOW,
        name=f"nested-pve-{env.run.id}",
        pool=pool_name(env.settings, env.run),
        description=marker(env, LOW, uuid),
        smbios1=f"uuid={uuid}",
    )


def test_a_create_whose_worker_did_not_start_takes_the_next_id(env: Environment, memory: MemoryHost) -> None:
    text = "got no worker upid - start worker failed"
    memory.fault("POST", "/nodes/father/qemu", text=text)
    vmid = ours(env)
    with memory.open() as model:
        assert list(model.state["vms"]) == [str(vmid)]


def test_an_id_that_stands_in_a_pool_without_a_vm_is_never_drawn(
    env: Environment, memory: MemoryHost
) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=((LOW, LOW + 1),))
    with memory.open() as model:
        model.state["pools"]["theirs"] = {"comment": "a: b", "vms": [LOW]}
    assert create_marked(env.outer, env.run, settings).vmid == LOW + 1


@pytest.mark.parametrize("ranges", [((LOW, LOW),), ((LOW, LOW), (LOW, LOW))], ids=["one", "overlapping"])
def test_a_full_range_is_an_error_that_says_so(env: Environment, ranges: tuple[tuple[int, int], ...]) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=ranges)
    foreign(env, LOW, "somebodys")
    with pytest.raises(NoFreeId, match=f"{LOW}-{LOW}"):
        create_marked(env.outer, env.run, settings)


def test_a_host_that_fails_half_way_is_told_with_what_is_left(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    memory.fault("DELETE", f"/nodes/father/qemu/{vmid}", text="the storage burns", times=9999)
    report = teardown_within(env, 2.0)
    assert any("the storage burns" in line for line in report.left)
    assert any(line.startswith("pool ") for line in report.left)


class Shown(Listener):
    """Records what a teardown reports."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def phase_started(self, phase: Phase) -> None:
        self.seen.append(f"{phase.name}:")

    def phase_finished(self, ended: PhaseEnded) -> None:
        assert ended.seconds >= 0
        assert (ended.facts, ended.cause) == ({}, None)
        self.seen.append(f"{ended.phase.name} {ended.status}")

    def progress(self, text: str) -> None:
        self.seen.append(text)


def test_a_teardown_says_what_it_is_at(env: Environment, memory: MemoryHost) -> None:
    ours(env)
    stuck = ours(env)
    memory.fault("DELETE", f"/nodes/father/qemu/{stuck}", text="403 Permission check failed", times=9999)
    shown = Shown()
    assert teardown(env, shown).left
    assert [each for each in shown.seen if each.split()[0].rstrip(":") in TEARDOWN_PHASES] == [
        "discover:", "discover done", "cleanup_inner:", "cleanup_inner done", "destroy:", "destroy done",
    ]  # fmt: skip
    said = shown.seen[shown.seen.index("destroy:") :]
    in_order = ("destroying 2 VMs", "destroying 2 VMs, 1 gone", "searching for VMs again")
    assert said.index(in_order[0]) < said.index(in_order[1]) < said.index(in_order[2])


def test_a_watcher_that_fails_does_not_hold_a_teardown_up(env: Environment, memory: MemoryHost) -> None:
    ours(env)

    class Broken(Shown):
        def phase_started(self, phase: Phase) -> None:
            raise RuntimeError(f"can't start new thread for {phase.name}")

        def progress(self, text: str) -> None:
            raise BrokenPipeError(text)

    assert teardown(env, Broken()).left == ()
    with memory.open() as model:
        assert model.state["vms"] == {}


def test_a_refusal_is_told_at_once(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    memory.fault("DELETE", f"/nodes/father/qemu/{vmid}", text="403 Permission check failed", times=9999)
    assert any("Permission check failed" in line for line in teardown(env).left)
    with memory.open() as model:
        assert len([c for c in model.state["commands"] if c == f"DELETE /nodes/father/qemu/{vmid}"]) == 2


def undoing(env: Environment, stays: str) -> list[str]:
    """Attach it to what was no PVE, with something to undo; the list says when that was done."""
    done: list[str] = []
    env.settings = dataclasses.replace(env.settings, attach="plain")
    env.facts["preflight"] = {"awaited": {"PVE": "ensure_pve"}}

    def undo() -> list[str]:
        done.append("undone")
        return [stays]

    env.undo.append(undo)
    return done


def test_where_no_pve_came_to_be_nothing_is_left_but_what_was_not_undone(
    env: Environment, memory: MemoryHost
) -> None:
    done = undoing(env, "a file")
    memory.fault("GET", ".*", text="sh: 1: pvesh: not found", times=9999)
    assert (teardown(env), done) == (TeardownReport(left=("a file",)), ["undone"])


@pytest.mark.parametrize(
    ("text", "awaited", "lease"),
    [
        ("ipcc_send_rec[1] failed: Connection refused", True, False),
        ("sh: 1: pvesh: not found", False, False),
        ("sh: 1: pvesh: not found", True, True),
    ],
    ids=["sick", "was there", "claimed"],
)
def test_what_phases_added_is_undone_though_nobody_can_look(
    env: Environment, memory: MemoryHost, text: str, awaited: bool, lease: bool
) -> None:
    done = undoing(env, "a file")
    if not awaited:
        env.facts["preflight"]["awaited"] = {}
    if lease:
        env.keep_lease()
        env.end_lease()
    memory.fault("GET", ".*", text=text, times=9999)
    with pytest.raises(PveError) as failed:
        teardown(env)
    assert (failed.value.__notes__, done, env.undo) == (["a file"], ["undone"], [])


def teardown_within(env: Environment, seconds: float) -> TeardownReport:
    set_scale(seconds / BUDGET)
    try:
        return teardown(env)
    finally:
        set_scale(1.0)
