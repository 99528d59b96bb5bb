"""The environment on disk: written after each phase, kept after the session, loaded by a later one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from pytest_nestedpve.environment.facts import (
    AddressFacts,
    ByPhase,
    LeafAddressFacts,
    LeafProvisionFacts,
    NetworkFacts,
    ProvisionFacts,
)
from pytest_nestedpve.environment.phases import Listener, Phase, PhaseEnded
from pytest_nestedpve.ownership.lease import Lease, LeaseLost, parse_lease
from pytest_nestedpve.ownership.pool import host_clock, pool_name, read_pool, renew
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.run import phase_record
from pytest_nestedpve.run.identity import HARD_LIMIT

if TYPE_CHECKING:
    from pytest_nestedpve.config.legacy_context import ContextVm
    from pytest_nestedpve.environment.environment import Environment

from pytest_nestedpve.run.kept_runs import store

ADOPTED = "adopted"
"""The file in a run's directory by which xdist's controller knows that a worker resumed the kept run."""


def keep(env: Environment) -> Lease:
    """Turn the lease into that of a kept run, and write the run's record. Raises PveError, OSError."""
    env.end_lease()
    host, settings = env.outer, env.settings
    now = host_clock(host)
    lease = renew(host.api, env.run, settings, now, state="kept", seconds=settings.keep_expiry)
    store(env.run, env.initial_settings, env.rootdir, int(time.time()) + lease.expires - now)
    return lease


def adopt(env: Environment) -> bool:
    """Transfer a kept run's lease to this session; False when the run does not exist on the host any more.

    The caller holds the run's lock, which excludes other sessions of this client. Raises LeaseLost when the
    lease has another owner or has expired, PveError.
    """
    host, run, settings = env.outer, env.run, env.settings
    name = pool_name(settings, run)
    pool = read_pool(host.api, name)
    if pool is None:
        return False
    lease, now = parse_lease(pool.comment), host_clock(host)
    if lease is None or (lease.client, lease.owner) != (run.client, run.owner):
        state = "no readable one" if lease is None else f"one of {lease.owner}"
        raise LeaseLost(
            f"the kept run {run.id} cannot be resumed: expected its lease in the pool {name}, found {state}"
        )
    if lease.expired(now):
        raise LeaseLost(
            f"the kept run {run.id} has expired by the clock of {host.name}: other sessions may destroy it"
        )
    renewed = Lease(
        run.owner, run.client, run.session, "live", lease.created, now + int(settings.lease), now + HARD_LIMIT
    )
    patiently(lambda: host.api.put("/pools", poolid=name, comment=renewed.to_text()))
    run.directory.write(ADOPTED, "")
    return True


class StateKeeper(Listener):
    """Writes facts and record into the run's directory after each phase, and the VMs into a context file."""

    def __init__(self, env: Environment) -> None:
        self._env = env

    def acting(self, _phase: Phase) -> None:
        """Write the record before a phase's action: the phase is in doubt until its end."""
        self._env.run.directory.write(phase_record.FILE, self._env.record.to_text())

    def phase_finished(self, ended: PhaseEnded) -> None:
        if ended.status == "failed":
            return
        facts, path = self._env.facts, self._env.settings.context_file
        self._env.run.directory.save_state(facts)
        self._env.run.directory.write(phase_record.FILE, self._env.record.to_text())
        if path is not None:
            from pytest_nestedpve.config import legacy_context

            legacy_context.save(path, *context_vms(facts))


def context_vms(facts: ByPhase) -> tuple[ContextVm, ContextVm]:
    """The nested VM and the VM inside, as the context file lists them."""
    from pytest_nestedpve.config.legacy_context import ContextVm

    vm, address, network = ProvisionFacts.known(facts), AddressFacts.known(facts), NetworkFacts.known(facts)
    leaf, leaf_address = LeafProvisionFacts.known(facts), LeafAddressFacts.known(facts)
    ip = (network and network.ip) or (address and address.ip) or None
    leaf_ip = (leaf_address and leaf_address.ip) or None
    return (
        ContextVm(vm.name or None, vm.vmid, ip) if vm is not None else ContextVm(ip=ip),
        ContextVm(leaf.name or None, leaf.vmid, leaf_ip) if leaf is not None else ContextVm(ip=leaf_ip),
    )


def load(env: Environment) -> None:
    """Load facts and record of a resumed run from its directory. Raises PveError."""
    directory = env.run.directory
    env.facts.update(directory.load_state())
    try:
        env.record = phase_record.parse((directory.path / phase_record.FILE).read_text(encoding="utf-8"))
    except OSError as e:
        raise PveError(f"the record of the kept run {env.run.id} cannot be read: {e}") from e
