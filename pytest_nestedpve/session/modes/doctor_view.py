"""The doctor's output on a terminal, wide or narrow, with or without colours."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pytest_nestedpve.run.masking import Masker
from pytest_nestedpve.setup.checks.finding import MISSING, OK, UNKNOWN, WARNING, Finding

if TYPE_CHECKING:
    import pytest

    from pytest_nestedpve.config.settings import Settings
    from pytest_nestedpve.setup.checks.choices import Choices

_MARKUP: dict[str, dict[str, bool]] = {
    OK: {"green": True},
    WARNING: {"yellow": True, "bold": True},
    MISSING: {"red": True, "bold": True},
    UNKNOWN: {"light": True},
}
_LEVEL, _NAME = 9, 23  # widths of the first columns
_MIN_WIDTH = 40


class View:
    """Writes lines to pytest's terminal, with secrets masked."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.masker = Masker()
        self.width = max(_MIN_WIDTH, min(int(out.fullwidth), 110))
        self._open = False

    @classmethod
    @contextmanager
    def of(cls, config: pytest.Config) -> Iterator[View]:
        """Yield a view on the terminal of a session."""
        from _pytest.config import create_terminal_writer

        reporter = config.pluginmanager.getplugin("terminalreporter")
        view = cls(reporter._tw if reporter is not None else create_terminal_writer(config))
        try:
            yield view
        finally:
            view._erase()
            view.out.flush()

    # -- lines ------------------------------------------------------------------------------------

    def _line(self, text: str = "", **markup: bool) -> None:
        self._erase()
        self.out.line(self.masker.mask(text), **markup)

    def _erase(self) -> None:
        if self._open:
            self.out.write("\r\x1b[2K")
            self._open = False

    def _paragraph(self, text: str, indent: int, **markup: bool) -> None:
        for line in self._wrapped(text, indent):
            self._line(" " * indent + line, **markup)

    def _wrapped(self, text: str, indent: int) -> list[str]:
        room = max(24, self.width - indent)
        # A path or an id is never broken: it is copied as a whole.
        lines = textwrap.wrap(" ".join(text.split()), room, break_long_words=False, break_on_hyphens=False)
        return lines or [""]

    def _row(self, label: str, name: str, text: str, **markup: bool) -> None:
        """Write a coloured label, a name, and a text to their right, or below them on a narrow terminal."""
        self._erase()
        indent = 2 + (_LEVEL if label else 0) + _NAME
        beside = self.width - indent >= 30
        self.out.write("  ")
        if label:
            self.out.write(f"{label:<{_LEVEL}}", **markup)
        self.out.write(self.masker.mask(f"{name:<{_NAME}}" if beside else name), bold=not label)
        lines = self._wrapped(text, indent if beside else 4)
        if not beside:
            self.out.line()
        for number, line in enumerate(lines):
            space = "" if beside and not number else " " * (indent if beside else 4)
            self._line(space + line)

    # -- sections ------------------------------------------------------------------------------------

    def title(self, host: str, origin: str) -> None:
        self._line()
        self.out.write("nested-pve doctor: ", bold=True)
        self._line(host, bold=True, cyan=True)
        source = f"named by {origin}; " if origin != "default" else ""
        self._paragraph(f"{source}read only: nothing is created, changed or started on this host", 0)
        self._line()

    def begin(self, name: str) -> None:
        """Show the name of the running check until its finding is written."""
        if self.out.hasmarkup:
            self._erase()
            self.out.write(f"  ...      {name}", light=True)
            self.out.flush()
            self._open = True

    def finding(self, finding: Finding) -> None:
        """Write a finding: one line, or several on a narrow terminal."""
        text = f"expected {finding.expected}; found: {finding.actual}" if finding.expected else finding.actual
        self._row(finding.level, finding.what, text, **_MARKUP[finding.level])

    def note(self, text: str) -> None:
        self._row("note", "", text, light=True)

    def rows(self, choices: Choices, settings: Settings) -> list[tuple[str, str, str]]:
        """(what, value, why) of each choice of a run."""
        why = choices.why
        rows: list[tuple[str, str, str]] = []

        def add(what: str, field: str, value: str | None = None) -> None:
            choice = getattr(choices, field)
            if choice is not None:
                rows.append((what, value or str(choice), why.get(field, "")))

        add("node", "node")
        if choices.template is not None:
            add("made from", "template", f"template {choices.template}, as a linked clone if possible")
        add("made from", "image", f"image {choices.image}, imported")
        form = f" ({choices.format})" if choices.format else ""
        add("disk", "storage", f"{choices.storage}{form}, {settings.disk} GiB")
        add("guest agent by", "snippets", f"a snippet on {choices.snippets}")
        add("bridge", "bridge")
        if choices.bridge is not None:
            dhcp = "dhcp" in settings.ipconfig
            reason = "only a VM that boots shows whether a server answers" if dhcp else ""
            address = "by DHCP" if dhcp else settings.ipconfig
            rows.append(("address", address, reason or settings.origin("ipconfig")))
        add("id", "vmid")
        size = f"{settings.cores} cores, {settings.memory / 1024:g} GiB memory"
        rows.append(("size", size, _origins(settings, "cores", "memory")))
        if settings.pool_parent:
            rows.append(("pool", f"{settings.pool_parent}/npve-RUN", settings.origin("pool_parent")))
        add("API", "transport")
        return rows

    def choices(self, choices: Choices, settings: Settings) -> None:
        """Write the choices of a run, each with its reason."""
        self._line()
        self._line("A run would use", bold=True)
        for what, value, why in self.rows(choices, settings):
            self._row("", what, f"{value}: {why}" if why else value)

    def to_do(self, findings: Sequence[tuple[Finding, list[str]]]) -> None:
        """Write the findings to act on, missing ones first, with commands as whole lines for copying."""
        rows = [row for row in findings if row[0].level in (MISSING, WARNING)]
        rows.sort(key=lambda row: row[0].level != MISSING)
        if not rows:
            return
        self._line()
        self._line("To do", bold=True)
        for number, (finding, commands) in enumerate(rows, 1):
            self.out.write(f"  {number}. ")
            self._line(finding.what, **_MARKUP[finding.level])
            self._paragraph(finding.advice or "Run:", 5)
            for command in commands:
                self._line(f"       {command}", cyan=True)

    def verdict(self, findings: Sequence[Finding], repeat: str, *, reached: bool) -> None:
        """Write the last lines; `repeat` is the command that runs the doctor once more."""
        count = Counter(finding.level for finding in findings)
        self._line()
        counts = [f"{count[MISSING]} missing"] if count[MISSING] else []
        counts += [f"{count[WARNING]} warning{'s' * (count[WARNING] != 1)}"] if count[WARNING] else []
        counts += [f"{count[UNKNOWN]} not checked"] if count[UNKNOWN] else []
        if not reached:
            text = f"this host cannot be used: {', '.join(counts)}"
            markup = _MARKUP[MISSING]
        elif count[MISSING]:
            text, markup = ", ".join(counts), _MARKUP[MISSING]
        else:
            rest = f", {', '.join(counts)}" if counts else ""
            text, markup = f"nothing is missing{rest}", {"green": True, "bold": True}
        self._paragraph(f"nested-pve doctor: {text}", 0, **markup)
        if count[MISSING]:
            self._line("then check again")
            self._line(f"       {repeat}", cyan=True)


def _origins(settings: Settings, *keys: str) -> str:
    origins = [f"{key}: {settings.origin(key)}" for key in keys if settings.origin(key) != "default"]
    return ", ".join(origins) or "default"
