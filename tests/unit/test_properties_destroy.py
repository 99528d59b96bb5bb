"""No answer that makes no sense widens what is destroyed: at most what the truth would have had destroyed."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from memory_host import MemoryApi, MemoryHost
from odd_answers import odd

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


class World:
    """A host with VMs of a run whose lease lapsed, and of all kinds of others."""

    def __init__(self, folder: Path) -> None:
        self.memory = MemoryHost(folder / "host.json")
        self.host = self.memory.connect()
        self.settings = Settings(run_dir=folder / "runs")
        self.run = Run.create(self.settings, folder)
        self.api = self.host.api
        with self.memory.open() as model:
            now = int(model.now)
        create_pool(self.api, self.run, self.settings, now - 90_000)
        self.api.post("/pools", poolid="theirs", comment="somebody's")
        self.mine = [create_marked(self.host, self.run, self.settings).vmid for _ in range(5)]
        self.free = (vmid for vmid in range(99_900, 100_000) if vmid not in self.mine)
        qemu.start(self.api, "father", self.mine[0])
        qemu.configure(self.api, "father", self.mine[1], scsi0="local:8,format=qcow2")
        self.api.put(f"/nodes/father/qemu/{self.mine[2]}/config", protection=1)
        self.api.post(f"/nodes/father/qemu/{self.mine[3]}/template")
        with self.memory.open() as model:
            model.state["ha"].append(f"vm:{self.mine[4]}")
            model.state["backup"].append({"vmid": "99999,99998", "all": 0})
        self.foreign()
        self.bare = [self.killed(next(self.free)) for _ in range(2)]
        # An id where a create of ours was killed and cleared away, and then somebody's was killed.
        vmid = next(self.free)
        _, before = self.killed(vmid)
        with self.memory.open() as model:
            task = model.state["tasks"][-1]
            task["start"] -= 60
            parts = before.split(":")
            before = task["upid"] = ":".join([*parts[:4], f"{int(task['start']):08X}", *parts[5:]])
            del model.state["vms"][str(vmid)]
        self.bare.append(self.killed(vmid))
        audit = AuditLog(self.run.directory.audit, self.run.id)
        for upid in (self.bare[0][1], before):
            audit.write("task", upid=upid)
        audit.close()
        self.ours = task_ids(self.run.directory.audit)
        with self.memory.open() as model:
            for vm in model.state["vms"].values():
                vm["born"] -= 60
            self.state = json.dumps(model.state)
        self.cache: dict[str, Any] = {}
        self.truth: set[int] = set()

    def foreign(self) -> None:
        """VMs of others that look like ours in all but one thing each."""
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

    def killed(self, vmid: int) -> tuple[int, str]:
        """What a killed create left."""
        with self.memory.open() as model:
            model.state["delays"]["*"] = 60
        upid = str(self.api.post("/nodes/father/qemu", vmid=vmid, name=NAME))
        with self.memory.open() as model:
            model.kill(next(task for task in model.state["tasks"] if task["upid"] == upid))
            model.state["delays"].clear()
        return vmid, upid

    def restore(self) -> None:
        with self.memory.open() as model:
            model.state.clear()
            model.state.update(json.loads(self.state))


class Lying(MemoryApi):
    """A host of which some reads are answered oddly: `lies` makes the answer from the true one.

    `still`: nothing happens on it, so what was asked once is known.
    """

    def __init__(self, world: World, lies: Any, *, still: bool) -> None:
        super().__init__(world.memory)
        self.world, self.lies, self.still = world, lies, still
        self.told: list[str] = []

    def _call(self, method: str, path: str, params: dict[str, Any]) -> Any:
        if method != "GET":
            return super()._call(method, path, params)
        known = self.world.cache if self.still else {}
        key = f"{path} {sorted(params.items())}"
        if key not in known:
            known[key] = super()._call(method, path, params)
        return self.lies(path, json.loads(json.dumps(known[key])), self.told)


PLACES = ("/tasks", "/status", "/config", "/status/current", "/snapshot", "/pools", "/cluster/", "/storage")


def liar(seed: int) -> Any:
    """Answers some calls with something odd: a few of them, or most of one kind."""
    chance = random.Random(seed)
    few = {chance.randint(1, 90) for _ in range(chance.randint(0, 4))}
    kind = chance.choice(("nowhere", *PLACES))

    def lie(path: str, truth: Any, told: list[str]) -> Any:
        told.append(path)
        if len(told) not in few and (kind not in path or chance.randrange(3) == 0):
            return truth
        # What may be missing in truth is not missed: keys of a configuration, elements of a list of tasks.
        without = path in ("/cluster/resources", "/pools") or path.endswith("/status/current")
        return odd(chance, truth, without=without, empty=not isinstance(truth, list))

    return lie


def truthful(_path: str, truth: Any, _told: list[str]) -> Any:
    return truth


def lying(world: World, lies: Any, *, still: bool = True) -> PveHost:
    return PveHost("father", world.host.ssh, Lying(world, lies, still=still), "father")


def chosen(world: World, host: PveHost) -> set[int]:
    """What would be destroyed: rows of the plan, and what a teardown of the run would take."""
    found: set[int] = set()
    with contextlib.suppress(PveError):
        found |= {row.vmid for row in plan(host, world.settings) if row.verdict == "destroy" and row.vmid}
    try:
        candidates = discover(host, world.settings, world.run.id)
    except PveError:
        return found
    for each in candidates:
        try:
            if prove(host.api, world.settings, each, world.run).ok:
                found.add(each.vmid)
                continue
            left = killed_tasks.find_leftover(host, each.node, each.vmid, world.ours)
            if left is not None and left.ours and not left.running:
                found.add(each.vmid)
        except PveError:
            continue
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("world")
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        made = World(folder)
        made.truth = chosen(made, lying(made, truthful))
        yield made


def test_the_truth_has_ours_destroyed_and_one_that_nobody_claims(world: World) -> None:
    found = world.truth
    assert set(world.mine[:2]) | {world.bare[0][0]} <= found
    assert not set(world.mine[2:]) & found
    assert not {world.bare[1][0], world.bare[2][0]} & found
    assert len(found - set(world.mine) - {world.bare[0][0]}) == 1


@given(seed=st.integers(0, 2**32))
@profile(max_examples=300, suppress_health_check=list(HealthCheck))
def test_odd_answers_never_choose_a_vm_that_the_truth_would_not(world: World, seed: int) -> None:
    assert chosen(world, lying(world, liar(seed))) <= world.truth


@given(seed=st.integers(0, 2**32))
@profile(max_examples=8, suppress_health_check=list(HealthCheck))
def test_odd_answers_in_the_middle_of_it_never_have_another_vm_or_volume_destroyed(
    world: World, seed: int
) -> None:
    world.restore()
    with world.memory.open() as model:
        before, volumes = set(map(int, model.state["vms"])), set(model.state["volumes"])
    lies = lying(world, liar(seed), still=False)
    try:
        candidates = discover(lies, world.settings, world.run.id)
    except PveError:
        candidates = discover(world.host, world.settings, world.run.id)
    prover = RunProver(lies.api, world.settings, world.run.id, world.ours)
    destroy(lies, prover, candidates, force_stop=True, width=1, budget=0.1)
    with world.memory.open() as model:
        gone = before - set(map(int, model.state["vms"]))
        lost = volumes - set(model.state["volumes"])
        freed = {volid.partition(":")[2].partition("/")[0] for volid in lost}
    world.restore()
    assert gone <= world.truth
    assert freed <= set(map(str, world.truth))


# -- found by reading and by the above, each with what was wrong ---------------------------------------

ODDLY = ("protection", "template", "lock", "onboot", "description", "tags")


@pytest.mark.parametrize("key", ODDLY)
@pytest.mark.parametrize("value", [None, [], {}, [None]], ids=str)
def test_what_keeps_a_vm_and_says_nothing_keeps_it_all_the_same(world: World, key: str, value: Any) -> None:
    plain = world.truth - set(world.mine) - {world.bare[0][0]}

    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        return truth | {key: value} if path.endswith("/config") else truth

    assert plain
    assert not plain & chosen(world, lying(world, lie))


@pytest.mark.parametrize("ha", [None, {}, {"managed": None}, {"managed": []}, [], 0], ids=str)
def test_whether_ha_manages_a_vm_has_to_be_said(world: World, ha: Any) -> None:
    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        return truth | {"ha": ha} if path.endswith("/status/current") else truth

    assert chosen(world, lying(world, lie)) <= {world.bare[0][0]}


def one_field(place: str, **odd_fields: Any) -> Any:
    """Lies about fields of every entry of a list."""

    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        return [entry | odd_fields for entry in truth] if path.endswith(place) else truth

    return lie


@pytest.mark.parametrize(
    "lie",
    [
        one_field("/cluster/backup", vmid=["99900"]),
        one_field("/cluster/backup", vmid="\u00b2"),
        one_field("/cluster/backup", vmid="all"),
        one_field("/cluster/backup", vmid=None, pool=None),
        one_field("/cluster/backup", all=None),
        one_field("/cluster/backup", all=[]),
        lambda path, truth, _told: [*truth, 7] if path == "/cluster/backup" else truth,
        lambda path, truth, _told: [*truth, {"guest": None}] if path == "/cluster/replication" else truth,
        lambda path, truth, _told: None if path == "/cluster/replication" else truth,
        lambda path, truth, _told: [*truth, 7] if path.endswith("/snapshot") else truth,
        one_field("/cluster/resources", pool=["theirs"]),
        one_field("/cluster/resources", pool=None),
    ],
)
def test_a_job_a_snapshot_or_a_pool_that_cannot_be_read_may_be_anybodys(world: World, lie: Any) -> None:
    try:
        rows = plan(lying(world, lie), world.settings)
    except PveError:
        return
    assert [row for row in rows if row.verdict == "destroy" and row.run is None] == []


def test_a_vm_in_somebodys_pool_stays_though_the_broadcast_shows_no_pool(world: World) -> None:
    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        if path != "/cluster/resources":
            return truth
        return [{key: value for key, value in entry.items() if key != "pool"} for entry in truth]

    assert chosen(world, lying(world, lie)) == world.truth


@pytest.mark.parametrize("exitstatus", [None, "", 7, []], ids=str)
def test_a_bare_lock_whose_task_ended_without_a_word_is_nobodys(world: World, exitstatus: Any) -> None:
    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        return truth | {"exitstatus": exitstatus} if "/tasks/" in path else truth

    assert world.bare[0][0] not in chosen(world, lying(world, lie))


@pytest.mark.parametrize("field", [{"upid": None}, {"upid": "UPID:x"}, {"starttime": None}, None], ids=str)
def test_a_bare_lock_with_a_task_that_cannot_be_read_is_nobodys(
    world: World, field: dict[str, Any] | None
) -> None:
    # Passed over, the newest would leave an older one of ours to say whose the lock is.
    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        if not path.endswith("/tasks") or not truth:
            return truth
        newest = max(truth, key=lambda task: int(task["starttime"]))
        return [field and newest | field if task == newest else task for task in truth]

    assert world.bare[2][0] not in chosen(world, lying(world, lie))


def test_a_volume_that_is_listed_for_our_id_and_named_for_another_stays(world: World) -> None:
    ours = world.mine[1]

    def lie(path: str, truth: Any, _told: list[str]) -> Any:
        return [entry | {"vmid": ours} for entry in truth] if path.endswith("/content") else truth

    with world.memory.open() as model:
        model.state["volumes"]["local:500/vm-500-disk-0.raw"] = {
            "content": "images", "format": "raw", "size": 1, "vmid": 500,
        }  # fmt: skip
        config = dict(model.state["vms"][str(ours)]["config"])
    api = lying(world, lie, still=False).api
    volumes = Volumes(api)
    volumes.note("father", ours, config)
    with world.memory.open() as model:
        del model.state["vms"][str(ours)]
    left = dict(volumes.sweep({ours: "father"}))
    assert "local:500/vm-500-disk-0.raw (listed for this id, and not named for it)" in left[ours]
    with world.memory.open() as model:
        assert "local:500/vm-500-disk-0.raw" in model.state["volumes"]
        assert not [volid for volid in model.state["volumes"] if f"/vm-{ours}-" in volid]
    world.restore()
