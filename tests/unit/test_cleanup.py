"""Which VMs --nested-destroy-only destroys: the rules keep a VM in doubt."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from standin_host import StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.marker import Marker, new_uuid
from pytest_nestedpve.ownership.pool import create_pool, pool_name, renew
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.run.audit_log import AuditLog
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.run.lock import SessionLock
from pytest_nestedpve.teardown.plan import execute, plan
from pytest_nestedpve.teardown.plan_row import Row

VMID = 99950
NAME = "nested-pve-old"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return Settings(run_dir=tmp_path / "runs")


@pytest.fixture
def outer(host: StandinHost) -> PveHost:
    return host.connect()


def create_look_alike(outer: PveHost, vmid: int = VMID, **config: Any) -> None:
    """Create a VM of somebody else, with the name of ours unless `config` has another one."""
    options = {"vmid": vmid, "name": NAME, "scsi0": "local:4", **config}
    outer.api.post("/nodes/father/qemu", **options)


def row_of(
    outer: PveHost, settings: Settings, vmid: int = VMID, extra: frozenset[int] = frozenset()
) -> Row | None:
    return next((row for row in plan(outer, settings, extra=extra) if row.vmid == vmid), None)


# -- without a marker ----------------------------------------------------------------------------


def test_a_plain_look_alike_is_destroyed_after_a_confirmation(outer: PveHost, settings: Settings) -> None:
    create_look_alike(outer)
    row = row_of(outer, settings)
    assert row is not None
    assert (row.verdict, row.needs_confirmation) == ("destroy", True)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"onboot": 1}, "starts at boot of the host"),
        ({"tags": "production"}, "tag production"),
        ({"description": "the router"}, "description"),
        ({"description": 'nestedpve: {"v":9}'}, "malformed"),
        ({"description": Marker("ab" * 6, VMID, new_uuid()).to_text()}, "names run abababababab"),
        ({"protection": 1}, "protected"),
        ({"lock": "backup"}, "locked"),
        ({"template": 1}, "template"),
        ({"meta": "creation-qemu=10.0.13"}, "age is unknown"),
        ({"meta": "creation-qemu=10.0.13,ctime=1500000000"}, "older than 7 days"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_look_alike_with_signs_of_use_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings, config: dict[str, Any], why: str
) -> None:
    create_look_alike(outer)
    host.edit_vm(VMID, **config)
    row = row_of(outer, settings)
    assert row is not None
    assert row.verdict == "keep"
    assert why in row.reason


Change = Callable[[StandinHost], None]
CHANGES: dict[str, Change] = {
    "backup": lambda host: host.backup_job("b", vmid=f"101,{VMID}"),
    "backup of all": lambda host: host.backup_job("b", all=1),
    "replication": lambda host: host.replication_job(f"{VMID}-0", guest=VMID),
    "HA": lambda host: host.manage_by_ha(VMID),
    "pool": lambda host: host.set_pool("prod", vms=[VMID]),
}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("backup", "names it"),
        ("backup of all", "includes all VMs"),
        ("replication", "names it"),
        ("HA", "HA"),
    ],
)
def test_a_look_alike_in_a_backup_replication_or_ha_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings, change: str, why: str
) -> None:
    create_look_alike(outer)
    CHANGES[change](host)
    row = row_of(outer, settings)
    assert row is not None
    assert row.verdict == "keep"
    assert why in row.reason


def test_a_look_alike_in_a_pool_or_with_a_snapshot_is_kept(outer: PveHost, settings: Settings) -> None:
    outer.api.post("/pools", poolid="prod")
    create_look_alike(outer, 99951, pool="prod")
    create_look_alike(outer, 99952, scsi0="local:4,format=qcow2")
    outer.api.post("/nodes/father/qemu/99952/snapshot", snapname="precious")
    for vmid, why in ((99951, "pool prod"), (99952, "snapshots")):
        row = row_of(outer, settings, vmid)
        assert row is not None
        assert row.verdict == "keep"
        assert why in row.reason


def test_a_vm_out_of_range_or_with_another_name_is_no_candidate(outer: PveHost, settings: Settings) -> None:
    create_look_alike(outer, 99899)
    create_look_alike(outer, 99951, name="database")
    create_look_alike(outer, 99952, name=None)
    assert [row.vmid for row in plan(outer, settings)] == []


def test_in_the_range_any_only_marked_vms_are_candidates(outer: PveHost, settings: Settings) -> None:
    create_look_alike(outer)
    assert plan(outer, dataclasses.replace(settings, vmid_ranges=((100, 999_999_999),))) == []


def test_an_id_of_the_context_file_waives_only_name_pattern_and_range(
    outer: PveHost, settings: Settings
) -> None:
    create_look_alike(outer, 200, name="from-earlier")
    create_look_alike(outer, 201, name="from-earlier", onboot=1)
    rows = {row.vmid: row for row in plan(outer, settings, extra=frozenset({200, 201, 202}))}
    assert set(rows) == {200, 201}
    assert (rows[200].verdict, rows[200].needs_confirmation) == ("destroy", True)
    assert rows[201].verdict == "keep"


def test_a_look_alike_that_changed_since_the_plan_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings
) -> None:
    create_look_alike(outer)
    rows = plan(outer, settings)
    host.edit_vm(VMID, description="mine, do not touch")
    before = host.configuration(VMID)
    outcomes = execute(outer, settings, rows)
    assert [outcome.result for outcome in outcomes.values()] == ["foreign"]
    assert host.configuration(VMID) == before


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("pool", "in the pool prod"),
        ("backup", "job names it"),
        ("replication", "job names it"),
        ("HA", "HA"),
    ],
)
@pytest.mark.parametrize("when", ["before it is touched", "while it is stopped"])
def test_a_look_alike_that_gets_a_pool_job_or_ha_after_the_plan_is_kept(
    outer: PveHost,
    host: StandinHost,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    change: str,
    why: str,
    when: str,
) -> None:
    """A pool, a job or HA does not change the digest of the VM's configuration."""
    create_look_alike(outer)
    qemu.start(outer.api, "father", VMID)
    rows = plan(outer, settings)
    before = host.configuration(VMID)
    stop, stops = qemu.stop, []

    def change_and_stop(*arguments: Any, **options: Any) -> Any:
        stops.append(arguments)
        CHANGES[change](host)
        return stop(*arguments, **options)

    if when == "before it is touched":
        CHANGES[change](host)
    else:
        monkeypatch.setattr(qemu, "stop", change_and_stop)
    (outcome,) = execute(outer, settings, rows).values()
    assert outcome.result == "foreign"
    assert why in outcome.reason
    assert host.configuration(VMID) == before
    assert len(stops) == (when == "while it is stopped")
    assert host.is_running(VMID) == (when == "before it is touched")


