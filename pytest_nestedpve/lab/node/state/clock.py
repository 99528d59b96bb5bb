"""The node's clock."""

from __future__ import annotations

import time

from . import reported


def now() -> float:
    """Epoch seconds."""
    return time.time() + reported.clock_offset()
