"""The checks, in order, each on its own: one that fails does not keep the others from being made."""

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
    from pytest_nestedpve.setup.checks.context import Seen


@dataclass(frozen=True)
class Check:
    """One check; `needs` names those without which there is nothing to look at."""

    name: str
    do: Callable[[Seen], Iterable[Finding]]
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
# A run finds these out, or mends them, as it goes.
FOR_PEOPLE: tuple[Check, ...] = (
    Check("transport", connectivity.transport, _PVE),
    Check("runs", connectivity.leftovers, _PVE),
)


@dataclass(frozen=True)
class Found:
    """All findings, and the error that ended the connection, if one did."""

    findings: tuple[Finding, ...]
    lost: SshError | None = None

    def of(self, level: str) -> tuple[Finding, ...]:
        """The findings of one level."""
        return tuple(each for each in self.findings if each.level == level)


def look(
    seen: Seen,
    *,
    begin: Callable[[str], None] = lambda _name: None,
    told: Callable[[Finding], None] = lambda _finding: None,
    checks: Iterable[Check] = CHECKS,
) -> Found:
    """Make the checks; `begin` hears of each before it is made, `told` of each finding at once."""
    findings: list[Finding] = []
    failed: set[str] = set()
    known: set[int] = set()  # errors that stand among the findings already
    lost: SshError | None = None

    def take(finding: Finding) -> None:
        findings.append(finding)
        told(finding)

    for check in checks:
        lacking = next((need for need in check.needs if need in failed), None)
        if lost is not None or lacking is not None:
            failed.add(check.name)
            why = "the connection is lost" if lost is not None else f"{lacking} comes first"
            take(Finding(check.name, "", f"not looked at: {why}", level=UNKNOWN))
            continue
        begin(check.name)
        before = len(findings)
        try:
            for finding in check.do(seen):
                take(finding)
        except SshError as e:
            lost = e
            take(unreachable(seen.settings.host or seen.host.name, e))
        except PveError as e:
            if id(e) in known:
                take(Finding(check.name, "", "not looked at: the answer for it failed", level=UNKNOWN))
            else:
                known.add(id(e))
                words = e.text if isinstance(e, ApiError) else str(e)
                said = " / ".join(words.split("\n")[:3])
                take(Finding(check.name, "an answer", said, "Mend that on the host first."))
        if any(each.level in (MISSING, UNKNOWN) for each in findings[before:]):
            failed.add(check.name)
    return Found(tuple(findings), lost)


def unreachable(name: str, error: SshError) -> Finding:
    """A host that cannot be logged in to."""
    said = "by hand" in str(error) or str(error).endswith("?")  # what to do
    by_hand = (shlex.join(["ssh", name, "true"]),) if " " not in name else ()
    advice = "" if said else "See what a login by hand says."
    return Finding("SSH", f"a login as root at {name}", str(error), advice, by_hand, here=True)