def test_left_over_volumes_of_a_look_alike_are_reported(
    outer: PveHost, host: StandinHost, settings: Settings
) -> None:
    create_look_alike(outer)
    named, other = f"local:{VMID}/vm-{VMID}-disk-0.raw", f"local:{VMID}/vm-{VMID}-disk-7.raw"
    assert named in host.volumes()
    host.fault(volume=named, text="unlink failed", times=1000)
    host.volume(other)
    (outcome,) = execute(outer, settings, plan(outer, settings)).values()
    assert outcome.result == "left"
    assert named in outcome.reason
    # It may be older than the VM, which is not known to be ours.
    assert f"{other} (no configuration names it)" in outcome.reason
    assert VMID not in host.vms()
    assert {named, other} <= set(host.volumes())


def test_a_volume_that_a_destroy_left_without_a_warning_is_removed_after_it(
    outer: PveHost, host: StandinHost, settings: Settings
) -> None:
    create_look_alike(outer)
    volid = f"local:{VMID}/vm-{VMID}-disk-0.raw"
    rows = plan(outer, settings)
    host.fault(volume=volid, do="drop")
    assert [outcome.result for outcome in execute(outer, settings, rows).values()] == ["gone"]
    assert host.faults() == []
    assert volid not in host.volumes()


def test_no_delete_queues_behind_a_task_of_a_look_alike(
    outer: PveHost, host: StandinHost, settings: Settings
) -> None:
    create_look_alike(outer)
    rows = plan(outer, settings)
    host.slow(all=60)
    upid = str(outer.api.post(f"/nodes/father/qemu/{VMID}/status/start"))
    outcomes = list(execute(outer, settings, rows).values())
    assert [outcome.result for outcome in outcomes] == ["left"]
    assert upid in outcomes[0].reason
    assert host.configuration(VMID)


# -- runs ----------------------------------------------------------------------------------------


def create_run(
    outer: PveHost,
    settings: Settings,
    root: Path,
    *,
    when: int,
    client: str | None = None,
    owner: str | None = None,
) -> tuple[Run, int]:
    """Create a run with one VM, without a trace of its session on this machine; the run and its VM's id."""
    run = Run.create(settings, root)
    run = dataclasses.replace(run, client=client or run.client, owner=owner or run.owner)
    create_pool(outer.api, run, settings, when)
    # The id is drawn from a range that no look-alike of a test is in.
    drawn = dataclasses.replace(settings, vmid_ranges=((VMID + 10, VMID + 49),))
    return run, create_marked(outer, run, drawn).vmid


