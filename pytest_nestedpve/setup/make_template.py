"""Conversion of the nested VM to a template: generalise, shut down, move to the template's pool, convert."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from pytest_nestedpve.environment.facts import ProvisionFacts
from pytest_nestedpve.ownership.pool import host_clock
from pytest_nestedpve.ownership.proof import prove
from pytest_nestedpve.pve import qemu
from pytest_nestedpve.pve.api import patiently
from pytest_nestedpve.pve.errors import PveError
from pytest_nestedpve.setup.generalise import GENERALISE
from pytest_nestedpve.setup.migration import host_of_vm
from pytest_nestedpve.teardown import templates

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.host import PveHost

AFTER = "setup_network"
"""The last phase before the conversion."""
GENERALISE_LIMIT = 300.0
SHUTDOWN_LIMIT = 180.0


@dataclass(frozen=True)
class CreatedTemplate:
    """A template that is ready. `template` is its id, for `--nested-run`."""

    template: str
    vmid: int
    name: str


def create_template(env: Environment) -> CreatedTemplate:
    """Convert the run's nested VM, whose set-up is done up to `AFTER`. Raises PveError.

    After a failure an unfinished template is removed here; after a killed process the next
    `--nested-destroy-only` on this machine removes it.
    """
    settings, vm = env.settings, ProvisionFacts.of(env.facts).vm
    proof = prove(env.outer.api, settings, vm, env.run)
    if not proof.ok:
        raise PveError(f"expected VM {vm.vmid} to be the run's own, found: {proof.reason}")
    replace(ProvisionFacts.of(env.facts), node=proof.node).record(env.facts)
    env.check_lease()
    env.progress("generalising the VM")
    answer = env.inner.run(["sh", "-s"], stdin=GENERALISE.encode(), timeout=GENERALISE_LIMIT)
    if not answer.ok:
        reason = (answer.stderr or answer.stdout).strip()[-400:] or f"exit status {answer.rc}"
        raise PveError(f"expected the nested PVE to be generalised, found: {reason}")
    env.forget_connections()
    env.progress("shutting the VM down")
    # The VM may have been moved meanwhile: calls through `host_of_vm` find it, and update the facts.
    qemu.shutdown(host_of_vm(env).api, ProvisionFacts.of(env.facts).vm.node, vm.vmid, timeout=SHUTDOWN_LIMIT)
    env.check_lease()
    # As root from here on: the run's token has no right on a VM outside the run's pool.
    host = env.outer.within(cast(Any, lambda: None))
    deed = templates.own_deed(env.run.id, vm.vmid, vm.uuid, host_clock(host))
    try:
        env.progress("moving the VM to the template's pool")
        claim(host, settings, deed)
        env.audit.write("template_converting", phase="make_template", vmid=vm.vmid)
        name = convert(host, settings, deed, ProvisionFacts.of(env.facts).vm.node, env.progress)
    except BaseException as error:
        leftovers = undo(host, settings, deed)
        if leftovers and isinstance(error, PveError):
            raise PveError(f"{error}; the unfinished template could not be removed: {leftovers}") from error
        raise
    return CreatedTemplate(deed.template, vm.vmid, name)


def claim(host: PveHost, settings: Settings, deed: templates.Deed) -> str:
    """Create the template's pool, and move the VM from the run's pool into it; its name. Raises PveError."""
    pool = templates.pool_name(settings, deed.template)
    move = {"vms": str(deed.vmid), "allow-move": 1}
    patiently(lambda: host.api.post("/pools", poolid=pool, comment=deed.to_text()))
    patiently(lambda: host.api.put("/pools", poolid=pool, **move))
    return pool


def convert(
    host: PveHost,
    settings: Settings,
    deed: templates.Deed,
    node: str,
    progress: Callable[[str], None],
    limit: float = 600.0,
) -> str:
    """Convert the stopped VM, which is in the template's pool; returns its name. Raises PveError."""
    path, pool = qemu.path_of(node, deed.vmid), templates.pool_name(settings, deed.template)
    name = templates.guest_name(settings, deed.template)
    day = time.strftime("%Y-%m-%d", time.gmtime(deed.created))
    note = f"Nested Proxmox VE for fast starts, created on {day} by {deed.owner}"
    progress("writing the template's marker")
    marking = {"description": f"{templates.marker(deed)}\n{note}", "tags": "nestedpve;nestedpve-template"}
    # The snippet is deleted with the run; the run's keys are of no use to a clone.
    patiently(lambda: host.api.put(f"{path}/config", name=name, delete="cicustom,sshkeys", **marking))
    progress("converting the VM")
    qemu.awaited(host.api, lambda: host.api.post(f"{path}/template"), limit)
    ready = replace(deed, state=templates.READY).to_text()
    patiently(lambda: host.api.put("/pools", poolid=pool, comment=ready))
    return name


def undo(host: PveHost, settings: Settings, deed: templates.Deed) -> str:
    """Remove the leftovers of a failed creation; a text about those that remain, or empty. Never raises."""
    try:
        named = replace(settings, run_id=deed.template)
        for row in templates.rows(host, named):
            outcome = templates.destroy_template(host, named, row) if row.verdict == "destroy" else None
            if outcome is None or outcome.result != "gone":
                return f"{row.name}: {outcome.reason if outcome else row.reason}"
    except PveError as e:
        return str(e)
    return ""
