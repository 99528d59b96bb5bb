"""The clean state of the nested PVE for a test or module: proved unchanged since set-up, or rolled back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.facts import LeafAddressFacts
from pytest_nestedpve.pve.deadline import Deadline, wait_until
from pytest_nestedpve.pve.errors import PveError, SshError
from pytest_nestedpve.setup import address, host_phases, snapshots, vm

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

RESTORE_LIMIT = 600.0
"""Nominal seconds for rollback, boot, services and leaf."""
_SCRIPT = Path(__file__).with_name("fingerprint.py")


class NoSnapshots(PveError):
    """The clean state was requested, and cannot be restored."""


class CleanState:
    """The state of the nested PVE after set-up; `restore` returns to it.

    `result` of the last `restore`: "proved unchanged", or "rolled back" with the areas that had changed.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._has_snapshot = False
        self._clean: dict[str, str] | None = None
        self._has_leaf = False
        self.result = ""

    def record(self, *, fresh: bool) -> None:
        """Record the present state as clean; `fresh`: a phase was done in this session. Raises PveError.

        In a kept environment in which every phase was proved, the snapshot of an earlier session is the clean
        state, without changes by tests of that session. If the environment is to be kept, the snapshot was
        taken when the set-up was complete.
        """
        env = self._env
        self._has_leaf = LeafAddressFacts.phase in env.facts
        exists = snapshots.CLEAN in snapshots.list_snapshots(env)
        valid = exists and (not fresh or env.settings.keep != "no")
        self._has_snapshot = valid or snapshots.take(env, snapshots.CLEAN, snapshots.AFTER_SETUP)
        self._clean = None if exists and not fresh else self._fingerprint()
        env.leaf_used = False

    def restore(self) -> None:
        """Prove the clean state, or roll back to it. Raises NoSnapshots, PveError."""
        env = self._env
        changed = self._changed()
        if not changed:
            self.result = "proved unchanged"
            return
        areas = ", ".join(changed)
        if not self._has_snapshot and env.attached:
            raise NoSnapshots(
                f"nested_pve_clean: the attached PVE was changed ({areas}), and an attached PVE is never "
                "rolled back; expected tests that undo their changes, or a nested PVE of the run (without "
                "--nested-attach)"
            )
        if not self._has_snapshot:
            raise NoSnapshots(
                f"nested_pve_clean: the nested PVE was changed ({areas}), and the storage of its VM has no "
                "snapshots; set nested_pve_storage to one that has them (qcow2 on a directory, ZFS, LVM-thin)"
            )
        env.progress(f"rolling back to the state after set-up: {areas}")
        deadline = Deadline(RESTORE_LIMIT)
        snapshots.roll_back(env, snapshots.CLEAN)
        self._await_health(deadline)
        self._clean = self._fingerprint()
        env.leaf_used = False
        self.result = f"rolled back: {areas}"

    def _changed(self) -> list[str]:
        """The areas that differ from the clean state, or whose state is not known."""
        if self._clean is None:
            return ["tests of an earlier session"]
        try:
            current = self._fingerprint()
        except PveError as e:
            return [f"it does not answer ({str(e).splitlines()[0][:120]})"]
        areas = sorted(set(current) | set(self._clean))
        changed = [area for area in areas if current.get(area) != self._clean.get(area)]
        return changed + (["the VM inside, which a test logged in to"] if self._env.leaf_used else [])

    def _fingerprint(self) -> dict[str, str]:
        answer = self._env.inner.run(["python3", "-"], stdin=_SCRIPT.read_bytes(), timeout=180).check()
        try:
            areas = json.loads(answer.stdout)
        except ValueError as e:
            raise PveError(f"expected JSON of the nested PVE's state, found {answer.stdout[:200]!r}") from e
        return {str(area): str(value) for area, value in areas.items()}

    def _await_health(self, deadline: Deadline) -> None:
        env = self._env
        address.relocate(env, deadline.nominal())
        fault = ""

        def is_healthy() -> bool:
            nonlocal fault
            try:
                version, fault = host_phases.health(env.inner)
            except SshError as e:
                version, fault = None, str(e)
            return version is not None

        wait_until(
            is_healthy, deadline=deadline, interval=(0.1, 0.4),
            what=lambda: f"the nested PVE to work again; last fault: {fault}",
        )  # fmt: skip
        if self._has_leaf:
            vm.start(env, vm.LEAF)
            env.facts[LeafAddressFacts.phase] = address.wait_ip(env, vm.LEAF, deadline.nominal())
            env.write_ssh_config()
