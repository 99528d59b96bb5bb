"""Destroying the VMs of one run: each proved before each blow, several at a time, on after a failure."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership import killed_tasks
from pytest_nestedpve.ownership.discover import Candidate
from pytest_nestedpve.ownership.proof import Proof, prove
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.answers import entries, whole
from pytest_nestedpve.pve.cluster import nodes_now
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import (
    BadParameter,
    CommandTimeout,
    InUse,
    NodeUnreachable,
    NotFound,
    PermissionDenied,
    Protected,
    PveError,
)
from pytest_nestedpve.pve.parallel import in_parallel
from pytest_nestedpve.pve.tasks import parse_upid, wait_task
from pytest_nestedpve.teardown.volumes import Volumes

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.pve.host import PveHost

WIDTH = 4
BUDGET = 180.0
"""Seconds for one VM, retries included."""
UNKNOWN_TASK = 30.0
"""Seconds that a bare lock with a running task, perhaps of a call of ours that was cut off, is waited for."""


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: "gone", "foreign" (not ours, untouched) or "left", with the reason.

    `again`: whether a second try may change it; not for volumes that outlive their VM, or one of ours
    that somebody protected.
    """

    vmid: int
    node: str
    result: str
    reason: str = ""
    again: bool = True


def destroy(
    host: PveHost,
    settings: Settings,
    run_id: str,
    candidates: Sequence[Candidate],
    *,
    ours: frozenset[str] = frozenset(),
    width: int = WIDTH,
    budget: float = BUDGET,
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Destroy those candidates that are proved to be the run's; goes on after failures, never raises.

    `ours` are the UPIDs of tasks that the run is known to have started: they decide about zombies.
    `budget` are nominal seconds for each VM. A VM that others of the run hang on (a base of linked clones)
    is tried again after the rest, for as long as that changes something.
    """

    volumes = Volumes(host.api)

    def one(candidate: Candidate) -> Outcome:
        try:
            outcome = _Target(host, settings, run_id, candidate, ours, Deadline(budget), volumes).destroy()
        except Exception as e:
            outcome = Outcome(candidate.vmid, candidate.node, "left", f"{type(e).__name__}: {e}")
        if told is not None:
            told(outcome)
        return outcome

    outcomes: dict[int, Outcome] = {}
    waiting: Sequence[Candidate] = candidates
    extra = 1  # one more try although nothing changed
    while waiting:
        found = in_parallel(one, waiting, width)
        outcomes.update({each.vmid: each for each in found})
        left = {each.vmid for each in found if each.result == "left" and each.again}
        if len(left) == len(waiting):
            extra -= 1
            if extra < 0:
                break
        waiting = [each for each in waiting if each.vmid in left]
    gone = {vmid: each.node for vmid, each in outcomes.items() if each.result == "gone"}
    for vmid, stays in volumes.sweep(gone):
        outcomes[vmid] = replace(outcomes[vmid], result="left", reason=stays, again=False)
        if told is not None:
            told(outcomes[vmid])
    return [outcomes[each.vmid] for each in candidates]


class _Target:
    """One candidate on its way: what was seen last, for the message when its time is up."""

    def __init__(
        self,
        host: PveHost,
        settings: Settings,
        run_id: str,
        candidate: Candidate,
        ours: frozenset[str],
        deadline: Deadline,
        volumes: Volumes,
    ) -> None:
        self.host, self.api, self.settings, self.run_id = host, host.api, settings, run_id
        self.candidate, self.vmid, self.node = candidate, candidate.vmid, candidate.node
        self.ours, self.deadline = ours, deadline
        self.patience = Deadline(UNKNOWN_TASK)
        self.seen = ""
        self.volumes = volumes
        self.destroyed = False

    def destroy(self) -> Outcome:
        """Proof, stop, proof, delete, until it is gone or the time is up."""
        try:
            return wait_until(
                self._attempt, deadline=self.deadline, what=f"VM {self.vmid} to go", interval=(0.2, 5.0)
            )
        except CommandTimeout:
            return self._say("left", self.seen or "the time for it was up")

    def _attempt(self) -> Outcome | None:
        """One round; None: not yet, look again."""
        try:
            return self._round()
        except (InUse, PermissionDenied, Protected, BadParameter) as e:
            # More of the same would not help. A base (in use) comes after its clones, in the next pass.
            return self._say("left", e.text)
        except NodeUnreachable as e:
            return self._unreachable(e)
        except PveError as e:
            self.seen = str(e)
            return None

    def _unreachable(self, error: NodeUnreachable) -> Outcome | None:
        """It is not gone, whatever the other nodes say; of one that is off nothing can be waited for."""
        self.seen = f"its node {self.node} cannot be reached: {error.text}"
        with contextlib.suppress(PveError):
            state = nodes_now(self.api).get(self.node, "no member of the cluster any more")
            if state != "online":
                return self._say("left", f"its node {self.node} is {state}: it is there again when that is")
        return None

    def _round(self) -> Outcome | None:
        node = self.node
        self.volumes.look(node)
        waits = self._waits()
        proof = self._prove()
        if proof.gone:
            return self._say("gone")
        if self.node != node:
            return None  # it was moved: what works on it there is looked at first
        if not proof.ok:
            return self._remains(proof)
        if proof.status != "stopped" and not self.settings.force_stop:
            return self._say("left", "it runs, and force_stop is off")
        if waits:
            return None
        self.volumes.note(self.node, self.vmid, proof.config or {}, made_there=self._made_there())
        if proof.lock is not None:
            self._unlock(proof)
            return None
        if proof.status != "stopped":
            qemu.stop(self.api, self.node, self.vmid, timeout=self._left())
            again = self._prove()
            if again.gone:
                return self._say("gone")
            if again.marked and not again.ok:
                return self._remains(again)
            if not again.ok or again.uuid != proof.uuid:
                return self._say("foreign", again.reason or "another VM has taken the id")
            if self.node != node or again.status != "stopped" or again.lock is not None or self._waits():
                return None
        # Nothing is between this proof and the call: a delete is never sent to queue behind a lock.
        qemu.destroy(self.api, self.node, self.vmid, timeout=self._left())
        self.destroyed = True
        # Its task ended well; the configuration says whether it is gone, and may be another VM's by now.
        after = self._prove()
        return self._say("gone") if after.gone or (after.uuid and after.uuid != proof.uuid) else None

    def _prove(self) -> Proof:
        found = prove(self.api, self.settings, self.candidate, self.run_id)
        if found.node != self.node:
            self.node, self.candidate = found.node, replace(self.candidate, node=found.node)
        return found

    def _made_there(self) -> bool:
        """Whether the VM was made on the node that it is on: then what its id has there came with it. In a
        cluster only the run's own first task for the id tells that."""
        if not self.host.cluster.several:
            return True
        tasks = (parse_upid(each) for each in self.ours)
        own = [(task.starttime, task.node) for task in tasks if task.id == str(self.vmid)]
        return bool(own) and min(own)[1] == self.node

    def _left(self) -> float:
        return max(5.0, self.deadline.nominal())

    def _say(self, result: str, reason: str = "") -> Outcome:
        if result == "foreign" and self.destroyed:
            result, reason = "gone", ""  # ours is; its volumes are looked for, whoever has the id now
        return Outcome(self.vmid, self.node, result, reason)

    def _remains(self, proof: Proof) -> Outcome | None:
        """Not proved: what a killed task of ours left is removed, anything else stays."""
        found = killed_tasks.remains(self.host, self.node, self.vmid, self.ours)
        if found is None and proof.marked:
            return Outcome(
                self.vmid, self.node, "left", f"ours by its marker, but {proof.reason}", again=False
            )
        if found is None:
            return self._say("foreign", proof.reason)
        if found.running and not self.patience.expired:
            self.seen = found.reason  # a create whose call was cut off becomes a VM of ours when it ends
            return None
        if not found.ours or found.running:
            return self._say("left" if found.ours else "foreign", found.reason)
        self.volumes.note(self.node, self.vmid, {}, made_there=self._made_there())
        upid = self.api.delete(f"/nodes/{self.node}/qemu/{self.vmid}", skiplock=True)
        wait_task(self.api, upid, timeout=self._left())
        return self._say("gone", found.reason) if self._prove().gone else None

    def _waits(self) -> bool:
        """Whether a task works on the VM; `seen` names it. Those of ours are stopped first, through the API,
        which cleans up (a killed one would not)."""
        running = killed_tasks.running_tasks(self.api, self.node, self.vmid)
        for upid in (each for each in running if each in self.ours):
            with contextlib.suppress(NotFound):
                self.api.delete(f"/nodes/{parse_upid(upid).node}/tasks/{upid}")
        if running and self.ours.issuperset(running):
            self.seen = f"the task {running[0]} does not stop"
        elif running:
            self.seen = f"the task {running[0]} works on it"
        return bool(running)

    def _is_moving(self) -> bool:
        """Whether a migration still works: on the node that it came from, when its configuration is here."""
        if not self.host.cluster.several:
            return False
        listed = entries(self.api.get("/cluster/tasks"), call="get /cluster/tasks", strict=True)
        mine = (each for each in listed if str(each.get("id")) == str(self.vmid))
        return any("migrate" in str(each.get("type")) and whole(each.get("endtime")) is None for each in mine)

    def _unlock(self, proof: Proof) -> None:
        """Lift the lock of a task that is dead, on our own VM, in exactly the configuration that was proved.

        Nothing works on the VM (`_waits`); but a backup of several guests has no id in its task.
        """
        if proof.lock == "backup":
            active = killed_tasks.read_tasks(self.api, self.node, source="active")
            if any(task.type == "vzdump" and not over for task, over in active):
                self.seen = "a backup task runs, and it is locked (backup)"
                return
        if proof.lock == "migrate" and self._is_moving():
            self.seen = "it is being moved to another node"
            return
        self.seen = f"VM is locked ({proof.lock})"
        self.api.put(
            f"/nodes/{self.node}/qemu/{self.vmid}/config",
            delete="lock",
            skiplock=True,
            digest=proof.config_digest,
        )
