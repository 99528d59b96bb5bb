"""Resumption of a kept run: this session takes over its lease, and an interrupted phase is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_nestedpve.environment import persistence
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.setup import snapshots

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment


def resume(env: Environment) -> bool:
    """Resume the kept run; False if it does not exist on the host any more. Raises PveError."""
    if not persistence.adopt(env):
        env.remark(f"the kept run {env.run.id} does not exist on {env.outer.name}: it is created again")
        env.start_over()
        return False
    env.keep_lease()
    _undo(env)
    return True


def _undo(env: Environment) -> None:
    """Roll back to the state before an interrupted phase, if there is a snapshot of it."""
    begun = env.record.begun
    if begun is None or ProvisionFacts.phase not in env.facts:
        return
    existing = snapshots.list_snapshots(env)
    names = list(env.record.digests)  # in the order in which they were done
    done = [name for name in names if env.record.digests[name]]
    good = next((name for name in reversed(done) if snapshots.snapshot_name(name) in existing), None)
    if good is None:
        env.remark(
            f"{begun} broke half-way last time: without a snapshot it is repeated on its unfinished state"
        )
        return
    snapshots.roll_back(env, snapshots.snapshot_name(good))
    undone = names[names.index(good) + 1 :]
    env.record.doubt(undone)
    for name in (*undone, begun):
        env.facts.pop(name, None)
    env.record.begun = None
    env.remark(f"{begun} broke half-way last time: rolled back to the snapshot after {good}")
