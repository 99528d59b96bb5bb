"""The nested PVE as it was after set-up, for one test or module: proved unchanged, or rolled back."""

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

BACK = 600.0
"""Seconds, nominal, for the way back: the rollback, the boot, the services, the leaf."""
_SCRIPT = Path(__file__).with_name("fingerprint.py")


class NoSnapshots(PveError):
    """A clean state was asked for, and cannot be had."""


class CleanState:
    """What the nested PVE looked like after set-up, and how to have that again.

    `gave` says how the last one was given: "proved" or "rolled back", with what had changed.
    """

    def __init__(self, env: Environment) -> None:
        self._env = env
        self._able = False
        self._wanted: dict[str, str] | None = None
        self._leaf = False
        self.gave = ""

    def remember(self, *, fresh: bool) -> None:
        """Take now for the clean state; `fresh`: something was set up in this session. Raises PveError.

        Of a kept environment in which all was proved, an earlier session's snapshot is the clean state: what
        its tests did is not set-up. Of one that is to be kept it was taken when the set-up was complete.
        """
        env = self._env
        self._leaf = LeafAddressFacts.phase in env.facts
        there = snapshots.CLEAN in snapshots.taken(env)
        holds = there and (not fresh or env.settings.keep != "no")
        self._able = holds or snapshots.take(env, snapshots.CLEAN, snapshots.AFTER_SETUP)
        self._wanted = None if there and not fresh else self._fingerprint()
        env.leaf_used = False

    def give(self) -> None:
        """Have the clean state again. Raises PveError."""
        env = self._env
        changed = self._changed()
        if not changed:
            self.gave = "proved unchanged"
            return
        if not self._able and env.attached:
            raise NoSnapshots(
                "nested_pve_clean: the attached PVE was changed (" + ", ".join(changed) + "), and one that "
                "is attached is never rolled back; expected tests that undo what they do, or a nested PVE of "
                "the run's own (without --nested-attach)"
            )
        if not self._able:
            raise NoSnapshots(
                "nested_pve_clean: the nested PVE was changed ("
                + ", ".join(changed)
                + "), and the storage of its VM has no snapshots to go back to; expected one that has "
                "(qcow2 on a directory, ZFS, LVM-thin): nested_pve_storage names it"
            )
        env.progress("going back to the state after set-up: " + ", ".join(changed))
        deadline = Deadline(BACK)
        snapshots.back(env, snapshots.CLEAN)
        self._come_back(deadline)
        self._wanted = self._fingerprint()
        env.leaf_used = False
        self.gave = "rolled back: " + ", ".join(changed)

    def _changed(self) -> list[str]:
        """The areas that are not as they were; of what cannot be known too."""
        if self._wanted is None:
            return ["tests of an earlier session"]
        try:
            now = self._fingerprint()
        except PveError as e:
            return [f"it does not answer ({str(e).splitlines()[0][:120]})"]
        areas = sorted(set(now) | set(self._wanted))
        found = [area for area in areas if now.get(area) != self._wanted.get(area)]
        return found + (["the VM inside, which a test logged in to"] if self._env.leaf_used else [])

    def _fingerprint(self) -> dict[str, str]:
        answer = self._env.inner.run(["python3", "-"], stdin=_SCRIPT.read_bytes(), timeout=180).check()
        try:
            found = json.loads(answer.stdout)
        except ValueError as e:
            raise PveError(f"expected the state of the nested PVE, found {answer.stdout[:200]!r}") from e
        return {str(area): str(value) for area, value in found.items()}

    def _come_back(self, deadline: Deadline) -> None:
        env = self._env
        address.relocate(env, deadline.nominal())
        wrong = ""

        def well() -> bool:
            nonlocal wrong
            try:
                version, wrong = host_phases.health(env.inner)
            except SshError as e:
                version, wrong = None, str(e)
            return version is not None

        wait_until(
            well, deadline=deadline, interval=(0.1, 0.4),
            what=lambda: f"the nested PVE to be well again; last seen: {wrong}",
        )  # fmt: skip
        if self._leaf:
            vm.start(env, vm.LEAF)
            env.facts[LeafAddressFacts.phase] = address.wait_ip(env, vm.LEAF, deadline.nominal())
            env.write_ssh_config()
