"""Running a playbook against the nested PVE: its inventory, its variables, what is told of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.ansible import Inventory, PlaybookEvent, PlaybookFailed, PlaybookResult, run_playbook
from pytest_nestedpve.inventory import nested_inventory
from pytest_nestedpve.timing import Deadline

if TYPE_CHECKING:
    from pytest_nestedpve.environment import Environment


def run(
    env: Environment,
    playbook: Path,
    variables: Mapping[str, Any],
    *,
    timeout: float,
    check: bool = True,
    inventory: Inventory | None = None,
) -> PlaybookResult:
    """Run it within `timeout` seconds (nominal), by default against the nested PVE; told to the audit log.

    Raises PlaybookFailed, PlaybookTimeout.
    """
    name = str(env.fact("provision", "name"))
    env.write_ssh_config()
    deadline = Deadline(timeout)
    result: PlaybookResult | None = None
    try:
        result = run_playbook(
            env,
            playbook,
            inventory=inventory
            or nested_inventory(name, address=env.ip, groups=env.settings.inventory_groups),
            variables=variables,
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


def summary(result: PlaybookResult) -> str:
    """A few words for the report, which has the recap besides."""
    changed = result.changed
    return f"{changed or 'no'} task{'' if changed == 1 else 's'} of {result.playbook} changed something"


def _progress(env: Environment) -> Callable[[PlaybookEvent], None]:
    def tell(event: PlaybookEvent) -> None:
        if event.kind == "task":
            env.progress(f"{event.role} : {event.name}" if event.role else event.name)

    return tell
