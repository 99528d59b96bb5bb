"""The destroyer: VMs are proved, stopped, proved again and deleted, several at a time, and retried.

A `Prover` decides whether a VM may be destroyed: a run's VM (`ownership.proof.RunProver`), a VM without a
marker (`teardown.unmarked.UnmarkedProver`) or a template (`teardown.templates.TemplateProver`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_nestedpve.ownership import killed_tasks
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
    from pytest_nestedpve.ownership.proof import Located, Proof, Prover
    from pytest_nestedpve.pve.host import PveHost

WIDTH = 4
BUDGET = 180.0
"""Seconds for one VM, retries included."""
UNKNOWN_TASK = 30.0
"""Seconds to wait while a task runs on a configuration that is only a lock: it may be a create of ours whose
call was cut off."""


@dataclass(frozen=True)
class Outcome:
    """The end of one VM: "gone", "foreign" (not ours, not touched) or "left", with the reason.

    `retry`: whether a further attempt may succeed; not for volumes left over from a deleted VM, and not for a
    VM of ours that is protected.
    """

    vmid: int
    node: str
    result: str
    reason: str = ""
    retry: bool = True


def destroy(
    host: PveHost,
    prover: Prover,
    vms: Sequence[Located],
    *,
    force_stop: bool,
    width: int = WIDTH,
    budget: float = BUDGET,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Destroy the VMs that `prover` proves, with their volumes; continues after failures, never raises.

    `force_stop`: whether running VMs are stopped; otherwise they are left. `budget` are nominal seconds for
    each VM. A VM that others depend on (the base of linked clones) is retried after the rest, until a pass
    changes nothing. `on_outcome` is called at the end of each attempt, by the thread that made it.
    """

    volumes = Volumes(host.api)

    def attempt(vm: Located) -> Outcome:
        try:
            outcome = _Destruction(host, prover, vm, force_stop, Deadline(budget), volumes).run()
        except Exception as e:
            reason = f"{type(e).__name__}: {e}"
            outcome = Outcome(vm.vmid, vm.node, "left", reason, retry=prover.retries)
        if on_outcome is not None:
            on_outcome(outcome)
        return outcome

    outcomes: dict[int, Outcome] = {}
    pending: Sequence[Located] = vms
    spare_passes = 1  # one more pass although the last one changed nothing
    while pending:
        results = in_parallel(attempt, pending, width)
        outcomes.update({outcome.vmid: outcome for outcome in results})
        to_retry = {outcome.vmid for outcome in results if outcome.result == "left" and outcome.retry}
        if len(to_retry) == len(pending):
            spare_passes -= 1
            if spare_passes < 0:
                break
        pending = [vm for vm in pending if vm.vmid in to_retry]
    gone = {vmid: outcome.node for vmid, outcome in outcomes.items() if outcome.result == "gone"}
    for vmid, leftovers in volumes.sweep(gone):
        outcomes[vmid] = replace(outcomes[vmid], result="left", reason=leftovers, retry=False)
        if on_outcome is not None:
            on_outcome(outcomes[vmid])
    return [outcomes[vm.vmid] for vm in vms]


