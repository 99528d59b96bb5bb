"""The volumes of a run's VMs go with them, and no other volume does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from memory_host import MemoryHost
from memory_model import volume
from standin_environment import ours

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.tasks import TaskResult
from pytest_nestedpve.teardown.teardown import teardown
from pytest_nestedpve.teardown.volumes import Volumes

pytestmark = pytest.mark.usefixtures("pool")


def test_a_volume_that_stays_is_reported(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    with memory.open() as model:
        model.state["sticky"].append(volid)
    report = teardown(env)
    assert any(volid in line for line in report.left), report


def warned(memory: MemoryHost, vmid: int) -> bool:
    """Whether the destroy of the VM ended with a warning, which is success (recorded: destroy-034)."""
    with memory.open() as model:
        tasks = [each for each in model.state["tasks"] if each["id"] == str(vmid)]
    return [each["exit"] for each in tasks if each["type"] == "qmdestroy"] == ["WARNINGS: 1"]


def after_each_destroy(monkeypatch: pytest.MonkeyPatch, then: Callable[[TaskResult], None]) -> None:
    """Have `then` called between the end of a destroy and what is made of it."""
    destroy = qemu.destroy

    def both(*given: Any, **more: Any) -> TaskResult:
        done = destroy(*given, **more)
        then(done)
        return done

    monkeypatch.setattr(qemu, "destroy", both)


def test_a_volume_that_a_destroy_left_with_a_warning_is_found_and_removed(
    env: Environment, memory: MemoryHost
) -> None:
    vmid, other = ours(env), ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    with memory.open() as model:
        model.state["busy"].append(volid)
    report = teardown(env)
    assert warned(memory, vmid)
    assert not warned(memory, other)
    assert report.left == ()
    assert sorted(report.destroyed) == sorted([f"VM {vmid}", f"VM {other}"])
    with memory.open() as model:
        assert [each for each in model.state["volumes"] if "/vm-" in each] == []
        sent = [each for each in model.state["commands"] if each.startswith("DELETE") and "/content/" in each]
    # The one that went by itself is not asked for again.
    assert sent == [f"DELETE /nodes/father/storage/local/content/{volid}"]


@pytest.mark.parametrize(
    "who", ["shared storage", "listed for it", "taken", "being taken", "taken elsewhere"]
)
def test_a_volume_left_with_a_warning_that_is_not_surely_ours_stays_and_is_told(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch, who: str
) -> None:
    vmid = ours(env)
    named = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    # Of a guest of another cluster that has the same id; of another VM of this host; ours, perhaps.
    stays, why = {
        "shared storage": (f"san:{vmid}/vm-{vmid}-disk-7.qcow2", "shared storage"),
        "listed for it": ("local:500/vm-500-disk-0.raw", "not named for it"),
        "taken elsewhere": (named, "the id is in use again, on father2"),
    }.get(who, (named, "the id is in use again"))
    with memory.open() as model:
        model.state["busy"].append(named)
        if who == "shared storage":
            model.state["storages"]["san"] = {**model.state["storages"]["local"], "shared": 1, "path": "/san"}
        if stays != named:
            model.state["volumes"][stays] = volume("images", "raw", 1, vmid)

    def take(done: TaskResult) -> None:
        assert done.warnings
        with memory.open() as model:
            node = "father2" if who == "taken elsewhere" and model.join("father2") else "father"
            if "taken" in who:
                model.begin_create(node, {"vmid": vmid})
            if who.startswith("taken"):
                model.end_create(vmid, {"name": "somebodys"})

    after_each_destroy(monkeypatch, take)
    report = teardown(env)
    assert any(f"{stays} (" in line and why in line for line in report.left), report
    assert warned(memory, vmid)
    with memory.open() as model:
        assert (str(vmid) in model.state["vms"]) == ("taken" in who)
        left = {each for each in model.state["volumes"] if "/vm-" in each}
    assert left == {stays}


LOCKED = "error during cfs-locked 'storage-local' operation: got lock request timeout"


def test_the_removal_of_a_volume_waits_for_a_lock_and_asks_again_whose_the_id_is(
    env: Environment, memory: MemoryHost
) -> None:
    vmid = ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    with memory.open() as model:
        model.state["busy"].append(volid)
    memory.fault("DELETE", "/nodes/father/storage/local/content/.*", text=LOCKED, times=2)
    assert teardown(env).left == ()
    with memory.open() as model:
        assert volid not in model.state["volumes"]


def test_a_disk_of_who_took_the_id_is_no_volume_of_ours_that_was_left(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"

    def take(_done: TaskResult) -> None:
        with memory.open() as model:
            model.begin_create("father", {"vmid": vmid})
            model.end_create(vmid, {"name": "somebodys", "scsi0": "local:1,format=qcow2"})
            assert model.state["vms"][str(vmid)]["config"]["scsi0"].startswith(volid)

    after_each_destroy(monkeypatch, take)
    report = teardown(env)
    assert report.left == ()
    with memory.open() as model:
        assert volid in model.state["volumes"]
        assert str(vmid) in model.state["vms"]


def test_nothing_is_removed_when_nobody_can_say_whether_the_id_is_free(
    env: Environment, memory: MemoryHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env)
    volid = f"local:{vmid}/vm-{vmid}-disk-0.qcow2"
    with memory.open() as model:
        model.state["busy"].append(volid)
    sweep = Volumes.sweep

    def unsure(*given: Any) -> Any:
        memory.fault("GET", f"/nodes/father/qemu/{vmid}/config", text="the host is busy", times=1)
        yield from sweep(*given)

    monkeypatch.setattr(Volumes, "sweep", unsure)
    report = teardown(env)
    assert any(f"{volid} (" in line and "the host is busy" in line for line in report.left), report
    with memory.open() as model:
        assert volid in model.state["volumes"]


def test_a_sick_storage_of_somebody_elses_holds_up_no_teardown(env: Environment, memory: MemoryHost) -> None:
    ours(env)
    with memory.open() as model:
        model.state["storages"]["nas"] = {**model.state["storages"]["local"], "path": "/mnt/nas"}
    memory.fault("GET", "/nodes/father/storage/nas/content", text="storage 'nas' is not online", times=1000)
    assert teardown(env).left == ()
    with memory.open() as model:
        assert model.state["vms"] == {}


def test_a_volume_that_no_configuration_names_goes_with_its_vm(env: Environment, memory: MemoryHost) -> None:
    vmid = ours(env)
    theirs = "local:99800/vm-99800-disk-0.raw"
    with memory.open() as model:
        for volid, owner in ((f"local:{vmid}/vm-{vmid}-disk-7.raw", vmid), (theirs, 99_800)):
            model.state["volumes"][volid] = {"content": "images", "format": "raw", "size": 1, "vmid": owner}
    assert teardown(env).left == ()
    with memory.open() as model:
        assert [volid for volid in model.state["volumes"] if "/vm-" in volid] == [theirs]


def test_a_base_goes_after_its_clones(env: Environment, memory: MemoryHost) -> None:
    base, clone = ours(env), ours(env)
    volid = f"local:{base}/vm-{base}-disk-0.qcow2"
    with memory.open() as model:
        config = model.state["vms"][str(clone)]["config"]
        linked = f"{volid}/{clone}/vm-{clone}-disk-0.qcow2"
        model.state["volumes"][linked] = model.state["volumes"].pop(config["scsi0"].split(",")[0])
        config["scsi0"] = linked
    report = teardown(env)
    assert (sorted(report.destroyed), report.left) == (sorted([f"VM {base}", f"VM {clone}"]), ())


def test_an_unnamed_volume_on_a_shared_storage_is_told_and_stays(
    env: Environment, memory: MemoryHost
) -> None:
    vmid = ours(env)
    volid = f"san:{vmid}/vm-{vmid}-disk-7.qcow2"
    with memory.open() as model:
        model.state["storages"]["san"] = dict(model.state["storages"]["local"], shared=1, path="/mnt/san")
        model.state["volumes"][volid] = {"content": "images", "format": "qcow2", "size": 1, "vmid": vmid}
    report = teardown(env)
    assert any(volid in line and "shared storage" in line for line in report.left), report
    with memory.open() as model:
        assert volid in model.state["volumes"]
        assert str(vmid) not in model.state["vms"]
