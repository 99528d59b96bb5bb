"""Run a playbook on the nested PVE, with progress, notes and an entry in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.environment.facts import LeafAddressFacts, ProvisionFacts
from pytest_nestedpve.pve.deadline import Deadline, scale
from pytest_nestedpve.setup.ansible.ansible_cfg import GUARDS
from pytest_nestedpve.setup.ansible.inventory import nested_inventory
from pytest_nestedpve.setup.ansible.runner import (
    Inventory,
    PlaybookEvent,
    PlaybookFailed,
    PlaybookResult,
    project_config,
    run_playbook,
)

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment


def run(
    env: Environment,
    playbook: Path,
    variables: Mapping[str, Any],
    *,
    timeout: float,
    check: bool = True,
    inventory: Inventory | None = None,
) -> PlaybookResult:
    """Run `playbook` within `timeout` seconds (nominal), by default on the nested PVE; log it for the audit.

    Raises PlaybookFailed, PlaybookTimeout.
    """
    name = ProvisionFacts.of(env.facts).name
    env.write_ssh_config()
    remark_overridden(env, variables)
    deadline = Deadline(timeout)
    result: PlaybookResult | None = None
    try:
        result = run_playbook(
            env,
            playbook,
            inventory=inventory
            or nested_inventory(
                name, address=env.ip, groups=env.settings.inventory_groups, extra=node_variables(env)
            ),
            # Not one of a phase's inputs: another factor changes nothing on the node.
            variables={"nested_pve_timeout_scale": scale(), **variables},
            timeout=timeout,
            on_event=_progress(env),
            check=check,
        )
        return result
    except PlaybookFailed as e:
        result = e.result
        raise
    finally:
        env.audit.write(
            "playbook",
            playbook=playbook.name,
            ms=round(deadline.elapsed() * 1000, 1),
            rc=result.rc if result else None,
            status="ok" if result and result.ok else "failed",
            recap={host: asdict(recap) for host, recap in result.recap.items()} if result else None,
            failures=list(result.failures) if result and result.failures else None,
        )


def node_variables(env: Environment) -> dict[str, Any]:
    """Variables about the run and the node, for playbooks of a project."""
    vm, leaf_address = ProvisionFacts.known(env.facts), LeafAddressFacts.known(env.facts)
    variables = {
        "nested_pve_run": env.run.id,
        "nested_pve_vmid": vm.vmid if vm is not None else None,
        "nested_pve_host": env.settings.host,
        "nested_pve_leaf_ip": leaf_address.ip if leaf_address is not None else None,
    }
    return {name: value for name, value in variables.items() if value is not None}


def remark_overridden(env: Environment, variables: Mapping[str, Any]) -> None:
    """Remark, once, the options of ansible.cfg and the variables that do not apply to the run's SSH."""
    config = project_config(env.rootdir)
    options = config.remark() if config is not None else None
    guarded = sorted(name for name in (*GUARDS, "ansible_ssh_args") if name in variables)
    names = f"variables that do not apply: {', '.join(guarded)}" if guarded else None
    for line in filter(None, (options, names)):
        if line not in env.remarks:
            env.remark(line)


def summary(result: PlaybookResult) -> str:
    """One line for the report; the recap is reported separately."""
    changed = result.changed
    return f"{changed or 'no'} task{'' if changed == 1 else 's'} of {result.playbook} changed something"


def _progress(env: Environment) -> Callable[[PlaybookEvent], None]:
    def show(event: PlaybookEvent) -> None:
        if event.kind == "task":
            env.progress(f"{event.role} : {event.name}" if event.role else event.name)

    return show
