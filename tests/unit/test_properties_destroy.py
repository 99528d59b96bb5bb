"""Nonsensical answers of a host never lead to a destroy that the true answers would not lead to."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from odd_answers import odd
from standin_connections import StandinApi
from standin_host import StandinHost

from pytest_nestedpve.config.settings import Settings
from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.create import create_marked
from pytest_nestedpve.ownership.discover import discover
from pytest_nestedpve.ownership.marker import Marker, new_uuid
from pytest_nestedpve.ownership.pool import create_pool, pool_name
from pytest_nestedpve.ownership.proof import RunProver, prove
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.run.audit_log import AuditLog, task_ids
from pytest_nestedpve.run.identity import Run
from pytest_nestedpve.teardown.destroy import destroy
from pytest_nestedpve.teardown.plan import plan
from pytest_nestedpve.teardown.volumes import Volumes

NAME = "nested-pve-old"
Change = Callable[[str, Any], Any]
"""A path and the true answer to a read of it; the answer that the package gets."""


class World:
    """A host with VMs of a run whose lease expired, and with VMs of others of all kinds."""

    def __init__(self, folder: Path) -> None:
        self.standin = StandinHost(folder / "host")
        self.host = self.standin.connect()
        self.settings = Settings(run_dir=folder / "runs")
        self.run = Run.create(self.settings, folder)
        self.api = self.host.api
        create_pool(self.api, self.run, self.settings, int(self.standin.now()) - 90_000)
        self.api.post("/pools", poolid="theirs", comment="somebody's")
        self.mine = [create_marked(self.host, self.run, self.settings).vmid for _ in range(5)]
        self.free = (vmid for vmid in range(99_900, 100_000) if vmid not in self.mine)
        qemu.start(self.api, "father", self.mine[0])
        qemu.configure(self.api, "father", self.mine[1], scsi0="local:8,format=qcow2")
        self.api.put(f"/nodes/father/qemu/{self.mine[2]}/config", protection=1)
        self.api.post(f"/nodes/father/qemu/{self.mine[3]}/template")
        self.standin.manage_by_ha(self.mine[4])
        self.standin.backup_job("nightly", vmid="99999,99998", all=0)
        self.create_foreign()
        self.bare = [self.kill_create(next(self.free)) for _ in range(2)]
        # An id of which a killed create of ours was removed, and then somebody's create was killed.
        vmid = next(self.free)
        _, upid = self.kill_create(vmid)
        before = self.standin.shift_task(upid, -60)
        self.standin.forget_vm(vmid)
        self.bare.append(self.kill_create(vmid))
        audit = AuditLog(self.run.directory.audit, self.run.id)
        for upid in (self.bare[0][1], before):
            audit.write("task", upid=upid)
        audit.close()
        self.ours = task_ids(self.run.directory.audit)
        self.standin.broadcast()
        self.copy = folder / "copy"
        self.standin.save(self.copy)
        self.cache: dict[str, Any] = {}
        self.truth: set[int] = set()

    def create_foreign(self) -> None:
        """VMs of others that look like ours but for one property each."""
        uuid, pool = new_uuid(), pool_name(self.settings, self.run)
        for options in (
            {}, {"onboot": 1}, {"tags": "production"}, {"description": "the router"}, {"pool": "theirs"},
            {"protection": 1}, {"pool": pool}, {"name": "database"}, {"template": 1}, {"lock": "backup"},
        ):  # fmt: skip
            vmid = next(self.free)
            self.api.post("/nodes/father/qemu", **{"vmid": vmid, "name": NAME, **options})
        vmid = next(self.free)
        text = Marker(self.run.id, vmid, uuid).to_text()
        self.api.post("/nodes/father/qemu", vmid=vmid, name=NAME, pool=pool, description=text)
        vmid = next(self.free)
        self.api.post("/nodes/father/qemu", vmid=vmid, name=NAME)
        self.api.post(f"/nodes/father/qemu/{vmid}/snapshot", snapname="before")

    def kill_create(self, vmid: int) -> tuple[int, str]:
        """A VM whose create was killed, and the UPID of that task."""
        self.standin.slow(all=60)
        upid = str(self.api.post("/nodes/father/qemu", vmid=vmid, name=NAME))
        self.standin.kill_task(upid)
        self.standin.clear_faults()
        return vmid, upid

    def restore(self) -> None:
        self.standin.restore(self.copy)


class ChangedApi(StandinApi):
    """The API of a world's host with changed answers to reads.

    `still`: nothing happens on the host, so each call reaches it only once.
    """

    def __init__(self, world: World, change: Change, *, still: bool) -> None:
        super().__init__(world.standin)
        self.world, self.change, self.still = world, change, still

    def _call(self, verb: str, path: str, params: dict[str, Any]) -> Any:
        if verb != "get":
            return super()._call(verb, path, params)
        known = self.world.cache if self.still else {}
        key = f"{path} {sorted(params.items())}"
        if key not in known:
            known[key] = super()._call(verb, path, params)
        return self.change(path, json.loads(json.dumps(known[key])))


PLACES = ("/tasks", "/status", "/config", "/status/current", "/snapshot", "/pools", "/cluster/", "/storage")


def odd_answers(seed: int) -> Change:
    """Make some answers odd: a few of them, or most of one kind."""
    chance = random.Random(seed)
    few = {chance.randint(1, 90) for _ in range(chance.randint(0, 4))}
    kind = chance.choice(("nowhere", *PLACES))
    calls = itertools.count(1)

    def change(path: str, truth: Any) -> Any:
        if next(calls) not in few and (kind not in path or chance.randrange(3) == 0):
            return truth
        # Keys of a configuration and elements of a list of tasks may be absent in a true answer too.
        without = path in ("/cluster/resources", "/pools") or path.endswith("/status/current")
        return odd(chance, truth, without=without, empty=not isinstance(truth, list))

    return change


def changed_host(world: World, change: Change, *, still: bool = True) -> PveHost:
    return PveHost("father", world.host.ssh, ChangedApi(world, change, still=still), "father")


def destroyable(world: World, host: PveHost) -> set[int]:
    """The VMs that would be destroyed: by the plan, and by a teardown of the run."""
    vmids: set[int] = set()
    with contextlib.suppress(PveError):
        vmids |= {row.vmid for row in plan(host, world.settings) if row.verdict == "destroy" and row.vmid}
    try:
        candidates = discover(host, world.settings, world.run.id)
    except PveError:
        return vmids
    for vm in candidates:
        try:
            if prove(host.api, world.settings, vm, world.run).ok:
                vmids.add(vm.vmid)
                continue
            leftover = killed_tasks.find_leftover(host, vm.node, vm.vmid, world.ours)
            if leftover is not None and leftover.ours and not leftover.running:
                vmids.add(vm.vmid)
        except PveError:
            continue
    return vmids


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("world")
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        world = World(folder)
        world.truth = destroyable(world, changed_host(world, lambda _path, truth: truth))
        yield world
        world.standin.close()


def test_true_answers_destroy_ours_and_one_unmarked_vm_that_nobody_uses(world: World) -> None:
    vmids = world.truth
    assert set(world.mine[:2]) | {world.bare[0][0]} <= vmids
    assert not set(world.mine[2:]) & vmids
    assert not {world.bare[1][0], world.bare[2][0]} & vmids
    assert len(vmids - set(world.mine) - {world.bare[0][0]}) == 1


@given(seed=st.integers(0, 2**32))
@profile(max_examples=300, suppress_health_check=list(HealthCheck))
def test_odd_answers_never_select_a_vm_that_true_answers_would_not(world: World, seed: int) -> None:
    assert destroyable(world, changed_host(world, odd_answers(seed))) <= world.truth


@given(seed=st.integers(0, 2**32))
@profile(max_examples=8, suppress_health_check=list(HealthCheck))
def test_odd_answers_during_a_teardown_never_destroy_another_vm_or_volume(world: World, seed: int) -> None:
    world.restore()
    vms, volumes = set(world.standin.vms()), set(world.standin.volumes())
    host = changed_host(world, odd_answers(seed), still=False)
    try:
        candidates = discover(host, world.settings, world.run.id)
    except PveError:
        candidates = discover(world.host, world.settings, world.run.id)
    prover = RunProver(host.api, world.settings, world.run.id, world.ours)
    destroy(host, prover, candidates, force_stop=True, width=1, budget=0.1)
    gone = vms - set(world.standin.vms())
    lost = volumes - set(world.standin.volumes())
    freed = {volid.partition(":")[2].partition("/")[0] for volid in lost}
    world.restore()
    assert gone <= world.truth
    assert freed <= set(map(str, world.truth))


# -- single faults that the properties above or a review have shown ---------------------------------------

KEEPING = ("protection", "template", "lock", "onboot", "description", "tags")


@pytest.mark.parametrize("key", KEEPING)
@pytest.mark.parametrize("value", [None, [], {}, [None]], ids=str)
def test_an_option_that_keeps_a_vm_keeps_it_whatever_its_value(world: World, key: str, value: Any) -> None:
    plain = world.truth - set(world.mine) - {world.bare[0][0]}

    def change(path: str, truth: Any) -> Any:
        return truth | {key: value} if path.endswith("/config") else truth

    assert plain
    assert not plain & destroyable(world, changed_host(world, change))


@pytest.mark.parametrize("ha", [None, {}, {"managed": None}, {"managed": []}, [], 0], ids=str)
def test_a_vm_of_which_ha_is_not_known_is_not_selected(world: World, ha: Any) -> None:
    def change(path: str, truth: Any) -> Any:
        return truth | {"ha": ha} if path.endswith("/status/current") else truth

    assert destroyable(world, changed_host(world, change)) <= {world.bare[0][0]}


def change_fields(place: str, **odd_fields: Any) -> Change:
    """Change fields of every entry of a list."""

    def change(path: str, truth: Any) -> Any:
        return [entry | odd_fields for entry in truth] if path.endswith(place) else truth

    return change


@pytest.mark.parametrize(
    "change",
    [
        change_fields("/cluster/backup", vmid=["99900"]),
        change_fields("/cluster/backup", vmid="\u00b2"),
        change_fields("/cluster/backup", vmid="all"),
        change_fields("/cluster/backup", vmid=None, pool=None),
        change_fields("/cluster/backup", all=None),
        change_fields("/cluster/backup", all=[]),
        lambda path, truth: [*truth, 7] if path == "/cluster/backup" else truth,
        lambda path, truth: [*truth, {"guest": None}] if path == "/cluster/replication" else truth,
        lambda path, truth: None if path == "/cluster/replication" else truth,
        lambda path, truth: [*truth, 7] if path.endswith("/snapshot") else truth,
        change_fields("/cluster/resources", pool=["theirs"]),
        change_fields("/cluster/resources", pool=None),
    ],
)
def test_an_unreadable_job_snapshot_or_pool_keeps_every_unmarked_vm(world: World, change: Change) -> None:
    try:
        rows = plan(changed_host(world, change), world.settings)
    except PveError:
        return
    assert [row for row in rows if row.verdict == "destroy" and row.run is None] == []


def test_a_vm_in_somebodys_pool_is_kept_when_the_broadcast_shows_no_pool(world: World) -> None:
    def change(path: str, truth: Any) -> Any:
        if path != "/cluster/resources":
            return truth
        return [{key: value for key, value in entry.items() if key != "pool"} for entry in truth]

    assert destroyable(world, changed_host(world, change)) == world.truth


@pytest.mark.parametrize("exitstatus", [None, "", 7, []], ids=str)
def test_a_bare_lock_whose_task_has_no_exit_status_is_not_ours(world: World, exitstatus: Any) -> None:
    def change(path: str, truth: Any) -> Any:
        return truth | {"exitstatus": exitstatus} if "/tasks/" in path else truth

    assert world.bare[0][0] not in destroyable(world, changed_host(world, change))


@pytest.mark.parametrize("field", [{"upid": None}, {"upid": "UPID:x"}, {"starttime": None}, None], ids=str)
def test_a_bare_lock_with_an_unreadable_task_is_not_ours(world: World, field: dict[str, Any] | None) -> None:
    # Without the newest task, an older one of ours would make the lock ours.
    def change(path: str, truth: Any) -> Any:
        if not path.endswith("/tasks") or not truth:
            return truth
        newest = max(truth, key=lambda task: int(task["starttime"]))
        return [field and newest | field if task == newest else task for task in truth]

    assert world.bare[2][0] not in destroyable(world, changed_host(world, change))


def test_a_volume_that_is_listed_for_our_id_and_named_for_another_is_kept(world: World) -> None:
    ours, foreign = world.mine[1], "local:500/vm-500-disk-0.raw"

    def change(path: str, truth: Any) -> Any:
        return [entry | {"vmid": ours} for entry in truth] if path.endswith("/content") else truth

    world.standin.volume(foreign)
    volumes = Volumes(changed_host(world, change, still=False).api)
    volumes.note("father", ours, world.standin.config(ours))
    world.standin.forget_vm(ours)
    left = dict(volumes.sweep({ours: "father"}))
    assert f"{foreign} (listed for this id, and not named for it)" in left[ours]
    assert foreign in world.standin.volumes()
    assert not [volid for volid in world.standin.volumes() if f"/vm-{ours}-" in volid]
    world.restore()
