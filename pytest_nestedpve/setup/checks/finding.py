"""The results of checks (ok, warning, missing, unknown) and the commands that fix them."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, MISSING, UNKNOWN = "ok", "warning", "missing", "unknown"


@dataclass(frozen=True)
class Finding:
    """The result of one check; `what`: its subject.

    `fix`: command lines for a root shell on the host or, if `local_fix`, for a shell on this machine.
    """

    what: str
    expected: str
    actual: str
    advice: str = ""
    fix: tuple[str, ...] = ()
    local_fix: bool = False
    level: str = MISSING

    def __str__(self) -> str:
        end = "" if self.actual.endswith((".", "?", "!")) else "."
        text = f"{self.what}: expected {self.expected}; found {self.actual}{end} {self.advice}".rstrip()
        if self.fix:
            machine = "this machine" if self.local_fix else "the host"
            text += f" Run on {machine}: `{' && '.join(self.fix)}`."
        return text


def fine(what: str, actual: str) -> Finding:
    """The finding of a check that passed."""
    return Finding(what, "", actual, level=OK)
