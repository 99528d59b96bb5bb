"""What --nested-destroy-only would take: rules that err on keeping."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from memory_host import MemoryHost

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
def host(memory: MemoryHost) -> PveHost:
    return memory.connect()


def stranger(host: PveHost, vmid: int = VMID, **config: Any) -> None:
    given = {"vmid": vmid, "name": NAME, "scsi0": "local:4", **config}
    host.api.post("/nodes/father/qemu", **{key: value for key, value in given.items() if value is not None})


def row_of(
    host: PveHost, settings: Settings, vmid: int = VMID, extra: frozenset[int] = frozenset()
) -> Row | None:
    return next((row for row in plan(host, settings, extra=extra) if row.vmid == vmid), None)


def now(memory: MemoryHost) -> int:
    with memory.open() as model:
        return int(model.now)


# -- without a marker ----------------------------------------------------------------------------


def test_a_plain_look_alike_may_go_once_somebody_says_yes(host: PveHost, settings: Settings) -> None:
    stranger(host)
    row = row_of(host, settings)
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
def test_a_look_alike_that_means_something_to_somebody_stays(
    host: PveHost, memory: MemoryHost, settings: Settings, config: dict[str, Any], why: str
) -> None:
    stranger(host)
    with memory.open() as model:
        model.state["vms"][str(VMID)]["config"].update(config)
    row = row_of(host, settings)
    assert row is not None
    assert row.verdict == "keep"
    assert why in row.reason


@pytest.mark.parametrize(
    ("where", "entry", "why"),
    [
        ("backup", {"id": "b", "vmid": f"101,{VMID}"}, "names it"),
        ("backup", {"id": "b", "all": 1}, "includes all VMs"),
        ("replication", {"id": f"{VMID}-0", "guest": VMID}, "names it"),
        ("ha", f"vm:{VMID}", "HA"),
    ],
    ids=str,
)
def test_a_look_alike_that_others_count_on_stays(
    host: PveHost, memory: MemoryHost, settings: Settings, where: str, entry: Any, why: str
) -> None:
    stranger(host)
    with memory.open() as model:
        model.state[where].append(entry)
    row = row_of(host, settings)
    assert row is not None
    assert row.verdict == "keep"
    assert why in row.reason


def test_a_look_alike_in_a_pool_or_with_a_snapshot_stays(host: PveHost, settings: Settings) -> None:
    host.api.post("/pools", poolid="prod")
    stranger(host, 99951, pool="prod")
    stranger(host, 99952)
    host.api.post("/nodes/father/qemu/99952/snapshot", snapname="precious")
    for vmid, why in ((99951, "pool prod"), (99952, "snapshots")):
        row = row_of(host, settings, vmid)
        assert row is not None
        assert row.verdict == "keep"
        assert why in row.reason


def test_what_is_out_of_range_or_named_otherwise_is_no_candidate(host: PveHost, settings: Settings) -> None:
    stranger(host, 99899)
    stranger(host, 99951, name="database")
    stranger(host, 99952, name=None)
    assert [row.vmid for row in plan(host, settings)] == []


def test_in_the_range_any_only_marked_vms_are_candidates(host: PveHost, settings: Settings) -> None:
    stranger(host)
    assert plan(host, dataclasses.replace(settings, vmid_ranges=((100, 999_999_999),))) == []


def test_an_id_of_the_context_file_waives_pattern_and_range_and_nothing_else(
    host: PveHost, settings: Settings
) -> None:
    stranger(host, 200, name="from-earlier")
    stranger(host, 201, name="from-earlier", onboot=1)
    rows = {row.vmid: row for row in plan(host, settings, extra=frozenset({200, 201, 202}))}
    assert set(rows) == {200, 201}
    assert (rows[200].verdict, rows[200].needs_confirmation) == ("destroy", True)
    assert rows[201].verdict == "keep"


def test_a_look_alike_that_changed_since_it_was_judged_stays(
    host: PveHost, memory: MemoryHost, settings: Settings
) -> None:
    stranger(host)
    rows = plan(host, settings)
    with memory.open() as model:
        model.state["vms"][str(VMID)]["config"]["description"] = "mine, do not touch"
    before = memory.configuration(VMID)
    outcomes = execute(host, settings, rows)
    assert [each.result for each in outcomes.values()] == ["foreign"]
    assert memory.configuration(VMID) == before


def pooled(model: Any) -> None:
    model.state["pools"]["prod"] = {"comment": "", "vms": [VMID]}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (pooled, "in the pool prod"),
        (lambda model: model.state["backup"].append({"id": "b", "vmid": str(VMID)}), "job names it"),
        (lambda model: model.state["replication"].append({"id": "r", "guest": VMID}), "job names it"),
        (lambda model: model.state["ha"].append(f"vm:{VMID}"), "HA"),
    ],
    ids=["pool", "backup", "replication", "HA"],
)
@pytest.mark.parametrize("when", ["before it is touched", "while it is stopped"])
def test_a_look_alike_that_others_began_to_count_on_stays(
    host: PveHost,
    memory: MemoryHost,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Any], None],
    why: str,
    when: str,
) -> None:
    """None of this changes the digest of its configuration."""
    stranger(host)
    qemu.start(host.api, "father", VMID)
    rows = plan(host, settings)
    before = memory.configuration(VMID)
    stop, stops = qemu.stop, []

    def stopped(*given: Any, **more: Any) -> Any:
        stops.append(given)
        with memory.open() as model:
            change(model)
        return stop(*given, **more)

    if when == "before it is touched":
        with memory.open() as model:
            change(model)
    else:
        monkeypatch.setattr(qemu, "stop", stopped)
    (outcome,) = execute(host, settings, rows).values()
    assert outcome.result == "foreign"
    assert why in outcome.reason
    assert memory.configuration(VMID) == before
    assert len(stops) == (when == "while it is stopped")
    with memory.open() as model:
        assert model.state["vms"][str(VMID)]["running"] == (when == "before it is touched")


def test_volumes_that_a_look_alike_leaves_are_told(
    host: PveHost, memory: MemoryHost, settings: Settings
) -> None:
    stranger(host)
    named, other = f"local:{VMID}/vm-{VMID}-disk-0.raw", f"local:{VMID}/vm-{VMID}-disk-7.raw"
    with memory.open() as model:
        assert named in model.state["volumes"]
        model.state["sticky"].append(named)
        model.state["volumes"][other] = dict(model.state["volumes"][named])
    (outcome,) = execute(host, settings, plan(host, settings)).values()
    assert outcome.result == "left"
    assert named in outcome.reason
    # It may have been there before the VM, which is not known to be ours.
    assert f"{other} (no configuration names it)" in outcome.reason
    with memory.open() as model:
        assert str(VMID) not in model.state["vms"]
        assert {named, other} <= set(model.state["volumes"])


def test_a_volume_that_a_destroy_forgot_goes_after_it(
    host: PveHost, memory: MemoryHost, settings: Settings
) -> None:
    stranger(host)
    volid = f"local:{VMID}/vm-{VMID}-disk-0.raw"
    rows = plan(host, settings)
    with memory.open() as model:
        model.state["forgotten"] = [volid]
    assert [each.result for each in execute(host, settings, rows).values()] == ["gone"]
    with memory.open() as model:
        assert volid not in model.state["volumes"]


def test_no_delete_queues_behind_a_task_of_a_look_alike(
    host: PveHost, memory: MemoryHost, settings: Settings
) -> None:
    stranger(host)
    rows = plan(host, settings)
    with memory.open() as model:
        model.state["delays"]["*"] = 60
    upid = str(host.api.post(f"/nodes/father/qemu/{VMID}/status/start"))
    outcomes = list(execute(host, settings, rows).values())
    assert [each.result for each in outcomes] == ["left"]
    assert upid in outcomes[0].reason
    assert memory.configuration(VMID)


# -- runs ----------------------------------------------------------------------------------------


def a_run(
    host: PveHost,
    settings: Settings,
    root: Path,
    *,
    when: int,
    client: str | None = None,
    owner: str | None = None,
) -> tuple[Run, int]:
    """A run with one VM, its session gone without a trace on this machine."""
    run = Run.create(settings, root)
    run = dataclasses.replace(run, client=client or run.client, owner=owner or run.owner)
    create_pool(host.api, run, settings, when)
    # An id is drawn; not one that a test gives to somebody else's.
    drawn = dataclasses.replace(settings, vmid_ranges=((VMID + 10, VMID + 49),))
    return run, create_marked(host, run, drawn).vmid


def test_a_run_whose_lease_lapsed_goes_and_a_live_one_stays(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    _, dead = a_run(host, settings, tmp_path, when=now(memory) - 4000)
    live, alive = a_run(host, settings, tmp_path, when=now(memory))
    rows = plan(host, settings)
    assert {row.vmid: row.verdict for row in rows} == {dead: "destroy", alive: "keep"}
    before = memory.configuration(alive)
    assert [each.result for each in execute(host, settings, rows).values()] == ["gone"]
    assert memory.configuration(alive) == before
    with memory.open() as model:
        assert list(model.state["pools"]) == [pool_name(settings, live)]


def test_the_hosts_clock_decides_not_the_clients(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    _, vmid = a_run(host, settings, tmp_path, when=now(memory))
    with memory.open() as model:
        model.state["offset"] += 4000
    row = row_of(host, settings, vmid)
    assert row is not None
    assert "expired" in row.reason


def test_a_session_that_holds_its_lock_is_never_touched_not_even_lapsed_and_named(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    run, vmid = a_run(host, settings, tmp_path, when=now(memory) - 90_000)
    lock = SessionLock(run.id)
    lock.acquire()
    row = row_of(host, dataclasses.replace(settings, run_id=run.id), vmid)
    lock.release()
    assert row is not None
    assert row.verdict == "keep"


def test_a_free_lock_proves_a_session_of_this_client_dead_and_of_another_nothing(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    mine, mine_vm = a_run(host, settings, tmp_path, when=now(memory))
    other, other_vm = a_run(host, settings, tmp_path, when=now(memory), client="f" * 16, owner="bob@desk")
    for run in (mine, other):
        lock = SessionLock(run.id)
        lock.acquire()
        lock.release(remove=False)
    verdicts = {row.vmid: row.verdict for row in plan(host, settings)}
    assert verdicts == {mine_vm: "destroy", other_vm: "keep"}
    named = row_of(host, dataclasses.replace(settings, run_id=other.id), other_vm)
    assert named is not None
    assert named.verdict == "destroy"


def test_my_kept_run_goes_and_another_persons_stays(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    mine, mine_vm = a_run(host, settings, tmp_path, when=now(memory))
    other, other_vm = a_run(host, settings, tmp_path, when=now(memory), owner="bob@desk")
    for run in (mine, other):
        renew(host.api, run, settings, now(memory), state="kept")
    assert {row.vmid: row.verdict for row in plan(host, settings)} == {mine_vm: "destroy", other_vm: "keep"}


@pytest.mark.parametrize("comment", ["", "{}", "somebody's", '{"v":1,"expires":0}', "[" * 2000])
def test_a_pool_whose_lease_cannot_be_read_stays(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path, comment: str
) -> None:
    run, vmid = a_run(host, settings, tmp_path, when=now(memory) - 90_000)
    with memory.open() as model:
        model.state["pools"][pool_name(settings, run)]["comment"] = comment
    row = row_of(host, settings, vmid)
    assert row is not None
    assert row.verdict == "keep"


def test_a_foreign_vm_in_a_dead_runs_pool_stays_and_keeps_the_pool(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path
) -> None:
    run, vmid = a_run(host, settings, tmp_path, when=now(memory) - 4000)
    stranger(host, 500, name="database", pool=pool_name(settings, run))
    before = memory.configuration(500)
    rows = plan(host, settings)
    assert {row.vmid: row.verdict for row in rows} == {vmid: "destroy", 500: "keep"}
    execute(host, settings, rows)
    assert memory.configuration(500) == before
    with memory.open() as model:
        assert list(model.state["vms"]) == ["500"]
        assert list(model.state["pools"]) == [pool_name(settings, run)]


@pytest.mark.parametrize("logged", [True, False], ids=["in our log", "of somebody"])
def test_what_a_killed_create_left_is_told_once_and_goes_only_with_its_task_in_a_log(
    host: PveHost, memory: MemoryHost, settings: Settings, tmp_path: Path, logged: bool
) -> None:
    runs = [a_run(host, settings, tmp_path, when=now(memory) - 4000)[0] for _ in range(2)]
    with memory.open() as model:
        model.state["delays"]["qmcreate"] = 60
    upid = host.api.post("/nodes/father/qemu", vmid=VMID, name=NAME)
    with memory.open() as model:
        model.kill(next(task for task in model.state["tasks"] if task["upid"] == upid))
    if logged:
        audit = AuditLog(runs[1].directory.audit, runs[1].id)
        audit.task(upid)
        audit.close()
    rows = [row for row in plan(host, settings) if row.vmid == VMID]
    assert [row.verdict for row in rows] == ["destroy" if logged else "keep"]
    execute(host, settings, plan(host, settings))
    with memory.open() as model:
        assert (str(VMID) in model.state["vms"]) is not logged
