"""The nested VM becomes a template: generalised, shut down, given a pool of its own, converted."""

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
from pytest_nestedpve.setup.migration import outer
from pytest_nestedpve.teardown import templates

if TYPE_CHECKING:
    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.environment.environment import Environment
    from pytest_nestedpve.pve.host import PveHost

AFTER = "setup_network"
"""The phase that is the last one before."""
GENERALISE_LIMIT = 300.0
SHUTDOWN_LIMIT = 180.0


@dataclass(frozen=True)
class Made:
    """A template that is ready. `template` is what `--nested-run` calls it."""

    template: str
    vmid: int
    name: str


def make(env: Environment) -> Made:
    """Make one of the run's nested VM, which has been set up as far as `AFTER`. Raises PveError.

    What is half-way when something fails is removed here; when the process is killed, the next
    `--nested-destroy-only` on this machine does it.
    """
    settings, found = env.settings, ProvisionFacts.of(env.facts).vm
    proof = prove(env.outer.api, settings, found, env.run)
    if not proof.ok:
        raise PveError(f"expected VM {found.vmid} to be the run's own; found: {proof.reason}")
    replace(ProvisionFacts.of(env.facts), node=proof.node).record(env.facts)
    env.check_lease()
    env.progress("generalising it")
    said = env.inner.run(["sh", "-s"], stdin=GENERALISE.encode(), timeout=GENERALISE_LIMIT)
    if not said.ok:
        reason = (said.stderr or said.stdout).strip()[-400:] or f"exit status {said.rc}"
        raise PveError(f"expected the nested PVE to be generalised; found: {reason}")
    env.forget_connections()
    env.progress("shutting it down")
    # It may be moved while it is generalised: this follows it, and so do the facts.
    qemu.shutdown(outer(env).api, ProvisionFacts.of(env.facts).vm.node, found.vmid, timeout=SHUTDOWN_LIMIT)
    env.check_lease()
    # The run's token has no right on what is not in the run's pool any more: root, from here on.
    host = env.outer.within(cast(Any, lambda: None))
    deed = templates.own_deed(env.run.id, found.vmid, found.uuid, host_clock(host))
    try:
        env.progress("giving it a pool of its own")
        claim(host, settings, deed)
        env.audit.write("template_converting", phase="make_template", vmid=found.vmid)
        name = convert(host, settings, deed, ProvisionFacts.of(env.facts).vm.node, env.progress)
    except BaseException as error:
        stays = undo(host, settings, deed)
        if stays and isinstance(error, PveError):
            raise PveError(f"{error}; what was begun could not be removed: {stays}") from error
        raise
    return Made(deed.template, found.vmid, name)


def claim(host: PveHost, settings: Settings, deed: templates.Deed) -> str:
    """Create the template's pool and move the VM from its run's pool into it; its name. Raises PveError."""
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
    note = f"Nested Proxmox VE for fast starts, made on {day} by {deed.owner}"
    progress("writing its marker")
    marking = {"description": f"{templates.marker(deed)}\n{note}", "tags": "nestedpve;nestedpve-template"}
    # The snippet is deleted with the run; the run's keys are of no use to a clone.
    patiently(lambda: host.api.put(f"{path}/config", name=name, delete="cicustom,sshkeys", **marking))
    progress("converting it")
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
