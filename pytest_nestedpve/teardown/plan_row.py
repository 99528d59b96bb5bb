"""One line of the plan of --nested-destroy-only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Row:
    """A VM that may be a leftover, or the pool of a run without VMs (`vmid` is None).

    `verdict` is "destroy" or "keep", with the `reason`. `needs_confirmation`: the VM has no marker.
    `is_leftover`: the verdict is "keep", but the VM should be destroyed. Times: epoch seconds of the host's
    clock.
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
    needs_confirmation: bool = False
    is_leftover: bool = False
    digest: str = ""
    pool: str | None = None
    bare: str | None = None

    def public(self, outcome: str) -> dict[str, Any]:
        """The row of --nested-json."""
        keys = ("vmid", "node", "name", "run", "owner", "created", "expires", "verdict", "reason")
        return {**{key: getattr(self, key) for key in keys}, "outcome": outcome}

    def kept(self, reason: str, *, is_leftover: bool = True) -> Row:
        """The row with the verdict "keep"."""
        return replace(self, verdict="keep", reason=reason, is_leftover=is_leftover)
