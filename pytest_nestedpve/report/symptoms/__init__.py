"""Known symptoms: words of a failed set-up, what they mean, and what mends it.

The tables are data, beside this module, and are read only when something failed. Knows nothing of hosts,
of pytest or of where the texts come from.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

#: Kinds of text: what the harness or PVE's answer says; a task's log; a playbook's output; what the guest's
#: serial console, journal and cloud-init say; configurations and states, which complain of nothing.
KINDS = ("error", "task", "ansible", "console", "journal", "cloud-init", "state")
#: The files of the table, the most specific symptoms first in each.
TABLES = ("host.toml", "guest.toml", "client.toml")
#: How many of those recognised are shown.
SHOWN = 3

_SAID = ("error", "task", "ansible")
_KEYS = {"name", "title", "pattern", "explanation", "fix", "source", "example", "kinds", "phases", "general"}
_TEXT_LIMIT = 300_000
_WORD = re.compile(r"[\w./:@+-]{1,120}\Z")


class TableError(ValueError):
    """An entry of the table cannot be used as it is."""


@dataclass(frozen=True)
class Symptom:
    """One entry: `pattern` (searched line by line, `^` is a line's start) in texts of the `kinds`.

    `fix` is a command or a setting; `{group}` in it and in `explanation` is a named group of the pattern.
    `phases`: recognised only when one of these failed; empty, in all. `general` ones, consequences of
    something else as often as not, come after the others. `example` is real text in which it is recognised.
    """

    name: str
    title: str
    pattern: re.Pattern[str]
    explanation: str
    fix: str
    source: str
    example: str
    kinds: tuple[str, ...] = _SAID
    phases: tuple[str, ...] = ()
    general: bool = False


@dataclass(frozen=True)
class Text:
    """Something in which symptoms are looked for: its kind, where it stands, and the words."""

    kind: str
    where: str
    words: str


@dataclass(frozen=True)
class Recognised:
    """A symptom that was seen: in which line, and where; `explanation` and `fix` are for this case."""

    symptom: Symptom
    line: str
    where: str
    explanation: str
    fix: str


@cache
def table() -> tuple[Symptom, ...]:
    """All entries, the most specific first. Raises TableError when one is not well-formed."""
    import tomllib

    found: list[Symptom] = []
    for name in TABLES:
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        found += [_entry(raw) for raw in tomllib.loads(text)["symptom"]]
    return tuple(sorted(found, key=lambda each: each.general))


def _entry(raw: dict[str, Any]) -> Symptom:
    name = raw.get("name", "?")
    if missing := {"name", "title", "pattern", "explanation", "fix", "source", "example"} - raw.keys():
        raise TableError(f"symptom {name}: {', '.join(sorted(missing))} is missing")
    if further := raw.keys() - _KEYS:
        raise TableError(f"symptom {name}: {', '.join(sorted(further))} is not known")
    kinds = tuple(raw.get("kinds", _SAID))
    if not set(kinds) <= set(KINDS):
        raise TableError(f"symptom {name}: expected kinds among {', '.join(KINDS)}; found {kinds}")
    try:
        pattern = re.compile(raw["pattern"], re.MULTILINE)
    except re.error as e:
        raise TableError(f"symptom {name}: {e}") from e
    words = {key: " ".join(str(raw[key]).split()) for key in ("title", "explanation", "fix", "source")}
    return Symptom(
        name=name,
        pattern=pattern,
        example=str(raw["example"]).strip("\n"),
        kinds=kinds,
        phases=tuple(raw.get("phases", ())),
        general=bool(raw.get("general", False)),
        **words,
    )


def recognise(texts: Iterable[Text], phase: str = "", *, most: int = SHOWN) -> tuple[Recognised, ...]:
    """What is recognised in `texts` of the failed `phase`, at most `most`, the most specific first.

    Of two equally specific the one in the earlier text comes first: hand the cause over before the logs.
    Never fails on a text, whatever is in it.
    """
    given = [(text, _readable(text.words)) for text in texts]
    found: list[tuple[tuple[bool, int, int], Recognised]] = []
    for place, symptom in enumerate(table()):
        if symptom.phases and phase not in symptom.phases:
            continue
        for nearness, (text, words) in enumerate(given):
            match = symptom.pattern.search(words) if text.kind in symptom.kinds else None
            if match is not None:
                found.append(((symptom.general, nearness, place), _seen(symptom, match, text.where)))
                break
    return tuple(each for _, each in sorted(found, key=lambda pair: pair[0])[:most])


def _seen(symptom: Symptom, match: re.Match[str], where: str) -> Recognised:
    # Commands are made of it: only what is one plain word gets into them.
    groups = {
        name: value if value and _WORD.match(value) else name.upper()
        for name, value in match.groupdict().items()
    }
    start = match.string.rfind("\n", 0, match.start()) + 1
    end = match.string.find("\n", match.end())
    line = match.string[start : end if end >= 0 else None].strip()
    if len(line) > 300:
        before = max(0, match.start() - start - 60)
        line = ("…" if before else "") + line[before : before + 300] + "…"
    explanation, fix = (_filled(text, groups) for text in (symptom.explanation, symptom.fix))
    return Recognised(symptom, " ".join(line.split()), where, explanation, fix)


def _filled(text: str, groups: dict[str, str]) -> str:
    for name, value in groups.items():
        text = text.replace("{" + name + "}", value)
    return text


def _readable(words: str) -> str:
    if len(words) > _TEXT_LIMIT:
        words = words[: _TEXT_LIMIT // 2] + "\n" + words[-_TEXT_LIMIT // 2 :]
    words = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", words.replace("\r\n", "\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", words)
