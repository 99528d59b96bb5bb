"""Destroying the VMs of one run: each proved before each blow, several at a time, on after a failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.discovery import Candidate
from pytest_nestedpve.ownership import Proof, prove
from pytest_nestedpve.pve import guests
from pytest_nestedpve.pve.errors import CommandTimeout, NotFound, PveError, UnreadableAnswer
from pytest_nestedpve.pve.tasks import parse_upid, wait_task
from pytest_nestedpve.timing import Deadline, wait_until

if TYPE_CHECKING:
    from pytest_nestedpve.pve.api import Api
    from pytest_nestedpve.pve.host import PveHost
    from pytest_nestedpve.settings import Settings

WIDTH = 4
BUDGET = 180.0
"""Seconds for one VM, retries included."""

_DISK = re.compile(r"(?:ide|sata|scsi|virtio|efidisk|tpmstate|unused)\d+\Z")
_VOLID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*:\S+\Z")
# Bare locks of workers that were killed; any other lock is somebody's work.
_ZOMBIE_LOCKS = ("create", "destroyed")


@dataclass(frozen=True)
class Outcome:
    """What became of one candidate: "gone", "foreign" (not ours, untouched) or "left", with the reason.

    `again`: whether a second try may change it; not for volumes that outlive their VM.
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
    told: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Destroy those candidates that are proved to be the run's; goes on after failures, never raises.

    `ours` are the UPIDs of tasks that the run is known to have started: they decide about zombies.
    A VM that others of the run hang on (a base of linked clones) is tried again after the rest.
    """

    def one(candidate: Candidate) -> Outcome:
        try:
            outcome = _one(host, settings, run_id, candidate, ours)
        except Exception as e:
            outcome = Outcome(candidate.vmid, candidate.node, "left", f"{type(e).__name__}: {e}")
        if told is not None:
            told(outcome)
        return outcome

    outcomes: dict[int, Outcome] = {}
    waiting: Sequence[Candidate] = candidates
    for _ in range(2):
        if not waiting:
            break
        with ThreadPoolExecutor(max_workers=width, thread_name_prefix="destroy") as pool:
            outcomes.update({each.vmid: each for each in pool.map(one, waiting)})
        left = {vmid for vmid, each in outcomes.items() if each.result == "left" and each.again}
        waiting = [each for each in waiting if each.vmid in left]
    return [outcomes[each.vmid] for each in candidates]


def _one(
    host: PveHost, settings: Settings, run_id: str, candidate: Candidate, ours: frozenset[str]
) -> Outcome:
    deadline = Deadline(BUDGET)
    vmid, node = candidate.vmid, candidate.node
    if candidate.bare is not None:
        _end_tasks(host.api, node, vmid, ours, deadline)
    last: PveError | None = None
    volumes: list[str] = []

    def attempt() -> Outcome | None:
        nonlocal last, volumes
        proof = prove(host.api, settings, candidate, run_id)
        if proof.gone:
            return Outcome(vmid, node, "gone")
        if not proof.ok:
            return _zombie(host, candidate, ours) or Outcome(vmid, node, "foreign", proof.reason)
        if proof.status != "stopped" and not settings.force_stop:
            return Outcome(vmid, node, "left", "it runs, and force_stop is off")
        volumes = volumes or _volumes(proof.config or {})
        try:
            return _blow(host, settings, run_id, candidate, proof, deadline)
        except PveError as e:
            last = e
            return None

    try:
        outcome = wait_until(attempt, deadline=deadline, what=f"VM {vmid} to go", interval=(0.2, 5.0))
    except CommandTimeout:
        return Outcome(vmid, node, "left", str(last) if last else "the time for it was up")
    if outcome.result == "gone" and volumes:
        return _sweep_volumes(host.api, outcome, volumes)
    return outcome


def _blow(
    host: PveHost, settings: Settings, run_id: str, candidate: Candidate, proof: Proof, deadline: Deadline
) -> Outcome | None:
    """Stop if need be, prove again, delete. None: something changed in between, look again."""
    vmid, node = candidate.vmid, candidate.node
    if proof.lock is not None:
        # A lock of a running task is waited for: a delete never queues behind one.
        if _running_tasks(host.api, node, vmid):
            return None
        host.api.put(
            f"/nodes/{node}/qemu/{vmid}/config", delete="lock", skiplock=True, digest=proof.config_digest
        )
        return None
    if proof.status != "stopped":
        guests.stop(host.api, node, vmid, timeout=max(5.0, deadline.nominal()))
        again = prove(host.api, settings, candidate, run_id)
        if again.gone:
            return Outcome(vmid, node, "gone")
        if not again.ok or again.uuid != proof.uuid:
            return Outcome(vmid, node, "foreign", again.reason or "another VM has taken the id")
        if again.status != "stopped" or again.lock is not None:
            return None
    guests.destroy(host.api, node, vmid, timeout=max(5.0, deadline.nominal()))
    return Outcome(vmid, node, "gone")


def _zombie(host: PveHost, candidate: Candidate, ours: frozenset[str]) -> Outcome | None:
    """Remove what a killed create or destroy left, if the newest task of that id is ours and has ended."""
    vmid, node, path = candidate.vmid, candidate.node, f"/nodes/{candidate.node}/qemu/{candidate.vmid}"
    try:
        config = guests.guest_config(host.api, node, vmid)
        lock = str(config.get("lock")) if set(config) <= {"lock", "digest"} else None
    except NotFound:
        return Outcome(vmid, node, "gone")
    except UnreadableAnswer:
        lock = "destroyed"
    if lock not in _ZOMBIE_LOCKS:
        return None
    newest = _newest_task(host.api, node, vmid)
    if newest is None or str(newest.get("upid")) not in ours:
        return Outcome(vmid, node, "foreign", f"only a lock ({lock}), and not by a task of this run")
    if not newest.get("endtime"):
        return Outcome(vmid, node, "left", f"only a lock ({lock}), and its task still runs")
    upid = host.api.delete(path, skiplock=True)
    wait_task(host.api, upid, timeout=60)
    return Outcome(vmid, node, "gone", f"what a killed task left ({lock})")


def _newest_task(api: Api, node: str, vmid: int) -> Mapping[str, Any] | None:
    found = [each for each in api.get(f"/nodes/{node}/tasks", vmid=vmid, source="all") if each.get("upid")]
    return max(found, key=lambda each: (int(each.get("starttime") or 0), str(each["upid"])), default=None)


def _running_tasks(api: Api, node: str, vmid: int) -> list[str]:
    found = api.get(f"/nodes/{node}/tasks", vmid=vmid, source="active")
    return [str(each["upid"]) for each in found if each.get("upid") and not each.get("endtime")]


def _end_tasks(api: Api, node: str, vmid: int, ours: frozenset[str], deadline: Deadline) -> None:
    """Stop running tasks of ours on that id through the API, which cleans up; never kill."""
    for upid in _running_tasks(api, node, vmid):
        if upid not in ours:
            continue

        def ended(task: str = upid) -> bool | None:
            return task not in _running_tasks(api, node, vmid) or None

        try:
            api.delete(f"/nodes/{parse_upid(upid).node}/tasks/{upid}")
            wait_until(ended, deadline=deadline, what=f"the task {upid} to stop", interval=(0.1, 1.0))
        except (NotFound, CommandTimeout):
            continue


def _volumes(config: Mapping[str, Any]) -> list[str]:
    first = (str(value).split(",", 1)[0] for key, value in config.items() if _DISK.match(key))
    return [volid for volid in first if _VOLID.match(volid)]


def _sweep_volumes(api: Api, outcome: Outcome, volumes: Iterable[str]) -> Outcome:
    """What is left of the VM's own volumes goes, while the id has no configuration again; else it is said."""
    left = []
    for volid in volumes:
        storage = volid.partition(":")[0]
        path = f"/nodes/{outcome.node}/storage/{storage}/content"
        if not any(each.get("volid") == volid for each in api.get(path, vmid=outcome.vmid)):
            continue
        try:
            guests.guest_config(api, outcome.node, outcome.vmid)
            left.append(f"{volid} (the id is in use again)")
            continue
        except NotFound:
            pass
        try:
            upid = api.delete(f"{path}/{volid}")
            if isinstance(upid, str) and upid.startswith("UPID:"):
                wait_task(api, upid, timeout=60)
        except PveError as e:
            left.append(f"{volid} ({e})")
            continue
        if any(each.get("volid") == volid for each in api.get(path, vmid=outcome.vmid)):
            left.append(volid)
    if not left:
        return outcome
    return Outcome(outcome.vmid, outcome.node, "left", f"volumes left: {', '.join(left)}", again=False)
