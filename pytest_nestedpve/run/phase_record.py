"""The record of a run's phases: a digest of the inputs of each, and the phase that did not end.

It lies in the run's directory: a later session decides by it which phases it does again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pytest_nestedpve.pve.errors import PveError

FILE = "phases.json"


class RecordError(PveError):
    """The file is not a record of phases."""


@dataclass
class PhaseRecord:
    """`digests`: a hash of the inputs of each phase that was done; empty for one in doubt.

    `begun`: a phase whose action began and failed or was interrupted; its leftovers are unknown.
    """

    digests: dict[str, str] = field(default_factory=dict)
    begun: str | None = None

    def to_text(self) -> str:
        return json.dumps({"v": 1, "begun": self.begun, "digests": self.digests}, indent=1) + "\n"

    def doubt(self, names: Iterable[str]) -> None:
        """Mark phases to be done again: their probes may find leftovers of an earlier playbook."""
        for name in names:
            self.digests.pop(name, None)  # the order is that of the last time
            self.digests[name] = ""


def parse(text: str) -> PhaseRecord:
    """The record from the text of its file. Raises RecordError."""
    try:
        data = json.loads(text)
    except ValueError as e:
        raise RecordError(f"expected the record of a run's phases, found no JSON: {e}") from e
    digests, begun = (data.get("digests"), data.get("begun")) if isinstance(data, dict) else (None, None)
    if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
        raise RecordError("expected the record of a run's phases to hold digests by phase")
    return PhaseRecord(dict(digests), begun if isinstance(begun, str) else None)


def digest(phase: str, inputs: object, before: Mapping[str, str]) -> str:
    """A hash of the inputs of a phase, and of the digests of the phases before it."""
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
