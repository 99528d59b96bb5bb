"""One line of the plan of --nested-destroy-only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """One VM that may be somebody's left-over, or the pool of a run without VMs (`vmid` is None).

    `verdict` is "destroy" or "keep", with the `reason`. `ask`: it carries no marker, so somebody has to
    confirm. `owed`: it should be gone, but stays. Times: epoch seconds of the host's clock.
    """

    vmid: int | None
    node: str
    name: str
    run: str | None
    owner: str | None
    created: int | None
    expires: int | None
    verdict: str
    reason: str
    ask: bool = False
    owed: bool = False
    digest: str = ""
    pool: str | None = None
    bare: str | None = None

    def public(self, outcome: str) -> dict[str, Any]:
        """The row of --nested-json."""
        keys = ("vmid", "node", "name", "run", "owner", "created", "expires", "verdict", "reason")
        return {**{key: getattr(self, key) for key in keys}, "outcome": outcome}

    def kept(self, reason: str, *, owed: bool = True) -> Row:
        """The same, but it stays."""
        return replace(self, verdict="keep", reason=reason, owed=owed)