def test_a_run_with_an_expired_lease_is_destroyed_and_a_live_one_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    _, expired_vm = create_run(outer, settings, tmp_path, when=int(host.now()) - 4000)
    live, live_vm = create_run(outer, settings, tmp_path, when=int(host.now()))
    rows = plan(outer, settings)
    assert {row.vmid: row.verdict for row in rows} == {expired_vm: "destroy", live_vm: "keep"}
    before = host.configuration(live_vm)
    assert [outcome.result for outcome in execute(outer, settings, rows).values()] == ["gone"]
    assert host.configuration(live_vm) == before
    assert list(host.pools()) == [pool_name(settings, live)]


def test_a_lease_expires_by_the_hosts_clock(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    _, vmid = create_run(outer, settings, tmp_path, when=int(host.now()))
    host.advance(4000)
    row = row_of(outer, settings, vmid)
    assert row is not None
    assert "expired" in row.reason


def test_a_run_whose_session_holds_its_lock_is_kept_though_expired_and_named(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    run, vmid = create_run(outer, settings, tmp_path, when=int(host.now()) - 90_000)
    lock = SessionLock(run.id)
    lock.acquire()
    row = row_of(outer, dataclasses.replace(settings, run_id=run.id), vmid)
    lock.release()
    assert row is not None
    assert row.verdict == "keep"


def test_a_free_lock_proves_the_exit_of_a_session_of_this_client_only(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    now = int(host.now())
    mine, mine_vm = create_run(outer, settings, tmp_path, when=now)
    other, other_vm = create_run(outer, settings, tmp_path, when=now, client="f" * 16, owner="bob@desk")
    for run in (mine, other):
        lock = SessionLock(run.id)
        lock.acquire()
        lock.release(remove=False)
    verdicts = {row.vmid: row.verdict for row in plan(outer, settings)}
    assert verdicts == {mine_vm: "destroy", other_vm: "keep"}
    named = row_of(outer, dataclasses.replace(settings, run_id=other.id), other_vm)
    assert named is not None
    assert named.verdict == "destroy"


def test_a_kept_run_of_this_user_is_destroyed_and_one_of_another_user_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    mine, mine_vm = create_run(outer, settings, tmp_path, when=int(host.now()))
    other, other_vm = create_run(outer, settings, tmp_path, when=int(host.now()), owner="bob@desk")
    for run in (mine, other):
        renew(outer.api, run, settings, int(host.now()), state="kept")
    assert {row.vmid: row.verdict for row in plan(outer, settings)} == {mine_vm: "destroy", other_vm: "keep"}


@pytest.mark.parametrize("comment", ["", "{}", "somebody's", '{"v":1,"expires":0}', "[" * 2000])
def test_a_run_whose_lease_is_unreadable_is_kept(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path, comment: str
) -> None:
    run, vmid = create_run(outer, settings, tmp_path, when=int(host.now()) - 90_000)
    host.set_pool(pool_name(settings, run), comment)
    row = row_of(outer, settings, vmid)
    assert row is not None
    assert row.verdict == "keep"


def test_a_foreign_vm_in_the_pool_of_an_expired_run_is_kept_with_the_pool(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path
) -> None:
    run, vmid = create_run(outer, settings, tmp_path, when=int(host.now()) - 4000)
    create_look_alike(outer, 500, name="database", pool=pool_name(settings, run))
    before = host.configuration(500)
    rows = plan(outer, settings)
    assert {row.vmid: row.verdict for row in rows} == {vmid: "destroy", 500: "keep"}
    execute(outer, settings, rows)
    assert host.configuration(500) == before
    assert host.vms() == [500]
    assert list(host.pools()) == [pool_name(settings, run)]


@pytest.mark.parametrize("logged", [True, False], ids=["in our log", "of somebody"])
def test_a_killed_create_is_listed_once_and_destroyed_only_if_a_log_has_its_task(
    outer: PveHost, host: StandinHost, settings: Settings, tmp_path: Path, logged: bool
) -> None:
    runs = [create_run(outer, settings, tmp_path, when=int(host.now()) - 4000)[0] for _ in range(2)]
    host.slow(qmcreate=60)
    upid = outer.api.post("/nodes/father/qemu", vmid=VMID, name=NAME)
    host.kill_task(upid)
    host.clear_faults()
    if logged:
        audit = AuditLog(runs[1].directory.audit, runs[1].id)
        audit.task(upid)
        audit.close()
    rows = [row for row in plan(outer, settings) if row.vmid == VMID]
    assert [row.verdict for row in rows] == ["destroy" if logged else "keep"]
    execute(outer, settings, plan(outer, settings))
    assert (VMID in host.vms()) is not logged
