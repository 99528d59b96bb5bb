"""Any events in any order: nothing of others is changed, and a VM that is reported gone is gone."""

from __future__ import annotations

import contextlib
import json
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from standin_environment import environments, ours
from standin_host import StandinHost

from pytest_nestedpve.ownership.marker import Marker, new_uuid, uuid_of
from pytest_nestedpve.ownership.pool import create_pool, pool_name
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.api import Api
from pytest_nestedpve.pve.deadline import set_scale
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run.identity import RUN_ID
from pytest_nestedpve.teardown.plan import execute, plan
from pytest_nestedpve.teardown.teardown import teardown

LOCKS = ("snapshot", "backup", "migrate", "rollback", "clone")
NODES = ("father", "father2")
WHICH = st.integers(0, 9)


class Everything(RuleBasedStateMachine):
    """A cluster of two nodes, a run, other users of the cluster, and failures."""

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
        self.host = StandinHost(folder / "host")
        self.ends.callback(self.host.close)
        self.host.join("father2")
        self.env = self.ends.enter_context(environments(self.host, folder))()
        self.api, self.pool = self.env.outer.api, pool_name(self.env.settings, self.env.run)
        assert RUN_ID.match(self.env.run.id)
        self.number = 99_990
        self.killed: set[int] = set()  # ids of which a killed create of ours left its lock
        self.busy: list[str] = []  # volumes that a destroy of their VM cannot remove
        self.theirs: dict[int, str] = {}
        self.uuids: set[str] = set()

    def teardown(self) -> None:
        try:
            self.the_session_ends()
            self.everything_of_others_is_unchanged()
        finally:
            self.env.close()
            self.ends.close()

    # -- queries ------------------------------------------------------------------------------

    def mine(self) -> list[int]:
        """The ids of our VMs, by uuids that no other VM has."""
        return [vmid for vmid in self.host.vms() if uuid_of(self.host.config(vmid)) in self.uuids]

    def select(self, which: int) -> int | None:
        vmids = self.mine()
        return vmids[which % len(vmids)] if vmids else None

    def remember(self) -> None:
        """Note the present state of every VM that is not ours."""
        others = set(self.host.vms()) - set(self.mine()) - self.killed
        self.theirs = self.describe(others)

    def describe(self, vmids: Iterable[int]) -> dict[int, str]:
        """VMs as text: configuration, node, power, pool and volumes."""
        volumes, existing = self.volumes(), set(self.host.vms())
        texts = {}
        for vmid in vmids:
            properties: list[Any] = [place for owner, *place in volumes if owner == vmid]
            if vmid in existing:
                guest = self.host.guest(vmid)
                properties += [guest.text(), guest.node, self.host.is_running(vmid)]
            texts[vmid] = json.dumps([*properties, self.host.pool_of(vmid)])
        return texts

    def volumes(self) -> list[tuple[int, str, str]]:
        """The volumes of VMs: id of the VM, node, volume."""
        volids = [(node, volid) for node in NODES for volid in self.host.volumes(node)]
        owners = [re.search(r"/(?:vm|base)-(\d+)-", volid) for _, volid in volids]
        return [(int(owner[1]), *place) for owner, place in zip(owners, volids, strict=True) if owner]

    def next_id(self) -> int:
        """An id of the range that no VM has had."""
        used = {task.id for task in self.host.tasks()} | set(map(str, self.host.vms()))
        self.number = next(vmid for vmid in range(self.number - 1, 0, -1) if str(vmid) not in used)
        return self.number

    def ensure_pool(self) -> None:
        if self.pool not in self.host.pools():
            # Its lease expired long ago, so that a clean-up may destroy the run as well.
            create_pool(self.api, self.env.run, self.env.settings, int(self.host.now()) - 90_000)

    def clear_faults(self) -> None:
        """Clear the faults of calls; busy volumes remain busy."""
        self.host.clear_faults()
        for volid in self.busy:
            self.make_busy(volid)

    def make_busy(self, volid: str) -> None:
        self.host.fault(volume=volid, task="qmdestroy", text="unlink failed", times=1000)

    def kill_create(self, api: Api, vmid: int, **options: Any) -> None:
        self.host.fault(task="qmcreate", vmid=vmid, do="delay", seconds=60)
        self.host.kill_task(api.post("/nodes/father/qemu", vmid=vmid, **options))

    # -- the run ------------------------------------------------------------------------------

    @initialize(several=st.integers(1, 2))
    def the_run_begins(self, several: int) -> None:
        for number in range(several):
            self.create(lost=False, running=number == 1)

    @rule(lost=st.booleans(), running=st.booleans())
    def create(self, lost: bool, running: bool) -> None:
        self.clear_faults()  # they are for the teardown
        self.ensure_pool()
        if lost:
            self.host.fault("POST", "/nodes/father/qemu", do="drop")
        vmid = ours(self.env, running=running)
        self.uuids.add(str(uuid_of(self.host.config(vmid))))

    @rule()
    def a_create_is_killed(self) -> None:
        self.ensure_pool()
        vmid = self.next_id()
        self.clear_faults()
        # By the environment's connection, which logs the task as one of the run.
        self.kill_create(self.api, vmid, name="nested-pve-x", pool=self.pool)
        self.killed.add(vmid)

    # -- other users --------------------------------------------------------------------------

    @rule(
        looks=st.sampled_from(["", "pool", "marker", "locked", "running", "database"]),
        node=st.sampled_from(NODES),
    )
    def somebody_creates_a_vm(self, looks: str, node: str) -> None:
        vmid, options = self.next_id(), {"name": "nested-pve-other", "scsi0": "local:4"}
        if looks == "database":
            options["name"] = looks
        if looks in ("pool", "marker"):
            self.ensure_pool()
            options["pool"] = self.pool
        if looks == "marker":
            options["description"] = Marker(self.env.run.id, vmid, new_uuid()).to_text()
        api = self.host.connect().api
        api.post(f"/nodes/{node}/qemu", vmid=vmid, **options)
        if looks == "running":
            qemu.start(api, node, vmid)
        if looks == "locked":
            self.host.edit_vm(vmid, lock="backup")
        self.remember()

    @rule()
    def somebodys_create_is_killed(self) -> None:
        self.kill_create(self.host.connect().api, self.next_id())
        self.remember()

    @rule(which=WHICH, fresh=st.booleans())
    def somebody_reuses_an_id(self, which: int, fresh: bool) -> None:
        vmid = self.select(which)
        if vmid is None:
            return
        node = self.host.guest(vmid).node
        self.host.forget_vm(vmid)
        for volid in self.host.volumes(node):
            if f"/vm-{vmid}-" in volid and volid not in self.busy:
                self.host.remove_volume(volid, node)
        self.host.create_vm(vmid, node, name="nested-pve-mine", scsi0="local:2")
        if not fresh:
            self.host.broadcast()
        self.remember()

    @rule(which=WHICH)
    def somebody_clones_ours(self, which: int) -> None:
        vmid, new = self.select(which), self.next_id()
        if vmid is not None and "lock" not in self.host.config(vmid):
            path = f"/nodes/{self.host.guest(vmid).node}/qemu/{vmid}/clone"
            self.host.connect().api.post(path, newid=new, name="nested-pve-copy")
            assert new in self.host.vms()
            self.remember()

    @rule(which=WHICH, lock=st.sampled_from(LOCKS))
    def a_lock_is_left_over(self, which: int, lock: str) -> None:
        self.edit(which, lock=lock)

    @rule(which=WHICH)
    def ours_is_protected(self, which: int) -> None:
        self.edit(which, protection=1)

    def edit(self, which: int, **options: Any) -> None:
        vmid = self.select(which)
        if vmid is not None:
            self.host.edit_vm(vmid, **options)

    @rule(which=WHICH)
    def ours_is_migrated(self, which: int) -> None:
        vmid = self.select(which)
        if vmid is not None:
            self.host.migrate(vmid, NODES[self.host.guest(vmid).node == "father"])

    # -- failures -----------------------------------------------------------------------------

    @rule(
        call=st.sampled_from([
            ("DELETE", "/nodes/*/qemu/*"), ("POST", "**/status/stop"), ("GET", "**/config"),
            ("GET", "/pools"), ("DELETE", "/pools"), ("GET", "**/tasks"), ("GET", "**/content"),
            ("PUT", "**/config"),
        ]),
        do=st.sampled_from(["fail", "drop"]),
    )  # fmt: skip
    def a_call_fails(self, call: tuple[str, str], do: str) -> None:
        self.host.fault(*call, do=do, text="got timeout, perhaps")

    @rule(which=WHICH)
    def a_volume_is_busy(self, which: int) -> None:
        vmid = self.select(which)
        if vmid is not None:
            self.busy.append(f"local:{vmid}/vm-{vmid}-disk-0.qcow2")
            self.make_busy(self.busy[-1])

    # -- the end ------------------------------------------------------------------------------

    @rule()
    def the_session_ends(self) -> None:
        before = set(self.mine())
        try:
            report = teardown(self.env)
        except PveError:
            return  # the host did not answer; nothing is reported gone
        text = " ".join(report.left)
        remaining = before & set(self.mine())
        assert {vmid for vmid in remaining if f"VM {vmid} " not in text} == set(), report
        self.check_end(clean=not report.left)

    @precondition(lambda self: self.uuids or self.killed)
    @rule()
    def only_a_clean_up(self) -> None:
        settings, host = self.env.settings, self.host.connect()
        try:
            rows = [row for row in plan(host, settings) if row.run is not None]
        except PveError:
            return
        outcomes = execute(host, settings, rows)
        complete = all(row.verdict == "destroy" for row in rows)
        complete = complete and all(outcome.result == "gone" for outcome in outcomes.values())
        self.check_end(clean=bool(rows) and complete)

    def check_end(self, *, clean: bool) -> None:
        self.clear_faults()
        self.killed &= set(self.host.vms())
        if not clean:
            return
        assert self.mine() == []
        assert self.killed == set()
        assert [place for owner, *place in self.volumes() if owner not in self.theirs] == []
        assert self.pool not in self.host.pools()

    @invariant()
    def everything_of_others_is_unchanged(self) -> None:
        assert self.describe(self.theirs) == self.theirs


TestEverything = Everything.TestCase
TestEverything.settings = profile(
    max_examples=20, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck)
)
