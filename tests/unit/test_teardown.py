"""A teardown destroys exactly what is proved ours; everything else keeps its configuration to the byte."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from standin_environment import ours
from standin_host import IMAGE, StandinHost

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


def foreign(host: StandinHost, vmid: int, name: str | None, **options: Any) -> int:
    """Create a VM that is not the run's; its id."""
    host.create_vm(vmid, **{"name": name, "scsi0": "local:4", **options})
    return vmid


def marker(env: Environment, vmid: int, uuid: str, run: str | None = None) -> str:
    return Marker(run or env.run.id, vmid, uuid).to_text()


@pytest.mark.parametrize("fresh", [True, False], ids=["not yet broadcast", "broadcast"])
def test_of_a_dozen_similar_vms_exactly_ours_are_destroyed(
    env: Environment, host: StandinHost, fresh: bool
) -> None:
    mine = [ours(env, running=True), ours(env)]
    api, uuid, pool = env.outer.api, new_uuid(), pool_name(env.settings, env.run)
    free = iter(v for v in range(LOW, HIGH) if v not in mine)
    name = "nested-pve-" + env.run.id
    other = "npve-" + "ab" * 6
    api.post("/pools", poolid=other, comment="somebody's")
    kept = [
        foreign(host, 500, name),
        foreign(host, next(free), "database"),
        foreign(host, next(free), name, pool=other),
        foreign(host, next(free), name, description=marker(env, 99_000, uuid), smbios1=f"uuid={uuid}"),
        foreign(host, next(free), None),
    ]
    forged = next(free)
    kept.append(foreign(host, forged, name, description=marker(env, forged, new_uuid()), pool=pool))
    another = next(free)
    kept.append(
        foreign(
            host,
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
            host, outside, name, description=marker(env, outside, uuid), smbios1=f"uuid={uuid}", pool=other
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
    host.manage_by_ha(managed)
    host.container(container, hostname=name)
    container_file = host.file(f"/etc/pve/nodes/father/lxc/{container}.conf")
    kept += [protected, template, managed]
    if not fresh:
        host.broadcast()
    before = [container_file.read_text(), *map(host.configuration, kept)]

    report = teardown(env)

    assert (host.vms(), host.containers()) == (sorted(kept), [container])
    assert not [v for v in host.volumes() if f"/vm-{mine[0]}-" in v or f"/vm-{mine[1]}-" in v]
    sent = [call for call in host.calls() if call.startswith("DELETE /nodes/father/qemu")]
    assert [container_file.read_text(), *map(host.configuration, kept)] == before
    assert sorted(report.destroyed) == sorted(f"VM {vmid}" for vmid in mine)
    assert len(sent) == len(mine)
    # A VM that is not proved ours prevents the deletion of the pool, which is reported.
    assert [line for line in report.left if line.startswith(f"pool {pool}")]


def test_a_clean_run_leaves_no_pool_volume_or_snippet(env: Environment, host: StandinHost) -> None:
    ours(env, running=True)
    env.outer.ssh.put(b"#cloud-config\n", f"/var/lib/vz/snippets/npve-{env.run.id}-vendor.yaml")
    env.outer.ssh.put(b"#cloud-config\n", f"/var/lib/vz/snippets/npve-{'ab' * 6}-vendor.yaml")
    report = teardown(env)
    assert report.left == ()
    assert (host.vms(), host.pools()) == ([], {})
    assert host.volumes() == [IMAGE, f"local:snippets/npve-{'ab' * 6}-vendor.yaml"]


def test_a_vm_that_replaces_ours_between_stop_and_delete_is_not_destroyed(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    vmid = ours(env, running=True)
    stop = qemu.stop

    def stop_and_replace(*arguments: Any, **options: Any) -> Any:
        result = stop(*arguments, **options)
        host.replace_config(vmid, {"name": "foreign", "smbios1": f"uuid={new_uuid()}"})
        return result

    monkeypatch.setattr(qemu, "stop", stop_and_replace)
    report = teardown(env)
    assert host.vms() == [vmid]
    assert any("no marker" in line for line in report.kept)


def test_a_failed_destroy_is_retried_and_the_other_vms_are_destroyed(
    env: Environment, host: StandinHost
) -> None:
    first, second = ours(env), ours(env)
    host.fault("DELETE", f"/nodes/father/qemu/{first}", text="can't lock file '/x' - got timeout", times=2)
    report = teardown(env)
    assert sorted(report.destroyed) == sorted([f"VM {first}", f"VM {second}"])
    assert report.left == ()


def test_the_leftover_of_our_killed_create_is_removed(env: Environment, host: StandinHost) -> None:
    host.slow(qmcreate=600)
    upid = env.outer.api.post("/nodes/father/qemu", vmid=LOW, name="nested-pve-x")
    host.kill_task(upid)
    assert host.config(LOW) == {"lock": "create"}
    assert teardown(env).left == ()
    assert host.vms() == []


def test_a_bare_lock_by_a_task_of_another_run_is_kept(env: Environment, host: StandinHost) -> None:
    host.slow(qmcreate=600)
    host.create_vm(LOW, name="nested-pve-x")
    host.kill_task()
    report = teardown(env)
    assert any("not by a task of this run" in line for line in report.kept)
    assert host.vms() == [LOW]


def test_after_a_lost_reply_to_a_create_its_vm_is_discovered(env: Environment, host: StandinHost) -> None:
    host.fault("POST", "/nodes/father/qemu", do="drop")
    vmid = ours(env)
    assert [vm.vmid for vm in discover(env.outer, env.settings, env.run.id)] == [vmid]


def test_an_id_with_foreign_volumes_is_never_selected(env: Environment, host: StandinHost) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=((LOW, LOW + 1),))
    host.volume(f"local:{LOW}/vm-{LOW}-disk-0.raw")
    assert create_marked(env.outer, env.run, settings).vmid == LOW + 1


def test_a_running_vm_is_left_over_and_reported_without_force_stop(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env, running=True)
    env.settings = dataclasses.replace(env.settings, force_stop=False)
    report = teardown(env)
    assert any(f"VM {vmid}" in line and "force_stop" in line for line in report.left)
    assert host.is_running(vmid)


def test_a_clone_from_a_snapshot_and_a_foreign_vm_with_a_former_id_are_kept(
    env: Environment, host: StandinHost
) -> None:
    mine, former = ours(env), ours(env)
    api, name, pool = env.outer.api, f"nested-pve-{env.run.id}", pool_name(env.settings, env.run)
    api.post(f"/nodes/father/qemu/{mine}/snapshot", snapname="before")
    clone = 99_800
    api.post(f"/nodes/father/qemu/{mine}/clone", newid=clone, name=name, pool=pool, snapname="before")
    host.broadcast()
    api.delete(f"/nodes/father/qemu/{former}")
    # Until the next broadcast the host lists this one with the name of the destroyed VM.
    foreign(host, former, "database", description="the data")
    before = {vmid: host.configuration(vmid) for vmid in (clone, former)}
    report = teardown(env)
    assert report.destroyed == (f"VM {mine}",)
    assert {vmid: host.configuration(vmid) for vmid in (clone, former)} == before


def test_a_teardown_destroys_nothing_of_another_run_on_the_same_host(
    env: Environment, host: StandinHost, tmp_path: Path
) -> None:
    other = Run.create(env.settings, tmp_path)
    create_pool(env.outer.api, other, env.settings, 1_800_000_000)
    theirs = create_marked(env.outer, other, env.settings).vmid
    mine = ours(env)
    before = host.configuration(theirs)
    report = teardown(env)
    assert (report.destroyed, report.left, report.kept) == ((f"VM {mine}",), (), ())
    assert host.configuration(theirs) == before
    assert list(host.pools()) == [pool_name(env.settings, other)]


@pytest.mark.parametrize(
    "change",
    [{"protection": 1}, {"name": "mine-now"}, {"template": 1}],
    ids=lambda change: next(iter(change)),
)
def test_a_vm_of_ours_that_must_not_be_destroyed_is_reported_as_left_over(
    env: Environment, host: StandinHost, change: dict[str, Any]
) -> None:
    vmid = ours(env)
    host.edit_vm(vmid, **change)
    report = teardown(env)
    assert any(f"VM {vmid}" in line and "ours by its marker, but" in line for line in report.left), report
    assert host.vms() == [vmid]


def test_a_vm_of_ours_that_was_removed_from_the_pool_is_reported_as_left_over(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    host.connect().api.put("/pools", poolid=pool_name(env.settings, env.run), vms=vmid, delete=1)
    assert any("it is not in the pool" in line for line in teardown(env).left)
    assert host.vms() == [vmid]


def test_ids_of_a_context_file_are_proved_too(env: Environment, host: StandinHost, tmp_path: Path) -> None:
    mine = ours(env)
    theirs = [foreign(host, 105, "from-earlier"), foreign(host, 99_800, f"nested-pve-{env.run.id}")]
    file = tmp_path / "context.json"
    file.write_text(
        json.dumps({"nested-pve_vm_id": mine, "old_vm_id": "105", "provisioned_vms": [99_800, None]})
    )
    env.settings = dataclasses.replace(env.settings, context_file=file)
    before = {vmid: host.configuration(vmid) for vmid in theirs}
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {mine}",), ())
    assert {vmid: host.configuration(vmid) for vmid in theirs} == before


def test_the_lock_of_a_killed_task_is_removed_from_our_own_vm(env: Environment, host: StandinHost) -> None:
    vmid = ours(env)
    host.edit_vm(vmid, lock="snapshot")
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {vmid}",), ())


def test_a_running_task_of_ours_is_stopped_and_a_foreign_one_awaited(
    env: Environment, host: StandinHost
) -> None:
    mine, busy = ours(env), ours(env)
    host.slow(qmconfig=600, qmsnapshot=1.0)
    env.outer.api.post(f"/nodes/father/qemu/{mine}/config", scsi1="local:4")
    upid = host.connect().api.post(f"/nodes/father/qemu/{busy}/snapshot", snapname="theirs")
    report = teardown(env)
    assert sorted(report.destroyed) == sorted([f"VM {mine}", f"VM {busy}"])
    tasks = {task.upid: task for task in host.tasks()}
    assert "received interrupt" in [task.status for task in tasks.values() if task.id == str(mine)]
    assert tasks[upid].status == "OK"
    assert not [
        call for call in host.calls() if call.startswith("DELETE /nodes/father/tasks") and upid in call
    ]


def test_a_create_without_a_reply_that_ends_during_the_teardown_is_discovered(
    env: Environment, host: StandinHost
) -> None:
    host.slow(qmcreate=2.0)
    create_unnoticed(host, env, new_uuid())
    report = teardown(env)
    assert (report.destroyed, report.left) == ((f"VM {LOW}",), ())


def test_a_create_that_ends_between_two_reads_of_its_configuration_is_proved_again(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_leftover = killed_tasks.find_leftover
    pool = pool_name(env.settings, env.run)
    create_unnoticed(host, env, new_uuid())
    complete, (comment, members), upid = host.config(LOW), host.pools()[pool], host.tasks("qmcreate")[0].upid
    host.set_pool(pool, comment, [])
    host.replace_config(LOW, {"lock": "create"})
    host.edit_task(upid, status=None, endtime=None)

    def end_create(*arguments: Any) -> Any:
        host.replace_config(LOW, complete)
        host.set_pool(pool, comment, members)
        host.edit_task(upid, status="OK", endtime=int(host.now()))
        return find_leftover(*arguments)

    monkeypatch.setattr(killed_tasks, "find_leftover", end_create)
    report = teardown(env)
    assert (report.destroyed, report.left, report.kept) == ((f"VM {LOW}",), (), ())


@pytest.mark.usefixtures("pool")
def test_a_vm_that_its_create_task_has_not_added_to_the_pool_yet_is_awaited(
    env: Environment, host: StandinHost
) -> None:
    """PVE adds a VM to its pool at the end of the task: until then it is not judged as removed from it."""
    vmid = ours(env)
    name = pool_name(env.settings, env.run)
    comment, _ = host.pools()[name]
    host.set_pool(name, comment, vms=[])
    host.slow(qmconfig=60)
    upid = host.connect().api.post(f"/nodes/father/qemu/{vmid}/config", scsi1="local:1")

    def end_task() -> None:
        host.kill_task(upid)
        host.set_pool(name, comment, vms=[vmid])

    tasks = r"/nodes/father/tasks"
    host.before("GET", tasks, lambda: host.before("GET", tasks, end_task))
    assert teardown(env).left == ()
    assert host.vms() == []


def test_a_protected_vm_is_reported_at_once_though_a_task_works_on_it(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    host.edit_vm(vmid, protection=1)
    host.slow(qmconfig=60)
    host.connect().api.post(f"/nodes/father/qemu/{vmid}/config", scsi1="local:1")
    report = teardown_within(env, 20)
    assert any("protection" in line or "protected" in line for line in report.left), report
    host.clear_faults()


def test_a_vm_created_late_by_an_interrupted_call_is_awaited(
    env: Environment, host: StandinHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: Any, **_params: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(env.outer.api.wrapped, "post", interrupt)  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        ours(env)
    monkeypatch.undo()
    uuid = new_uuid()
    late = threading.Timer(1.5, create_unnoticed, [host, env, uuid])
    late.start()
    report = teardown(env)
    late.join()
    assert (report.destroyed, report.left) == ((f"VM {LOW}",), ())


def create_unnoticed(host: StandinHost, env: Environment, uuid: str) -> None:
    """Create a VM of the run whose task's UPID does not reach the run."""
    host.create_vm(
        LOW,
        name=f"nested-pve-{env.run.id}",
        pool=pool_name(env.settings, env.run),
        description=marker(env, LOW, uuid),
        smbios1=f"uuid={uuid}",
    )


def test_a_create_whose_worker_did_not_start_uses_the_next_id(env: Environment, host: StandinHost) -> None:
    text = "got no worker upid - start worker failed"
    host.fault("POST", "/nodes/father/qemu", text=text)
    vmid = ours(env)
    assert host.vms() == [vmid]


def test_an_id_that_a_pool_lists_without_a_vm_is_never_selected(env: Environment, host: StandinHost) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=((LOW, LOW + 1),))
    host.set_pool("theirs", "a: b", [LOW])
    assert create_marked(env.outer, env.run, settings).vmid == LOW + 1


@pytest.mark.parametrize("ranges", [((LOW, LOW),), ((LOW, LOW), (LOW, LOW))], ids=["one", "overlapping"])
def test_a_full_range_is_an_error_that_names_the_range(
    env: Environment, host: StandinHost, ranges: tuple[tuple[int, int], ...]
) -> None:
    settings = dataclasses.replace(env.settings, vmid_ranges=ranges)
    foreign(host, LOW, "foreign")
    with pytest.raises(NoFreeId, match=f"{LOW}-{LOW}"):
        create_marked(env.outer, env.run, settings)


def test_a_failure_during_the_teardown_is_reported_with_the_leftovers(
    env: Environment, host: StandinHost
) -> None:
    vmid = ours(env)
    host.fault("DELETE", f"/nodes/father/qemu/{vmid}", text="the storage burns", times=9999)
    report = teardown_within(env, 2.0)
    assert any("the storage burns" in line for line in report.left)
    assert any(line.startswith("pool ") for line in report.left)


class Recorder(Listener):
    """Records the reports of a teardown."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def phase_started(self, phase: Phase) -> None:
        self.lines.append(f"{phase.name}:")

    def phase_finished(self, ended: PhaseEnded) -> None:
        assert ended.seconds >= 0
        assert (ended.facts, ended.cause) == ({}, None)
        self.lines.append(f"{ended.phase.name} {ended.status}")

    def progress(self, text: str) -> None:
        self.lines.append(text)


def test_a_teardown_reports_its_phases_and_progress(env: Environment, host: StandinHost) -> None:
    ours(env)
    stuck = ours(env)
    host.fault("DELETE", f"/nodes/father/qemu/{stuck}", text="403 Permission check failed", times=9999)
    recorder = Recorder()
    assert teardown(env, recorder).left
    assert [line for line in recorder.lines if line.split()[0].rstrip(":") in TEARDOWN_PHASES] == [
        "discover:", "discover done", "cleanup_inner:", "cleanup_inner done", "destroy:", "destroy done",
    ]  # fmt: skip
    lines = recorder.lines[recorder.lines.index("destroy:") :]
    in_order = ("destroying 2 VMs", "destroying 2 VMs, 1 gone", "searching for VMs again")
    assert lines.index(in_order[0]) < lines.index(in_order[1]) < lines.index(in_order[2])


def test_a_listener_that_fails_does_not_prevent_a_teardown(env: Environment, host: StandinHost) -> None:
    ours(env)

    class Broken(Recorder):
        def phase_started(self, phase: Phase) -> None:
            raise RuntimeError(f"can't start new thread for {phase.name}")

        def progress(self, text: str) -> None:
            raise BrokenPipeError(text)

    assert teardown(env, Broken()).left == ()
    assert host.vms() == []


def test_a_refused_destroy_is_reported_without_retries(env: Environment, host: StandinHost) -> None:
    vmid = ours(env)
    host.fault("DELETE", f"/nodes/father/qemu/{vmid}", text="403 Permission check failed", times=9999)
    assert any("Permission check failed" in line for line in teardown(env).left)
    assert host.calls().count(f"DELETE /nodes/father/qemu/{vmid}") == 2


def add_undo(env: Environment, leftover: str) -> list[str]:
    """Attach it to a plain Debian with one change to undo; the list gets an entry when that is undone."""
    calls: list[str] = []
    env.settings = dataclasses.replace(env.settings, attach="plain")
    env.facts["preflight"] = {"awaited": {"PVE": "ensure_pve"}}

    def undo() -> list[str]:
        calls.append("undone")
        return [leftover]

    env.undo.append(undo)
    return calls


def test_if_no_pve_was_installed_only_failed_undos_are_left_over(env: Environment, host: StandinHost) -> None:
    calls = add_undo(env, "a file")
    host.fault("GET", text="sh: 1: pvesh: not found", times=9999)
    assert (teardown(env), calls) == (TeardownReport(left=("a file",)), ["undone"])


@pytest.mark.parametrize(
    ("text", "awaited", "lease"),
    [
        ("ipcc_send_rec[1] failed: Connection refused", True, False),
        ("sh: 1: pvesh: not found", False, False),
        ("sh: 1: pvesh: not found", True, True),
    ],
    ids=["broken", "existed", "claimed"],
)
def test_changes_of_phases_are_undone_though_pve_does_not_answer(
    env: Environment, host: StandinHost, text: str, awaited: bool, lease: bool
) -> None:
    calls = add_undo(env, "a file")
    if not awaited:
        env.facts["preflight"]["awaited"] = {}
    if lease:
        env.keep_lease()
        env.end_lease()
    host.fault("GET", text=text, times=9999)
    with pytest.raises(PveError) as failed:
        teardown(env)
    assert (failed.value.__notes__, calls, env.undo) == (["a file"], ["undone"], [])


def teardown_within(env: Environment, seconds: float) -> TeardownReport:
    set_scale(seconds / BUDGET)
    try:
        return teardown(env)
    finally:
        set_scale(1.0)
