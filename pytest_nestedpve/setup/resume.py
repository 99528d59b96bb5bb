"""Going on with a kept run: its lease becomes ours, and a phase that broke half-way is undone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_nestedpve.environment import persistence
from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.setup import snapshots

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment


def resume(env: Environment) -> bool:
    """False when the run is gone, and everything is to do. Raises PveError."""
    if not persistence.adopt(env):
        env.remark(f"the kept run {env.run.id} is gone from {env.outer.name}: made anew")
        env.start_over()
        return False
    env.keep_lease()
    _undo(env)
    return True


def _undo(env: Environment) -> None:
    """Back to the state before a phase that broke half-way, if there is a snapshot of it."""
    begun = env.record.begun
    if begun is None or ProvisionFacts.phase not in env.facts:
        return
    there = snapshots.taken(env)
    names = list(env.record.digests)  # in the order in which they were done
    done = [name for name in names if env.record.digests[name]]
    good = next((name for name in reversed(done) if snapshots.name_of(name) in there), None)
    if good is None:
        env.remark(f"{begun} broke half-way last time; without a snapshot it is done again on what it left")
        return
    snapshots.back(env, snapshots.name_of(good))
    undone = names[names.index(good) + 1 :]
    env.record.doubt(undone)
    for name in (*undone, begun):
        env.facts.pop(name, None)
    env.record.begun = None
    env.remark(f"{begun} broke half-way last time: went back to the snapshot after {good}")