class _Destruction:
    """The destruction of one VM. `obstacle` is what prevented it in the last round."""

    def __init__(
        self,
        host: PveHost,
        prover: Prover,
        vm: Located,
        force_stop: bool,
        deadline: Deadline,
        volumes: Volumes,
    ) -> None:
        self.host, self.api, self.prover, self.force_stop = host, host.api, prover, force_stop
        self.vmid, self.node = vm.vmid, vm.node
        self.own_tasks = prover.own_tasks or frozenset()
        self.deadline = deadline
        self.unknown_task = Deadline(UNKNOWN_TASK)
        self.volumes = volumes
        self.obstacle = ""
        self.deleted = False

    def run(self) -> Outcome:
        """Rounds until the VM is gone, must not be destroyed, or the time is up."""
        if not self.prover.retries:
            return self._attempt() or self._outcome("left", self.obstacle)
        try:
            return wait_until(
                self._attempt,
                deadline=self.deadline,
                what=f"the destruction of VM {self.vmid}",
                interval=(0.2, 5.0),
            )
        except CommandTimeout:
            return self._outcome("left", self.obstacle)

    def _attempt(self) -> Outcome | None:
        """One round; None: not yet, retry."""
        try:
            return self._round()
        except (InUse, PermissionDenied, Protected, BadParameter) as e:
            # A retry would not help now. A base (in use) is retried after its clones, in the next pass.
            return self._outcome("left", e.text)
        except NodeUnreachable as e:
            return self._unreachable(e)
        except PveError as e:
            self.obstacle = str(e)
            return None

    def _round(self) -> Outcome | None:
        """Lock wait, proof, stop, proof, delete. Raises PveError."""
        node = self.node
        self.volumes.look(node)
        busy = self._is_busy()
        proof = self._prove()
        if proof.gone:
            return self._outcome("gone")
        if self.node != node:
            self.obstacle = f"it was moved from {node} to {self.node}"
            return None  # first come the tasks and volumes of that node
        if not proof.ok:
            # PVE adds a VM to its pool at the end of the create task (facts of PVE 9.2, 49): one that only
            # lacks the pool is judged when no task works on it any more.
            return None if busy and proof.outside else self._not_proved(proof)
        if proof.status != "stopped" and not self.force_stop:
            return self._outcome("left", "it runs, and force_stop is off")
        if busy:
            return None
        self.volumes.note(
            node,
            self.vmid,
            proof.config or {},
            marked=proof.marked,
            created_here=self._was_created_here(),
        )
        if proof.lock is not None:
            self._release_lock(proof)
            return None
        if proof.status != "stopped":
            qemu.stop(self.api, node, self.vmid, timeout=self._seconds_left())
            busy = self._is_busy()
            after_stop = self._prove()
            if after_stop.gone:
                return self._outcome("gone")
            if after_stop.marked and not after_stop.ok:
                return self._not_proved(after_stop)
            if not after_stop.ok or after_stop.identity != proof.identity:
                return self._outcome("foreign", after_stop.reason or "another VM has the id now")
            if busy:
                return None
            if self.node != node or after_stop.status != "stopped" or after_stop.lock is not None:
                self.obstacle = "it was moved, started or locked while it was stopped"
                return None
        # No call between the proof and the delete: a delete is never queued behind a lock or a task.
        qemu.destroy(self.api, self.node, self.vmid, timeout=self._seconds_left())
        self.deleted = True
        # The task ended well. The configuration decides, and may be that of another VM already.
        after_delete = self._prove()
        if after_delete.gone or after_delete.identity not in ("", proof.identity):
            return self._outcome("gone")
        self.obstacle = "its destroy task ended well, and yet it exists"
        return None

    def _prove(self) -> Proof:
        proof = self.prover.prove(self)
        self.node = proof.node or self.node
        return proof

    def _outcome(self, result: str, reason: str = "") -> Outcome:
        if result == "foreign" and self.deleted:
            result, reason = "gone", ""  # ours is deleted, and another VM has the id: only volumes remain
        return Outcome(self.vmid, self.node, result, reason, retry=self.prover.retries)

    def _seconds_left(self) -> float:
        return max(5.0, self.deadline.nominal())

    def _unreachable(self, error: NodeUnreachable) -> Outcome | None:
        """Not gone, whatever other nodes report. A node that is off is not awaited."""
        self.obstacle = f"its node {self.node} cannot be reached: {error.text}"
        with contextlib.suppress(PveError):
            state = nodes_now(self.api).get(self.node, "no member of the cluster any more")
            if state != "online":
                return self._outcome("left", f"its node {self.node} is {state}: the VM reappears with it")
        return None

    def _not_proved(self, proof: Proof) -> Outcome | None:
        """Nothing is touched, except the leftover of a killed task of the run, which is deleted."""
        leftover = None
        if self.prover.own_tasks is not None:
            leftover = killed_tasks.find_leftover(self.host, self.node, self.vmid, self.own_tasks)
        if leftover is None and proof.marked:
            reason = f"ours by its marker, but {proof.reason}"
            return Outcome(self.vmid, self.node, "left", reason, retry=False)
        if leftover is None and self.prover.own_tasks is not None and killed_tasks.is_bare(proof.config):
            self.obstacle = "its configuration changed while it was judged"  # its create ended: prove again
            return None
        if leftover is None:
            return self._outcome("foreign", proof.reason)
        if leftover.running and not self.unknown_task.expired:
            self.obstacle = leftover.reason  # a create whose call was cut off becomes a VM of ours at its end
            return None
        if not leftover.ours or leftover.running:
            return self._outcome("left" if leftover.ours else "foreign", leftover.reason)
        self.volumes.note(self.node, self.vmid, {}, created_here=self._was_created_here())
        upid = self.api.delete(f"/nodes/{self.node}/qemu/{self.vmid}", skiplock=True)
        wait_task(self.api, upid, timeout=self._seconds_left())
        if self._prove().gone:
            return self._outcome("gone", leftover.reason)
        self.obstacle = f"{leftover.reason}; its destroy task ended well, and yet it exists"
        return None

    def _is_busy(self) -> bool:
        """Whether a task works on the VM; `obstacle` names it. Own tasks are stopped first, through the API,
        which cleans up (a killed one would not)."""
        running = killed_tasks.running_tasks(self.api, self.node, self.vmid)
        for upid in (upid for upid in running if upid in self.own_tasks):
            with contextlib.suppress(NotFound):
                self.api.delete(f"/nodes/{parse_upid(upid).node}/tasks/{upid}")
        if running and self.own_tasks.issuperset(running):
            self.obstacle = f"the task {running[0]} does not stop"
        elif running:
            self.obstacle = f"the task {running[0]} works on it"
        return bool(running)

    def _was_created_here(self) -> bool:
        """Whether the VM was created on the node that it is on: then volumes of its id there came with it. In
        a cluster only the run's own first task for the id proves that."""
        if not self.host.cluster.several:
            return True
        tasks = (parse_upid(upid) for upid in self.own_tasks)
        nodes_by_start = [(task.starttime, task.node) for task in tasks if task.id == str(self.vmid)]
        return bool(nodes_by_start) and min(nodes_by_start)[1] == self.node

    def _is_moving(self) -> bool:
        """Whether a migration still works: on the node that it came from, when its configuration is here."""
        if not self.host.cluster.several:
            return False
        tasks = entries(self.api.get("/cluster/tasks"), call="get /cluster/tasks", strict=True)
        own = (task for task in tasks if str(task.get("id")) == str(self.vmid))
        return any("migrate" in str(task.get("type")) and whole(task.get("endtime")) is None for task in own)

    def _release_lock(self, proof: Proof) -> None:
        """Remove the lock of an ended task from a run's VM, in exactly the configuration that was proved.

        No task works on the VM (`_is_busy`); but a backup of several guests has no id in its task.
        """
        self.obstacle = f"VM is locked ({proof.lock})"
        if self.prover.own_tasks is None:
            return
        if proof.lock == "backup":
            active = killed_tasks.read_tasks(self.api, self.node, source="active")
            if any(task.type == "vzdump" and not over for task, over in active):
                self.obstacle = "a backup task runs, and it is locked (backup)"
                return
        if proof.lock == "migrate" and self._is_moving():
            self.obstacle = "it is being moved to another node"
            return
        self.api.put(
            f"/nodes/{self.node}/qemu/{self.vmid}/config",
            delete="lock",
            skiplock=True,
            digest=proof.config_digest,
        )
