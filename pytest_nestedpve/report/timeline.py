"""The timeline of a run as inline SVG, one row per phase: heights in pixels, horizontal positions in percent.

Percent positions adapt the width to the page without scaling the text, so it is readable on a telephone too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from pytest_nestedpve.report.audit_model import Step

_ROW = 30  # pixels: a line of text and a bar below it
_TOP = 18


def duration(seconds: float | None) -> str:
    """Seconds as text: `0.4 s`, `12 s`, `3 min 05 s`."""
    if seconds is None:
        return "not finished"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def tick_distance(span: float) -> float:
    """A round number of seconds that divides `span` into three to six parts."""
    for candidate in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200):
        if span / candidate <= 5:
            return float(candidate)
    return 3600.0 * math.ceil(span / 3600 / 5)


def timeline(steps: Sequence[Step], ended: float) -> str:
    """SVG markup; empty without steps. `ended` (epoch seconds) is the end of bars of unfinished steps."""
    if not steps:
        return ""
    begin = min(step.start for step in steps)
    span = max(0.001, max([ended] + [step.start + (step.seconds or 0.0) for step in steps]) - begin)
    height = _TOP + _ROW * len(steps) + 4
    parts = [
        f'<svg class="timeline" role="img" aria-label="Timeline: {len(steps)} phases in {duration(span)}" '
        f'width="100%" height="{height}" xmlns="http://www.w3.org/2000/svg">'
    ]
    distance = tick_distance(span)
    at = 0.0
    while at <= span:
        x = 100 * at / span
        anchor = "start" if x < 1 else "end" if x > 93 else "middle"
        label = "0" if at == 0 else duration(at) if at >= 60 else f"{at:g} s"
        parts.append(f'<line class="grid" x1="{x:.3f}%" x2="{x:.3f}%" y1="{_TOP - 4}" y2="{height}"/>')
        parts.append(f'<text class="axis" x="{x:.3f}%" y="{_TOP - 7}" text-anchor="{anchor}">{label}</text>')
        at += distance
    for row, step in enumerate(steps):
        y = _TOP + row * _ROW
        seconds = step.seconds if step.seconds is not None else max(0.0, ended - step.start)
        left = 100 * (step.start - begin) / span
        width = min(100 - left, max(0.4, 100 * seconds / span))
        title = f"{step.name}: {step.status}, {duration(step.seconds)}"
        # The label starts at the start of its bar, or ends at its end if it would be cut off.
        x, anchor = (left, "start") if left < 55 else (min(100.0, left + width), "end")
        parts.append(
            f'<g class="{escape(step.status, quote=True)}"><title>{escape(title)}</title>'
            f'<text x="{x:.3f}%" y="{y + 13}" text-anchor="{anchor}">{escape(step.name)} '
            f'<tspan class="axis">{duration(step.seconds)}</tspan></text>'
            f'<rect x="{left:.3f}%" y="{y + 18}" width="{width:.3f}%" height="8" rx="2"/></g>'
        )
    parts.append("</svg>")
    return "".join(parts)
