"""Whatever happens in whatever order: nothing of others is changed, and what is called gone is gone."""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory_host import MemoryHost
from memory_model import Model
from standin_environment import environments, ours

from pytest_nestedpve.ownership.marker import Marker, new_uuid, uuid_of
from pytest_nestedpve.ownership.pool import create_pool, pool_name
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.deadline import set_scale
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.identity import RUN_ID
from pytest_nestedpve.teardown.plan import execute, plan
from pytest_nestedpve.teardown.teardown import teardown

LOCKS = ("snapshot", "backup", "migrate", "rollback", "clone")
NODES = ("father", "father2")
WHICH = st.integers(0, 9)


class Everything(RuleBasedStateMachine):
    """A cluster of two nodes, a run, the people beside it, and what goes wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.ends = contextlib.ExitStack()
        patch = self.ends.enter_context(pytest.MonkeyPatch.context())
        folder = Path(self.ends.enter_context(tempfile.TemporaryDirectory()))
        patch.setenv("XDG_STATE_HOME", str(folder / "state"))
        # The same ids each time: a sequence that failed can be run again.
        patch.setattr("pytest_nestedpve.ownership.create.random.SystemRandom", lambda: random.Random(7))
        set_scale(0.02)
        self.ends.callback(set_scale, 1.0)
        self.memory = MemoryHost(folder / "host.json")
        with self.memory.open() as model:
            model.join("father2")
        self.env = self.ends.enter_context(environments(self.memory, folder))()
        self.api, self.pool = self.env.outer.api, pool_name(self.env.settings, self.env.run)
        assert RUN_ID.match(self.env.run.id)
        self.number = 99_990
        self.killed: set[int] = set()  # ids of which a killed create of ours left its lock
        self.theirs: dict[int, str] = {}
        self.uuids: set[str] = set()

    def teardown(self) -> None:
        try:
            self.the_session_ends()
            self.what_is_somebody_elses_is_as_it_was()
        finally:
            self.env.close()
            self.ends.close()

    # -- what is there ------------------------------------------------------------------------

    def mine(self, model: Model) -> list[int]:
        """The ids of our VMs, by uuids that nobody else has."""
        vms = model.state["vms"].items()
        return sorted(int(vmid) for vmid, vm in vms if uuid_of(vm["config"]) in self.uuids)

    def one(self, which: int) -> int | None:
        with self.memory.open() as model:
            found = self.mine(model)
        return found[which % len(found)] if found else None

    def remember(self) -> None:
        """Whatever is not ours is somebody's, as it is now."""
        with self.memory.open() as model:
            others = {int(vmid) for vmid in model.state["vms"]} - set(self.mine(model)) - self.killed
            self.theirs = {vmid: self.seen(model, vmid) for vmid in others}

    def seen(self, model: Model, vmid: int) -> str:
        """A VM, its place in pools and its volumes, as text."""
        sites = (model.state, *model.state["others"].values())
        volumes = sorted(volid for site in sites for volid in site["volumes"] if f"/vm-{vmid}-" in volid)
        return json.dumps([model.state["vms"].get(str(vmid)), model.pool_of(vmid), volumes], sort_keys=True)

    def next_id(self) -> int:
        """An id of the range that nobody had."""
        with self.memory.open() as model:
            used = {task["id"] for task in model.state["tasks"]} | set(model.state["vms"])
        self.number = next(vmid for vmid in range(self.number - 1, 0, -1) if str(vmid) not in used)
        return self.number

    def pooled(self) -> None:
        with self.memory.open() as model:
            there = self.pool in model.state["pools"]
        if not there:
            # Its lease lapsed long ago, so that a clean-up may take the run as well.
            with self.memory.open() as model:
                now = int(model.now)
            create_pool(self.api, self.env.run, self.env.settings, now - 90_000)

    # -- the run ------------------------------------------------------------------------------

    @initialize(several=st.integers(1, 2))
    def some_are_there(self, several: int) -> None:
        for number in range(several):
            self.create(lost=False, running=number == 1)

    @rule(lost=st.booleans(), running=st.booleans())
    def create(self, lost: bool, running: bool) -> None:
        with self.memory.open() as model:
            model.state["faults"].clear()  # they are for the end
        self.pooled()
        if lost:
            self.memory.fault("POST", "/nodes/father/qemu", do="lose")
        vmid = ours(self.env, running=running)
        with self.memory.open() as model:
            self.uuids.add(str(uuid_of(model.state["vms"][str(vmid)]["config"])))

    @rule()
    def a_create_is_killed(self) -> None:
        self.pooled()
        vmid = self.next_id()
        with self.memory.open() as model:
            model.state["faults"].clear()
            model.state["delays"]["qmcreate"] = 60
        self.api.post("/nodes/father/qemu", vmid=vmid, name="nested-pve-x", pool=self.pool)
        with self.memory.open() as model:
            model.kill(model.state["tasks"][-1])
            model.state["delays"].clear()
        self.killed.add(vmid)

    # -- people beside it ---------------------------------------------------------------------

    @rule(
        looks=st.sampled_from(["", "pool", "marker", "locked", "running", "database"]),
        node=st.sampled_from(NODES),
    )
    def somebody_makes_one(self, looks: str, node: str) -> None:
        vmid, options = self.next_id(), {"name": "nested-pve-other", "scsi0": "local:4"}
        if looks == "database":
            options["name"] = looks
        if looks in ("pool", "marker"):
            self.pooled()
            options["pool"] = self.pool
        if looks == "marker":
            options["description"] = Marker(self.env.run.id, vmid, new_uuid()).to_text()
        api = self.memory.connect().api
        api.post(f"/nodes/{node}/qemu", vmid=vmid, **options)
        if looks == "running":
            qemu.start(api, node, vmid)
        if looks == "locked":
            with self.memory.open() as model:
                model.state["vms"][str(vmid)]["config"]["lock"] = "backup"
        self.remember()

    @rule()
    def somebodys_create_is_killed(self) -> None:
        vmid = self.next_id()
        with self.memory.open() as model:
            model.begin_create("father", {"vmid": vmid})
            model.fork("qmcreate", str(vmid), {"do": "wait"})
            model.kill(model.state["tasks"][-1])
        self.remember()

    @rule(which=WHICH, fresh=st.booleans())
    def somebody_takes_the_id(self, which: int, fresh: bool) -> None:
        vmid = self.one(which)
        if vmid is None:
            return
        with self.memory.open() as model:
            vm = model.state["vms"][str(vmid)]
            node = vm["node"]
            model.drop_volumes(vm)
            model.forget(vmid)
            model.begin_create(node, {"vmid": vmid})
            model.end_create(vmid, {"name": "nested-pve-mine", "scsi0": "local:2"})
            model.state["vms"][str(vmid)]["born"] -= 0 if fresh else 60
        self.remember()

    @rule(which=WHICH)
    def somebody_clones_ours(self, which: int) -> None:
        vmid, new = self.one(which), self.next_id()
        with self.memory.open() as model:
            vm = model.state["vms"].get(str(vmid))
            if vm is not None and not vm["config"].get("lock"):
                model.clone(vm["node"], int(vmid or 0), {"newid": new, "name": "nested-pve-copy"})
        self.remember()

    @rule(which=WHICH, lock=st.sampled_from(LOCKS))
    def a_lock_stays(self, which: int, lock: str) -> None:
        self.change(which, lock=lock)

    @rule(which=WHICH)
    def ours_is_protected(self, which: int) -> None:
        self.change(which, protection=1)

    def change(self, which: int, **config: Any) -> None:
        vmid = self.one(which)
        with self.memory.open() as model:
            if vmid is not None:
                model.state["vms"][str(vmid)]["config"].update(config)

    @rule(which=WHICH)
    def one_moves(self, which: int) -> None:
        vmid = self.one(which)
        with self.memory.open() as model:
            if vmid is not None:
                there = model.state["vms"][str(vmid)]["node"]
                model.migrate(vmid, NODES[there == "father"])

    # -- what goes wrong ----------------------------------------------------------------------

    @rule(
        call=st.sampled_from([
            ("DELETE", r"/nodes/[^/]+/qemu/\d+"), ("POST", r".*/status/stop"), ("GET", r".*/config"),
            ("GET", r"/pools"), ("DELETE", "/pools"), ("GET", r".*/tasks"), ("GET", r".*/content"),
            ("PUT", r".*/config"),
        ]),
        do=st.sampled_from(["fail", "lose"]),
    )  # fmt: skip
    def an_answer_goes_wrong(self, call: tuple[str, str], do: str) -> None:
        self.memory.fault(*call, do=do, text="got timeout, perhaps")

    @rule(which=WHICH)
    def a_destroy_leaves_a_volume(self, which: int) -> None:
        vmid = self.one(which)
        with self.memory.open() as model:
            model.state["busy"].append(f"local:{vmid}/vm-{vmid}-disk-0.qcow2")

    # -- the end ------------------------------------------------------------------------------

    @rule()
    def the_session_ends(self) -> None:
        with self.memory.open() as model:
            before = set(map(str, self.mine(model)))
        try:
            report = teardown(self.env)
        except PveError:
            return  # the host could not be asked; nothing is claimed
        told = " ".join(report.left)
        with self.memory.open() as model:
            stay = before & set(map(str, self.mine(model)))
        assert {vmid for vmid in stay if f"VM {vmid} " not in told} == set(), report
        self.over(clean=not report.left)

    @precondition(lambda self: self.uuids or self.killed)
    @rule()
    def only_a_clean_up(self) -> None:
        settings, host = self.env.settings, self.memory.connect()
        try:
            rows = [row for row in plan(host, settings) if row.run is not None]
        except PveError:
            return
        outcomes = execute(host, settings, rows)
        going = all(row.verdict == "destroy" for row in rows)
        self.over(clean=bool(rows) and going and all(each.result == "gone" for each in outcomes.values()))

    def over(self, *, clean: bool) -> None:
        with self.memory.open() as model:
            model.state["faults"].clear()
            self.killed &= {int(vmid) for vmid in model.state["vms"]}
            if not clean:
                return
            assert self.mine(model) == []
            assert self.killed == set()
            sites = (model.state, *model.state["others"].values())
            volumes = {volid for site in sites for volid in site["volumes"] if "/vm-" in volid}
            theirs = {volid for volid in volumes if any(f"/vm-{vmid}-" in volid for vmid in self.theirs)}
            assert volumes == theirs
        assert self.pool not in [each["poolid"] for each in self.api.get("/pools")]

    @invariant()
    def what_is_somebody_elses_is_as_it_was(self) -> None:
        with self.memory.open() as model:
            assert {vmid: self.seen(model, vmid) for vmid in self.theirs} == self.theirs


TestEverything = Everything.TestCase
TestEverything.settings = profile(
    max_examples=20, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
