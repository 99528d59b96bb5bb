"""Snapshots of the nested VM after each phase, if its storage supports them, and rollback to one of them.

Recorded on PVE 9.2: a rollback stops a running VM unless the call has `start`, changes neither pool nor
description, and restores name, tags and memory.
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
from pytest_nestedpve.setup.vm import NESTED, await_task, run_start_task

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.environment.phases import PhaseEnded

PREFIX = "npve_"
CLEAN, AFTER_SETUP = "npve_clean", "after set-up, before any test"
LIMIT = 600.0
_CANNOT = "snapshot feature is not available"
# ZFS, and qcow2 as a chain of volumes, roll back to the newest snapshot only.
_NOT_NEWEST = "is not most recent snapshot"


def snapshot_name(phase: str) -> str:
    """The name of the snapshot after a phase; PVE accepts up to 40 characters."""
    return f"{PREFIX}{phase}"[:40]


def _has_vm(env: Environment) -> bool:
    """Whether the nested PVE is a VM of the outer host: an attached one has facts without a VM."""
    facts = ProvisionFacts.known(env.facts)
    return facts is not None and facts.vmid is not None


def _vm_path(env: Environment) -> str:
    vm = ProvisionFacts.of(env.facts).vm
    return f"/nodes/{vm.node}/qemu/{vm.vmid}"


def take(env: Environment, name: str, description: str) -> bool:
    """Take a snapshot without memory; False if the storage cannot, or the nested PVE is an attached one.
    Raises PveError."""
    if not _has_vm(env):
        return False
    host, path = NESTED.host(env), _vm_path(env)
    vm = ProvisionFacts.of(env.facts).vm
    if vm_can(host.api, vm.node, vm.vmid, "snapshot") is False:
        return False
    if name in list_snapshots(env):
        delete(env, name)
    try:
        with call_limit(LIMIT):
            await_task(host, host.api.post(f"{path}/snapshot", snapname=name, description=description), LIMIT)
    except PveError as e:
        if _CANNOT in str(e):
            return False
        raise
    return True


def delete(env: Environment, name: str) -> None:
    """Remove a snapshot. Raises PveError."""
    host = NESTED.host(env)
    with call_limit(LIMIT):
        await_task(host, host.api.delete(f"{_vm_path(env)}/snapshot/{name}"), LIMIT)


def list_snapshots(env: Environment) -> list[str]:
    """The names of the plugin's snapshots, the oldest first. Raises PveError."""
    if not _has_vm(env):
        return []
    listed = entries(NESTED.host(env).api.get(f"{_vm_path(env)}/snapshot"), call="get snapshots")
    own = [entry for entry in listed if str(entry.get("name", "")).startswith(PREFIX)]
    return [str(entry["name"]) for entry in sorted(own, key=lambda entry: int(entry.get("snaptime") or 0))]


def roll_back(env: Environment, name: str) -> None:
    """Roll back to a snapshot, and start the VM. Raises PveError.

    On a storage that only rolls back to the newest snapshot, newer ones of the plugin are deleted first; a
    newer one of another origin is kept, and makes the rollback fail.
    """
    try:
        _run_rollback(env, name)
    except PveError as e:
        existing = list_snapshots(env)
        newer = existing[existing.index(name) + 1 :] if name in existing else []
        if _NOT_NEWEST not in str(e) or not newer:
            raise
        for snapshot in reversed(newer):
            delete(env, snapshot)
        _run_rollback(env, name)
    env.forget_connections()


def _run_rollback(env: Environment, name: str) -> None:
    run_start_task(env, NESTED, f"snapshot/{name}/rollback", LIMIT, start=1)


class SnapshotKeeper(Listener):
    """Takes a snapshot after each phase that was done and left the VM running, in an environment to be kept.

    Once all phases are done (`complete`), the snapshot of the clean state is taken too, for later sessions:
    the tests of this one change the VM. It is replaced when a phase is done again.
    """

    def __init__(self, env: Environment, complete: Callable[[], bool]) -> None:
        self._env, self._complete = env, complete
        self._supported = True

    def phase_finished(self, ended: PhaseEnded) -> None:
        env = self._env
        # A phase without a probe always runs: a snapshot after it would not be used.
        phase = ended.phase
        done = ended.status == "done" and phase.probe is not None
        if not self._supported or AddressFacts.phase not in env.facts or not (done or self._complete()):
            return
        try:
            for name, description in self._due(phase.name, done):
                self._supported = self._supported and take(env, name, description)
                env.audit.write(
                    "snapshot", phase=phase.name, status="taken" if self._supported else "skipped"
                )
            if done and not self._supported:
                env.remark("the storage of the nested VM does not support snapshots: none is taken")
        except Exception as e:
            env.audit.write("snapshot", phase=phase.name, status="failed", cause=f"{type(e).__name__}: {e}")

    def _due(self, phase: str, done: bool) -> Iterator[tuple[str, str]]:
        """Names and descriptions of the snapshots to take after a phase."""
        existing = list_snapshots(self._env) if self._env.resumed or self._complete() else []
        if done:
            if CLEAN in existing:
                delete(self._env, CLEAN)
            yield snapshot_name(phase), f"after {phase}"
        if self._complete() and (done or CLEAN not in existing):
            yield CLEAN, AFTER_SETUP
