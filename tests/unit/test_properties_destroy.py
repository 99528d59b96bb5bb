"""No answer that makes no sense widens what is destroyed: at most what the truth would have had destroyed."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as profile
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from memory_host import MemoryApi, MemoryHost
from odd_answers import odd

from pytest_nestedpve import zombies
from pytest_nestedpve.audit import AuditLog, task_ids
from pytest_nestedpve.cleanup import plan
from pytest_nestedpve.creation import create_marked
from pytest_nestedpve.destroy import destroy
from pytest_nestedpve.discovery import discover
from pytest_nestedpve.ownership import Marker, create_pool, new_uuid, pool_name, prove
from pytest_nestedpve.pve import guests
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.host import PveHost
from pytest_nestedpve.run import Run
from pytest_nestedpve.settings import Settings

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
        guests.start(self.api, "father", self.mine[0])
        guests.configure(self.api, "father", self.mine[1], scsi0="local:8,format=qcow2")
        self.api.put(f"/nodes/father/qemu/{self.mine[2]}/config", protection=1)
        self.api.post(f"/nodes/father/qemu/{self.mine[3]}/template")
        with self.memory.open() as model:
            model.state["ha"].append(f"vm:{self.mine[4]}")
            model.state["backup"].append({"vmid": "99999,99998", "all": 0})
        self.foreign()
        self.bare = [self.killed() for _ in range(2)]
        audit = AuditLog(self.run.directory.audit, self.run.id)
        audit.write("task", upid=self.bare[0][1])
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

    def killed(self) -> tuple[int, str]:
        """What a killed create left."""
        vmid = next(self.free)
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
    """A host of which some reads are answered oddly: `lies` draws the answer from the true one."""

    def __init__(self, world: World, lies: Any, *, still: bool) -> None:
        super().__init__(world.memory)
        self.world, self.lies, self.still = world, lies, still
        self.told: list[str] = []

    def _call(self, method: str, path: str, params: dict[str, Any]) -> Any:
        if method != "GET":
            return super()._call(method, path, params)
        key = f"{path} {sorted(params.items())}"
        if not self.still or key not in self.world.cache:
            self.world.cache[key] = super()._call(method, path, params)
        truth = json.loads(json.dumps(self.world.cache[key]))
        return self.lies(path, truth, self.told)


PLACES = ("/tasks", "/status", "/config", "/status/current", "/snapshot", "/pools", "/cluster/", "/storage")


def liar(data: st.DataObject) -> Any:
    """Answers some calls with something odd: a few of them, or most of one kind."""
    few = data.draw(st.sets(st.integers(0, 90), max_size=4), label="calls")
    kind = data.draw(st.sampled_from(("nowhere", *PLACES)), label="kind")

    def lie(path: str, truth: Any, told: list[str]) -> Any:
        told.append(path)
        if len(told) not in few and (kind not in path or data.draw(st.integers(0, 2)) == 0):
            return truth
        # What may be missing in truth is not missed: keys of a configuration, elements of a list of tasks.
        without = path in ("/cluster/resources", "/pools") or path.endswith("/status/current")
        return data.draw(odd(truth, without=without, empty=not isinstance(truth, list)), label=path)

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
            left = zombies.remains(host, each.node, each.vmid, world.ours)
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
    assert world.bare[1][0] not in found
    assert len(found - set(world.mine) - {world.bare[0][0]}) == 1


@given(data=st.data())
@profile(max_examples=80, suppress_health_check=list(HealthCheck))
def test_odd_answers_never_choose_a_vm_that_the_truth_would_not(world: World, data: st.DataObject) -> None:
    assert chosen(world, lying(world, liar(data))) <= world.truth


@given(data=st.data())
@profile(max_examples=12, suppress_health_check=list(HealthCheck))
def test_odd_answers_in_the_middle_of_it_never_have_another_vm_or_volume_destroyed(
    world: World, data: st.DataObject
) -> None:
    world.restore()
    with world.memory.open() as model:
        before, volumes = set(map(int, model.state["vms"])), set(model.state["volumes"])
    lies = lying(world, liar(data), still=False)
    try:
        candidates = discover(lies, world.settings, world.run.id)
    except PveError:
        candidates = discover(world.host, world.settings, world.run.id)
    destroy(lies, world.settings, world.run.id, candidates, ours=world.ours, width=1, budget=0.1)
    with world.memory.open() as model:
        gone = before - set(map(int, model.state["vms"]))
        lost = volumes - set(model.state["volumes"])
        freed = {volid.partition(":")[2].partition("/")[0] for volid in lost}
    world.restore()
    assert gone <= world.truth
    assert freed <= set(map(str, world.truth))
