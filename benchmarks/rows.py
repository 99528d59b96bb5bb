"""One measured row and its limit."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


def machine() -> str:
    """The machine of the measurement: cores, processor architecture, kernel, Python."""
    python = f"Python {platform.python_version()}"
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.release()}, {python}"


@dataclass(frozen=True)
class Row:
    """`limit` bounds the median of ours (`limit_on="ours"`), its distance from the baseline's ("difference")
    or their ratio ("ratio"); None: no limit. `note` describes the measurement.
    """

    name: str
    unit: str
    ours: tuple[float, ...]
    baseline: tuple[float, ...] = ()
    limit: float | None = None
    limit_on: str = "ours"
    note: str = ""

    @property
    def ratio_median(self) -> float | None:
        """Median of ours over median of the baseline."""
        if not self.ours or not self.baseline or not statistics.median(self.baseline):
            return None
        return statistics.median(self.ours) / statistics.median(self.baseline)

    @property
    def measured(self) -> float | None:
        """The value that the limit is compared with; None without measurements."""
        if not self.ours:
            return None
        if self.limit_on == "ratio":
            return self.ratio_median
        ours = statistics.median(self.ours)
        return ours - statistics.median(self.baseline) if self.limit_on == "difference" else ours

    @property
    def passed(self) -> bool:
        """Whether the value is within the limit. False without measurements."""
        measured = self.measured
        return measured is not None and (self.limit is None or measured <= self.limit)

    def as_json(self) -> dict[str, Any]:
        """The row as a JSON object."""
        fields = asdict(self)
        return {
            **fields,
            "ours": list(self.ours),
            "baseline": list(self.baseline),
            "ratio_median": self.ratio_median,
            "passed": self.passed,
            "machine": machine(),
        }

    def line(self) -> str:
        """The row as a line of text."""
        median = "not measured" if not self.ours else f"{statistics.median(self.ours):.3g} {self.unit}"
        against = f" (baseline {statistics.median(self.baseline):.3g})" if self.baseline else ""
        limit = "" if self.limit is None else f", {self.limit_on} at most {self.limit:g}"
        verdict = "" if self.limit is None else "ok      " if self.passed else "TOO MUCH"
        note = f"  [{self.note}]" if self.note else ""
        return f"{verdict:8} {self.name:34} {median}{against}{limit}{note}"


def show(rows: Sequence[Row]) -> None:
    """Print the rows."""
    for row in rows:
        print(row.line(), flush=True)
