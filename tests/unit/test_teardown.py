"""Exactly what is proved ours goes; the rest keeps its configuration to the byte."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from memory_host import MemoryHost

from pytest_nestedpve.audit import AuditLog
from pytest_nestedpve.creation import create_marked
from pytest_nestedpve.discovery import discover
from pytest_nestedpve.environment import Environment
from pytest_nestedpve.ownership import Marker, create_pool, new_uuid, pool_name
from pytest_nestedpve.pve import guests
from pytest_nestedpve.run import Run
from pytest_nestedpve.settings import Settings
from pytest_nestedpve.teardown import teardown

LOW, HIGH = 99900, 99999


@pytest.fixture
def env(tmp_path: Path) -> Iterator[Environment]:
    settings = dataclasses.replace(Settings(), run_dir=tmp_path / "runs")
    run = Run.create(settings, tmp_path)
    host = MemoryHost(tmp_path / "host.json")
    audit = AuditLog(run.directory.audit, run.id)
    yield Environment(
        settings=settings,
        run=run,
        connect=host.connect,
        audit=audit,
        progress=lambda _text: None,
        rootdir=tmp_path,
    )
    audit.close()


@pytest.fixture
def memory(env: Environment, tmp_path: Path) -> MemoryHost:
    create_pool(env.outer.api, env.run, env.settings, 1_800_000_000)
    return MemoryHost(tmp_path / "host.json")


def ours(env: Environment, *, running: bool = False) -> int:
    made = create_marked(env.outer, env.run, env.settings)
    guests.configure(env.outer.api, made.node, made.vmid, scsi0="local:8,format=qcow2")
    if running:
        guests.start(env.outer.api, made.node, made.vmid)
    return made.vmid


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
    stop = guests.stop

    def stop_and_swap(api: Any, node: str, which: int, **kwargs: Any) -> Any:
        result = stop(api, node, which, **kwargs)
        with memory.open() as model:
            model.state["vms"][str(vmid)]["config"] = {"name": "somebodys", "smbios1": f"uuid={new_uuid()}"}
        return result

    monkeypatch.setattr(guests, "stop", stop_and_swap)
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


def test_a_volume_that_stays_is_reported(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    with memory.open() as model:
        model.state["sticky"].append(volid)
    report = teardown(env)
    assert any(volid in line for line in report.left), report


def test_what_a_killed_create_of_ours_left_is_removed(env: Environment, memory: MemoryHost) -> None:
    upid = env.outer.api.post("/nodes/father/qemu", vmid=LOW, name="nested-pve-x")
    with memory.open() as model:
        model.state["vms"][str(LOW)]["config"] = {"lock": "create"}
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
