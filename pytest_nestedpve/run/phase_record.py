"""What is known of the phases of a run beyond its facts: what each was done for, and which one was begun.

Kept in the run's directory, so that a later session knows what it can rely on.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_nestedpve.pve.errors import PveError

FILE = "phases.json"


class RecordError(PveError):
    """The record of a run is not one."""


@dataclass
class PhaseRecord:
    """`digests`: per phase that is done, a hash of what it depended on; empty for one in `doubt`. `begun`: a
    phase whose action began and did not end well; what it left behind is not known."""

    digests: dict[str, str] = field(default_factory=dict)
    begun: str | None = None

    def to_text(self) -> str:
        return json.dumps({"v": 1, "begun": self.begun, "digests": self.digests}, indent=1) + "\n"

    def doubt(self, names: Iterable[str]) -> None:
        """These phases are to be done: what a probe finds of one may be what an earlier playbook left."""
        for name in names:
            self.digests.pop(name, None)  # in the order in which they were done last
            self.digests[name] = ""


def parse(text: str) -> PhaseRecord:
    """Raises RecordError."""
    try:
        data = json.loads(text)
    except ValueError as e:
        raise RecordError(f"expected the record of a run's phases, found no JSON: {e}") from e
    digests, begun = (data.get("digests"), data.get("begun")) if isinstance(data, dict) else (None, None)
    if not isinstance(digests, dict) or not all(isinstance(each, str) for each in digests.values()):
        raise RecordError("expected the record of a run's phases to hold digests by phase")
    return PhaseRecord(dict(digests), begun if isinstance(begun, str) else None)


def digest(phase: str, inputs: object, before: Mapping[str, str]) -> str:
    """A hash of what a phase depends on: its own inputs, and the digests of the phases before it."""
    import hashlib  # not at load: pytest itself does without it

    data = {"phase": phase, "inputs": inputs, "before": dict(before)}
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=_plain).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return str(value)
