"""How the doctor's look appears on a terminal, wide or narrow, with colours or without."""

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

_LOOKS: dict[str, dict[str, bool]] = {
    OK: {"green": True},
    WARNING: {"yellow": True, "bold": True},
    MISSING: {"red": True, "bold": True},
    UNKNOWN: {"light": True},
}
_LEVEL, _NAME = 9, 23  # widths of the first columns
_LEAST = 40


class View:
    """Writes lines to pytest's terminal; everything is masked on its way."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.masker = Masker()
        self.width = max(_LEAST, min(int(out.fullwidth), 110))
        self._open = False

    @classmethod
    @contextmanager
    def of(cls, config: pytest.Config) -> Iterator[View]:
        """On the terminal of a session."""
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
        # A path or an id is read, and copied, as a whole.
        lines = textwrap.wrap(" ".join(text.split()), room, break_long_words=False, break_on_hyphens=False)
        return lines or [""]

    def _row(self, label: str, name: str, text: str, **markup: bool) -> None:
        """A label in colour, a name, and a text beside them, or below where that leaves no room."""
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

    # -- what is told -------------------------------------------------------------------------------

    def title(self, host: str, origin: str) -> None:
        self._line()
        self.out.write("nested-pve doctor: ", bold=True)
        self._line(host, bold=True, cyan=True)
        said = f"named by {origin}; " if origin != "default" else ""
        self._paragraph(f"{said}this only looks: nothing is made, changed or started there", 0)
        self._line()

    def begin(self, name: str) -> None:
        """What is looked at now, for as long as that takes."""
        if self.out.hasmarkup:
            self._erase()
            self.out.write(f"  ...      {name}", light=True)
            self.out.flush()
            self._open = True

    def finding(self, finding: Finding) -> None:
        """One line, more where it is narrow."""
        text = f"expected {finding.expected}; found: {finding.actual}" if finding.expected else finding.actual
        self._row(finding.level, finding.what, text, **_LOOKS[finding.level])

    def note(self, text: str) -> None:
        self._row("note", "", text, light=True)

    def rows(self, choices: Choices, settings: Settings) -> list[tuple[str, str, str]]:
        """(what, value, why) of all that a run would use."""
        why = choices.why
        found: list[tuple[str, str, str]] = []

        def add(what: str, field: str, value: str | None = None) -> None:
            chosen = getattr(choices, field)
            if chosen is not None:
                found.append((what, value or str(chosen), why.get(field, "")))

        add("node", "node")
        if choices.template is not None:
            add("made from", "template", f"template {choices.template}, a linked clone where that can be")
        add("made from", "image", f"image {choices.image}, imported")
        form = f" ({choices.format})" if choices.format else ""
        add("disk", "storage", f"{choices.storage}{form}, {settings.disk} GiB")
        add("guest agent by", "snippets", f"a snippet on {choices.snippets}")
        add("bridge", "bridge")
        if choices.bridge is not None:
            dhcp = "dhcp" in settings.ipconfig
            reason = "only a VM that boots shows whether a server answers" if dhcp else ""
            address = "by DHCP" if dhcp else settings.ipconfig
            found.append(("address", address, reason or settings.origin("ipconfig")))
        add("id", "vmid")
        size = f"{settings.cores} cores, {settings.memory / 1024:g} GiB memory"
        found.append(("size", size, _origins(settings, "cores", "memory")))
        if settings.pool_parent:
            found.append(("pool", f"{settings.pool_parent}/npve-RUN", settings.origin("pool_parent")))
        add("API", "transport")
        return found

    def choices(self, choices: Choices, settings: Settings) -> None:
        """What a run would use, and why."""
        self._line()
        self._line("A run would use", bold=True)
        for what, value, why in self.rows(choices, settings):
            self._row("", what, f"{value}: {why}" if why else value)

    def to_do(self, findings: Sequence[tuple[Finding, list[str]]]) -> None:
        """Each thing to do with its commands, whole lines that can be copied."""
        rows = [row for row in findings if row[0].level in (MISSING, WARNING)]
        rows.sort(key=lambda row: row[0].level != MISSING)
        if not rows:
            return
        self._line()
        self._line("To do", bold=True)
        for number, (finding, commands) in enumerate(rows, 1):
            self.out.write(f"  {number}. ")
            self._line(finding.what, **_LOOKS[finding.level])
            self._paragraph(finding.advice or "By this:", 5)
            for command in commands:
                self._line(f"       {command}", cyan=True)

    def verdict(self, findings: Sequence[Finding], again: str, *, reached: bool) -> None:
        """The last lines."""
        count = Counter(each.level for each in findings)
        self._line()
        told = [f"{count[MISSING]} missing"] if count[MISSING] else []
        told += [f"{count[WARNING]} warning{'s' * (count[WARNING] != 1)}"] if count[WARNING] else []
        told += [f"{count[UNKNOWN]} not looked at"] if count[UNKNOWN] else []
        if not reached:
            text = f"the host cannot be used as it is: {', '.join(told)}"
            markup = _LOOKS[MISSING]
        elif count[MISSING]:
            text, markup = ", ".join(told), _LOOKS[MISSING]
        else:
            rest = f", {', '.join(told)}" if told else ""
            text, markup = f"nothing is missing{rest}", {"green": True, "bold": True}
        self._paragraph(f"nested-pve doctor: {text}", 0, **markup)
        if count[MISSING]:
            self._line("look again by")
            self._line(f"       {again}", cyan=True)


def _origins(settings: Settings, *keys: str) -> str:
    said = [f"{key}: {settings.origin(key)}" for key in keys if settings.origin(key) != "default"]
    return ", ".join(said) or "default"
