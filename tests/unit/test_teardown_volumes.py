"""A teardown removes the volumes of the run's VMs and no other volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from standin_environment import ours
from standin_host import StandinHost

from pytest_nestedpve.environment.environment import Environment
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.tasks import TaskResult
from pytest_nestedpve.teardown import destroy
from pytest_nestedpve.teardown.teardown import teardown
from pytest_nestedpve.teardown.volumes import Volumes

pytestmark = pytest.mark.usefixtures("pool")


def disk_of(vmid: int, storage: str = "local", number: int = 0) -> str:
    """The id of a disk that is named for the VM."""
    return f"{storage}:{vmid}/vm-{vmid}-disk-{number}.qcow2"


def disks(host: StandinHost) -> list[str]:
    """The ids of all disks of VMs on the first node."""
    return [volid for volid in host.volumes() if "/vm-" in volid]


def leave_with_warning(host: StandinHost, volid: str) -> None:
    """Have a destroy leave the volume with a warning; it can be removed afterwards."""
    host.fault(volume=volid, task="qmdestroy", text="unlink failed", times=1000)


def is_warned(host: StandinHost, vmid: int) -> bool:
    """Whether the destroy of the VM ended with a warning, which is success (recorded: destroy-034)."""
    return [task.status for task in host.tasks("qmdestroy") if task.id == str(vmid)] == ["WARNINGS: 1"]


def after_each_destroy(monkeypatch: pytest.MonkeyPatch, action: Callable[[TaskResult], None]) -> None:
    """Call `action` with the result of each destroy before the teardown gets it."""
    destroy_vm = qemu.destroy

    def destroy_and_act(*arguments: Any, **options: Any) -> TaskResult:
        result = destroy_vm(*arguments, **options)
        action(result)
        return result

    monkeypatch.setattr(qemu, "destroy", destroy_and_act)


def test_a_volume_that_cannot_be_removed_is_reported(env: Environment, host: StandinHost) -> None:
    volid = disk_of(ours(env))
    host.fault(volume=volid, text="unlink failed", times=1000)
    report = teardown(env)
    assert any(volid in line for line in report.left), report
    assert disks(host) == [volid]


def test_a_volume_that_a_destroy_left_with_a_warning_is_removed(env: Environment, host: StandinHost) -> None:
    vmid, other = ours(env), ours(env)
    leave_with_warning(host, disk_of(vmid))
    report = teardown(env)
    assert is_warned(host, vmid)
    assert not is_warned(host, other)
    assert report.left == ()
    assert sorted(report.destroyed) == sorted([f"VM {vmid}", f"VM {other}"])
    assert disks(host) == []
    # The volume that the destroy removed is not removed a second time.
    removals = [call for call in host.calls() if call.startswith("DELETE") and "/content/" in call]
    assert removals == [f"DELETE /nodes/father/storage/local/content/{disk_of(vmid)}"]


@pytest.mark.parametrize(
    "case", ["shared storage", "listed for the id", "id in use", "id in creation", "id in use elsewhere"]
)
def test_a_left_over_volume_that_may_belong_to_another_vm_is_kept_and_reported(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    vmid = ours(env)
    # Of a guest of another cluster that has the same id; of another VM of this host; ours, perhaps.
    volid, why = {
        "shared storage": (disk_of(vmid, "san", 7), "shared storage"),
        "listed for the id": (disk_of(500), "not named for it"),
        "id in use elsewhere": (disk_of(vmid), "the id is in use again, on father2"),
    }.get(case, (disk_of(vmid), "the id is in use again"))
    leave_with_warning(host, disk_of(vmid))
    if case == "shared storage":
        host.storage("san", shared=1)
    if volid != disk_of(vmid):
        host.volume(volid)
    if case == "listed for the id":
        host.change_answers(
            "GET",
            "/nodes/father/storage/local/content",
            lambda rows: [row | ({"vmid": vmid} if row["volid"] == volid else {}) for row in rows],
        )

    def use_id(result: TaskResult) -> None:
        assert result.warnings
        if case == "id in use elsewhere":
            host.join("father2")
            host.create_vm(vmid, "father2", name="somebodys")
        elif case == "id in creation":
            host.slow(qmcreate=60)
            host.create_vm(vmid)
            assert host.config(vmid)["lock"] == "create"
        elif case == "id in use":
            host.create_vm(vmid, name="somebodys")

    after_each_destroy(monkeypatch, use_id)
    monkeypatch.setattr(destroy, "UNKNOWN_TASK", 0.2)  # the create of somebody else does not end
    report = teardown(env)
    assert any(f"{volid} (" in line and why in line for line in report.left), report
    assert is_warned(host, vmid)
    assert (vmid in host.vms()) == case.startswith("id in")
    assert disks(host) == [volid]


LOCKED = "error during cfs-locked 'storage-local' operation: got lock request timeout"


def test_the_removal_of_a_volume_waits_for_a_lock_and_checks_the_id_before_each_attempt(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    leave_with_warning(host, disk_of(vmid))
    host.fault("DELETE", "/nodes/father/storage/local/content/**", text=LOCKED, times=2)
    assert teardown(env).left == ()
    assert disk_of(vmid) not in host.volumes()
    removal = f"DELETE /nodes/father/storage/local/content/{disk_of(vmid)}"
    check = f"GET /nodes/father/qemu/{vmid}/config"
    assert [call for call in host.calls() if call in (check, removal)][-6:] == [check, removal] * 3


def test_a_disk_of_another_vm_that_got_the_id_is_not_removed(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env)

    def use_id(_result: TaskResult) -> None:
        host.create_vm(vmid, name="somebodys", scsi0="local:1,format=qcow2")
        assert host.config(vmid)["scsi0"].startswith(disk_of(vmid))

    after_each_destroy(monkeypatch, use_id)
    report = teardown(env)
    assert report.left == ()
    assert disk_of(vmid) in host.volumes()
    assert vmid in host.vms()


def test_no_volume_is_removed_when_it_is_not_known_whether_the_id_is_free(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env)
    leave_with_warning(host, disk_of(vmid))
    sweep = Volumes.sweep

    def sweep_with_fault(*arguments: Any) -> Any:
        host.fault("GET", f"/nodes/father/qemu/{vmid}/config", text="the host is busy")
        yield from sweep(*arguments)

    monkeypatch.setattr(Volumes, "sweep", sweep_with_fault)
    report = teardown(env)
    line = f"{disk_of(vmid)} ("
    assert any(line in left and "the host is busy" in left for left in report.left), report
    assert disk_of(vmid) in host.volumes()


def test_a_broken_storage_without_volumes_of_the_run_delays_no_teardown(
    env: Environment, host: StandinHost
) -> None:
    ours(env)
    host.storage("nas", path="/mnt/nas")
    host.fault("GET", "/nodes/father/storage/nas/content", text="storage 'nas' is not online", times=1000)
    assert teardown(env).left == ()
    assert host.vms() == []


def test_a_volume_that_no_configuration_names_is_removed_with_its_vm(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    foreign = "local:99800/vm-99800-disk-0.raw"
    host.volume(disk_of(vmid, number=7))
    host.volume(foreign)
    assert teardown(env).left == ()
    assert disks(host) == [foreign]


def test_a_base_is_destroyed_after_its_clones(env: Environment, host: StandinHost) -> None:
    base, clone = ours(env), ours(env)
    env.outer.api.post(f"/nodes/father/qemu/{base}/template")
    host.edit_vm(base, template=None)
    linked = f"local:{base}/base-{base}-disk-0.qcow2/{clone}/vm-{clone}-disk-0.qcow2"
    host.remove_volume(disk_of(clone))
    host.volume(linked)
    host.edit_vm(clone, scsi0=linked)
    with pytest.raises(PveError, match="still in use by linked clone"):
        qemu.destroy(env.outer.api, "father", base)
    report = teardown(env)
    assert (sorted(report.destroyed), report.left) == (sorted([f"VM {base}", f"VM {clone}"]), ())


def test_a_volume_on_a_shared_storage_that_no_configuration_names_is_kept_and_reported(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    volid = disk_of(vmid, "san", 7)
    host.storage("san", shared=1)
    host.volume(volid)
    report = teardown(env)
    assert any(volid in line and "shared storage" in line for line in report.left), report
    assert volid in host.volumes()
    assert vmid not in host.vms()
