"""All checks in order; a check that fails does not stop the others."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pytest_nestedpve.pve.errors import ApiError, PveError, SshError
from pytest_nestedpve.setup.checks import (
    address,
    capacity,
    connectivity,
    host,
    images,
    network,
    node,
    storage,
)
from pytest_nestedpve.setup.checks.finding import MISSING, UNKNOWN, Finding

if TYPE_CHECKING:
    from pytest_nestedpve.setup.checks.context import Context


@dataclass(frozen=True)
class Check:
    """One check; `needs`: the checks that must pass before it can run."""

    name: str
    do: Callable[[Context], Iterable[Finding]]
    needs: tuple[str, ...] = ()


_ROOT = ("login",)
_PVE = ("login", "PVE")
_NODE = (*_PVE, "node")

CHECKS: tuple[Check, ...] = (
    Check("login", host.login),
    Check("forwarding", connectivity.forwarding, _ROOT),
    Check("PVE", host.version, _ROOT),
    Check("clock", host.clock, _PVE),
    Check("profile", host.profile, _ROOT),
    Check("node", node.node, _PVE),
    Check("quorum", connectivity.quorum, _PVE),
    Check("nested virtualisation", host.virtualisation, _NODE),
    Check("cores", capacity.cores, _NODE),
    Check("memory", capacity.memory, _NODE),
    Check("template", images.template, _NODE),
    Check("storage", storage.storage, _NODE),
    Check("snippets", storage.snippets, _NODE),
    Check("image", images.image, _NODE),
    Check("space", storage.space, (*_NODE, "storage")),
    Check("bridge", network.bridge, _NODE),
    Check("address", address.address, _NODE),
    Check("VM id", capacity.ids, _NODE),
    Check("pool", capacity.pool_parent, _PVE),
)
# For the doctor alone: a run tries HTTPS and deletes leftovers in any case.
DOCTOR_CHECKS: tuple[Check, ...] = (
    Check("transport", connectivity.transport, _PVE),
    Check("runs", connectivity.leftovers, _PVE),
)


@dataclass(frozen=True)
class CheckResults:
    """All findings, and the error that ended the connection, if any."""

    findings: tuple[Finding, ...]
    connection_error: SshError | None = None

    def of(self, level: str) -> tuple[Finding, ...]:
        """The findings of one level."""
        return tuple(finding for finding in self.findings if finding.level == level)


def run_checks(
    context: Context,
    *,
    begin: Callable[[str], None] = lambda _name: None,
    report: Callable[[Finding], None] = lambda _finding: None,
    checks: Iterable[Check] = CHECKS,
) -> CheckResults:
    """Run the checks; `begin` is called with a check's name before it, `report` with a finding at once."""
    findings: list[Finding] = []
    failed: set[str] = set()
    reported: set[int] = set()  # ids of errors that are findings already
    connection_error: SshError | None = None

    def add(finding: Finding) -> None:
        findings.append(finding)
        report(finding)

    for check in checks:
        prerequisite = next((name for name in check.needs if name in failed), None)
        if connection_error is not None or prerequisite is not None:
            failed.add(check.name)
            why = "the connection was lost" if connection_error else f"it needs the check {prerequisite}"
            add(Finding(check.name, "", f"not checked: {why}", level=UNKNOWN))
            continue
        begin(check.name)
        before = len(findings)
        try:
            for finding in check.do(context):
                add(finding)
        except SshError as e:
            connection_error = e
            add(unreachable(context.settings.host or context.host.name, e))
        except PveError as e:
            if id(e) in reported:
                add(Finding(check.name, "", "not checked: the request for it failed", level=UNKNOWN))
            else:
                reported.add(id(e))
                text = e.text if isinstance(e, ApiError) else str(e)
                message = " / ".join(text.split("\n")[:3])
                add(Finding(check.name, "an answer", message, "Fix that on the host first."))
        if any(finding.level in (MISSING, UNKNOWN) for finding in findings[before:]):
            failed.add(check.name)
    return CheckResults(tuple(findings), connection_error)


def unreachable(name: str, error: SshError) -> Finding:
    """The finding of a failed login."""
    has_advice = "by hand" in str(error) or str(error).endswith("?")
    by_hand = (shlex.join(["ssh", name, "true"]),) if " " not in name else ()
    advice = "" if has_advice else "Log in by hand to see the cause."
    return Finding("SSH", f"a login as root at {name}", str(error), advice, by_hand, local_fix=True)
