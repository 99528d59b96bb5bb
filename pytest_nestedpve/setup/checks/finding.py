"""What a check found: fine, worth a warning, missing, or not to be seen; and the commands that mend it."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, MISSING, UNKNOWN = "ok", "warning", "missing", "unknown"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    `fix` are lines for a root shell on the host or, with `here`, for a shell on this machine.
    """

    what: str
    expected: str
    found: str
    advice: str = ""
    fix: tuple[str, ...] = ()
    here: bool = False
    level: str = MISSING

    def __str__(self) -> str:
        end = "" if self.found.endswith((".", "?", "!")) else "."
        text = f"{self.what}: expected {self.expected}; found {self.found}{end} {self.advice}".rstrip()
        if self.fix:
            text += f" Run {'here' if self.here else 'there'}: `{' && '.join(self.fix)}`."
        return text


def fine(what: str, found: str) -> Finding:
    """Nothing is to be done."""
    return Finding(what, "", found, level=OK)
