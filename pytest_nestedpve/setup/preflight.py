"""Preflight: all that has to be true of the outer host, looked at before anything is made on it.

What is missing is collected, so that one run of preflight names all of it; warnings are told and go on.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.pve.errors import PveError, SshError
from pytest_nestedpve.setup.checks.context import Context
from pytest_nestedpve.setup.checks.finding import MISSING, WARNING, Finding
from pytest_nestedpve.setup.checks.run_checks import run_checks, unreachable
from pytest_nestedpve.setup.checks.storage import contents, disk_format, usable

if TYPE_CHECKING:
    from pytest_nestedpve.environment.environment import Environment

__all__ = ["Finding", "PreflightError", "contents", "disk_format", "preflight", "usable"]


class PreflightError(PveError):
    """The outer host cannot be used as it is; `findings` has every reason."""

    def __init__(self, host: str, findings: Iterable[Finding]) -> None:
        self.findings = tuple(findings)
        lines = "".join(f"\n  - {finding}" for finding in self.findings)
        count = len(self.findings)
        super().__init__(f"{host} cannot be used as it is, {count} finding{'s' * (count != 1)}:{lines}")


def preflight(env: Environment, *, image: bool = True) -> dict[str, Any]:
    """Look at everything, but `image`s only if wanted; facts: what will be used. Raises PreflightError."""
    try:
        host = env.outer
    except SshError as e:
        name = env.settings.host or "the outer host"
        raise PreflightError(name, [unreachable(name, e)]) from e
    seen = Context(host, env.settings, boots=image, workers=env.workers, begun=_begun(env.run.dir))
    found = run_checks(seen, begin=env.progress)
    env.settings = seen.settings
    if missing := found.of(MISSING):
        raise PreflightError(host.name, missing) from found.connection_error
    for finding in found.of(WARNING):
        env.remark(f"preflight: {finding}")
    facts = seen.choices.facts()
    what = next((f"{each} {facts[each]}" for each in ("image", "template") if facts[each]), "a VM of its own")
    where = f"storage {facts['storage']}, bridge {facts['bridge']}"
    which = host.name
    if host.cluster.several:
        which = f"the cluster of {host.name}, node {facts['node']} ({seen.choices.why['node']})"
    did = f"PVE {facts['version']} on {which}, {where}, {what}"
    return {**facts, "did": did}


def _begun(own: Path) -> frozenset[str]:
    """This run, and those of the same xdist session that have made their directories."""
    family = _family(own)
    others = (each for each in own.parent.glob("?" * 12) if family and _family(each) == family)
    return frozenset({own.name, *(each.name for each in others)})


def _family(folder: Path) -> str | None:
    try:
        return (folder / "session").read_text(encoding="utf-8")
    except OSError:
        return None
