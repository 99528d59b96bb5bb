"""Snapshots of the nested VM, where its storage can: after each phase, and back to the last good one.

What PVE does with them is by recordings of PVE 9.2: a rollback stops a running VM unless it is told to start
it, touches neither pool nor description, and restores name, tags and memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.facts import AddressFacts, ProvisionFacts
from pytest_nestedpve.environment.phases import Listener
from pytest_nestedpve.pve.answers import entries
from pytest_nestedpve.pve.api import call_limit
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.pve.storage import vm_can
from pytest_nestedpve.setup.vm import NESTED, starting, task

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import PhaseEnded

PREFIX = "npve_"
CLEAN, AFTER_SETUP = "npve_clean", "after set-up, before any test"
LIMIT = 600.0
_CANNOT = "snapshot feature is not available"
# ZFS, and qcow2 as a chain of volumes, go back to the newest snapshot only.
_NOT_NEWEST = "is not most recent snapshot"


def name_of(phase: str) -> str:
    """The snapshot's name after a phase; PVE takes up to 40 characters."""
    return f"{PREFIX}{phase}"[:40]


def _has_vm(env: Environment) -> bool:
    """Whether the nested PVE is a VM of the outer host: an attached one has facts without a VM."""
    facts = ProvisionFacts.known(env.facts)
    return facts is not None and facts.vmid is not None


def _base(env: Environment) -> str:
    vm = ProvisionFacts.of(env.facts).vm
    return f"/nodes/{vm.node}/qemu/{vm.vmid}"


def take(env: Environment, name: str, description: str) -> bool:
    """Take a snapshot without memory; False where the storage cannot, or an attached PVE has no VM here.
    Raises PveError."""
    if not _has_vm(env):
        return False
    host, base = NESTED.host(env), _base(env)
    vm = ProvisionFacts.of(env.facts).vm
    if vm_can(host.api, vm.node, vm.vmid, "snapshot") is False:
        return False
    if name in taken(env):
        drop(env, name)
    try:
        with call_limit(LIMIT):
            task(host, host.api.post(f"{base}/snapshot", snapname=name, description=description), LIMIT)
    except PveError as e:
        if _CANNOT in str(e):
            return False
        raise
    return True


def drop(env: Environment, name: str) -> None:
    """Remove a snapshot. Raises PveError."""
    host = NESTED.host(env)
    with call_limit(LIMIT):
        task(host, host.api.delete(f"{_base(env)}/snapshot/{name}"), LIMIT)


def taken(env: Environment) -> list[str]:
    """The names of our snapshots, the oldest first. Raises PveError."""
    if not _has_vm(env):
        return []
    listed = entries(NESTED.host(env).api.get(f"{_base(env)}/snapshot"), call="get snapshots")
    ours = [each for each in listed if str(each.get("name", "")).startswith(PREFIX)]
    return [str(each["name"]) for each in sorted(ours, key=lambda each: int(each.get("snaptime") or 0))]


def back(env: Environment, name: str) -> None:
    """Back to a snapshot, and started again. Raises PveError.

    A storage that goes back to its newest one only loses those of ours that are younger; one that somebody
    else took stands in the way, and stays.
    """
    try:
        _roll_back(env, name)
    except PveError as e:
        there = taken(env)
        younger = there[there.index(name) + 1 :] if name in there else []
        if _NOT_NEWEST not in str(e) or not younger:
            raise
        for each in reversed(younger):
            drop(env, each)
        _roll_back(env, name)
    env.forget_connections()


def _roll_back(env: Environment, name: str) -> None:
    starting(env, NESTED, f"snapshot/{name}/rollback", LIMIT, start=1)


class SnapshotKeeper(Listener):
    """After each phase that was done and left the VM running, a snapshot: for an environment that is kept.

    Once all are done (`complete`), that of the clean state too, as a later session's tests may want it: it
    would find what those of this one left. What it holds is not all of the set-up when a phase is done again.
    """

    def __init__(self, env: Environment, complete: Callable[[], bool]) -> None:
        self._env, self._complete = env, complete
        self._able = True

    def phase_finished(self, ended: PhaseEnded) -> None:
        env = self._env
        # Without a probe a phase always runs: there is nothing to come back to.
        phase = ended.phase
        done = ended.status == "done" and phase.probe is not None
        if not self._able or AddressFacts.phase not in env.facts or not (done or self._complete()):
            return
        try:
            for name, description in self._due(phase.name, done):
                self._able = self._able and take(env, name, description)
                env.audit.write("snapshot", phase=phase.name, status="taken" if self._able else "skipped")
            if done and not self._able:
                env.remark("the storage of the nested VM has no snapshots: none is taken")
        except Exception as e:
            env.audit.write("snapshot", phase=phase.name, status="failed", cause=f"{type(e).__name__}: {e}")

    def _due(self, phase: str, done: bool) -> Iterator[tuple[str, str]]:
        """What is to be taken after a phase: names and descriptions."""
        there = taken(self._env) if self._env.resumed or self._complete() else []
        if done:
            if CLEAN in there:
                drop(self._env, CLEAN)
            yield name_of(phase), f"after {phase}"
        if self._complete() and (done or CLEAN not in there):
            yield CLEAN, AFTER_SETUP
