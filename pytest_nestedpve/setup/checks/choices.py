"""The resources of a host that a run uses, with the reason of each choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Choices:
    """The choices of the checks; None without a candidate, or where nothing is needed.

    `why`: the reason of each choice, by field.
    """

    version: str | None = None
    node: str | None = None
    clock_offset: int | None = None
    storage: str | None = None
    format: str | None = None
    snippets: str | None = None
    image: str | None = None
    template: int | None = None
    bridge: str | None = None
    vmid: str | None = None
    transport: str | None = None
    why: Mapping[str, str] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """The facts of the phase preflight."""
        names = (
            "version", "node", "clock_offset", "storage", "format", "snippets", "image", "template", "bridge",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}
