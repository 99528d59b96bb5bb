"""Preflight: the requirements of the outer host, checked before anything is created on it.

All findings are collected, so that one run reports every missing requirement; warnings do not end the run.
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
    """Run all checks, those of images only if `image`; facts: the resources. Raises PreflightError."""
    try:
        host = env.outer
    except SshError as e:
        name = env.settings.host or "the outer host"
        raise PreflightError(name, [unreachable(name, e)]) from e
    context = Context(
        host, env.settings, boots=image, workers=env.workers, begun=_runs_of_session(env.run.dir)
    )
    results = run_checks(context, begin=env.progress)
    env.settings = context.settings
    if missing := results.of(MISSING):
        raise PreflightError(host.name, missing) from results.connection_error
    for finding in results.of(WARNING):
        env.remark(f"preflight: {finding}")
    facts = context.choices.facts()
    what = next((f"{key} {facts[key]}" for key in ("image", "template") if facts[key]), "the project's VM")
    resources = f"storage {facts['storage']}, bridge {facts['bridge']}"
    place = host.name
    if host.cluster.several:
        place = f"the cluster of {host.name}, node {facts['node']} ({context.choices.why['node']})"
    did = f"PVE {facts['version']} on {place}, {resources}, {what}"
    return {**facts, "did": did}


def _runs_of_session(own: Path) -> frozenset[str]:
    """This run, and those of the same xdist session whose directories exist already."""
    session = _session_of(own)
    others = (path for path in own.parent.glob("?" * 12) if session and _session_of(path) == session)
    return frozenset({own.name, *(path.name for path in others)})


def _session_of(directory: Path) -> str | None:
    try:
        return (directory / "session").read_text(encoding="utf-8")
    except OSError:
        return None
