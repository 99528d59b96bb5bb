"""Delays of a lab's nodes: `nestedpve-lab set NAME cli_delay_s=1.3 stop_s=2 destroy_s=3`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from . import lifecycle
from .names import FATHER, LabError, LabUsage
from .node_commands import output_on

MAX_SECONDS = 600.0
KEYS = {
    "cli_delay_s": "each pvesh and qm takes that much longer, each pveum and pvesm 0.4 of it",
    "start_s": "the start of a VM takes that much longer",
    "stop_s": "the stop of a VM takes that much longer",
    "destroy_s": "the destruction of a VM takes that much longer",
}
_FILE = "/etc/nestedpve-lab.json"


def parse(pairs: Sequence[str]) -> dict[str, float]:
    """Seconds by key, from words `key=seconds`. LabUsage for an unknown key or a value out of range."""
    delays = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in KEYS:
            known = "".join(f"\n  {name:12} {what}" for name, what in KEYS.items())
            raise LabUsage(f"set: expected KEY=SECONDS, found {pair!r}; the keys are{known}")
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 <= seconds <= MAX_SECONDS:
            raise LabUsage(f"set: {key}: expected seconds, 0 to {MAX_SECONDS:g}, found {value!r}")
        delays[key] = seconds
    return delays


def change(lab: str, changes: Mapping[str, float]) -> dict[str, float]:
    """Change a running lab's delays, at once and for all its nodes, those that boot later too. Returns all
    delays (seconds) by key. LabError if the lab does not run."""
    delays = dict.fromkeys(KEYS, 0.0) | _read(lab)
    if not changes:
        return delays
    delays |= changes
    # Written in place: the file is bind-mounted into the nodes inside.
    for node in lifecycle.get(lab).pids:
        output_on(node, lab, f"cat >{_FILE}", json.dumps(delays))
    return delays


def _read(lab: str) -> dict[str, float]:
    text = output_on(FATHER, lab, f"cat {_FILE} 2>/dev/null || true")
    try:
        loaded = json.loads(text or "{}")
        return {key: float(loaded[key]) for key in KEYS if key in loaded}
    except (ValueError, TypeError) as e:
        raise LabError(f"{_FILE} on {FATHER} of lab {lab} cannot be read: {e}; found {text[:200]!r}") from e
