"""Known symptoms: patterns in the texts of a failure, each with an explanation and a fix.

The tables are TOML files in this directory, read only after a failure. Independent of hosts and of pytest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

#: Kinds of text: messages of this plugin or of PVE; a task's log; a playbook's output; the guest's serial
#: console, journal and cloud-init logs; configurations and states, which contain no messages.
KINDS = ("error", "task", "ansible", "console", "journal", "cloud-init", "state")
#: The files of the table, the most specific symptoms first in each.
TABLES = ("host.toml", "guest.toml", "client.toml")
#: Number of recognised symptoms that are shown.
SHOWN = 3

_MESSAGES = ("error", "task", "ansible")
_KEYS = {"name", "title", "pattern", "explanation", "fix", "source", "example", "kinds", "phases", "general"}
_TEXT_LIMIT = 300_000
_WORD = re.compile(r"[\w./:@+-]{1,120}\Z")


class TableError(ValueError):
    """An entry of the table is not well-formed."""


@dataclass(frozen=True)
class Symptom:
    """One entry: `pattern` (searched line by line, `^` is a line's start) in texts of the `kinds`.

    `fix` is a command or a setting; `{group}` in it and in `explanation` is a named group of the pattern.
    `phases`: recognised only after one of these failed; empty: after any. A `general` symptom, often only a
    consequence of another, comes after the others. `example` is real text that the pattern matches.
    """

    name: str
    title: str
    pattern: re.Pattern[str]
    explanation: str
    fix: str
    source: str
    example: str
    kinds: tuple[str, ...] = _MESSAGES
    phases: tuple[str, ...] = ()
    general: bool = False


@dataclass(frozen=True)
class Text:
    """A text to search for symptoms: its kind, its source (such as a file name), and its content."""

    kind: str
    where: str
    content: str


@dataclass(frozen=True)
class Recognised:
    """A recognised symptom: its line, the source `where`, and `explanation` and `fix` for this case."""

    symptom: Symptom
    line: str
    where: str
    explanation: str
    fix: str


@cache
def table() -> tuple[Symptom, ...]:
    """All entries, the most specific first. Raises TableError when one is not well-formed."""
    import tomllib

    entries: list[Symptom] = []
    for name in TABLES:
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        entries += [_parse(raw) for raw in tomllib.loads(text)["symptom"]]
    return tuple(sorted(entries, key=lambda symptom: symptom.general))


def _parse(raw: dict[str, Any]) -> Symptom:
    name = raw.get("name", "?")
    if missing := {"name", "title", "pattern", "explanation", "fix", "source", "example"} - raw.keys():
        raise TableError(f"symptom {name}: {', '.join(sorted(missing))} is missing")
    if unknown := raw.keys() - _KEYS:
        raise TableError(f"symptom {name}: {', '.join(sorted(unknown))} is unknown")
    kinds = tuple(raw.get("kinds", _MESSAGES))
    if not set(kinds) <= set(KINDS):
        raise TableError(f"symptom {name}: expected kinds among {', '.join(KINDS)}; found {kinds}")
    try:
        pattern = re.compile(raw["pattern"], re.MULTILINE)
    except re.error as e:
        raise TableError(f"symptom {name}: {e}") from e
    texts = {key: " ".join(str(raw[key]).split()) for key in ("title", "explanation", "fix", "source")}
    return Symptom(
        name=name,
        pattern=pattern,
        example=str(raw["example"]).strip("\n"),
        kinds=kinds,
        phases=tuple(raw.get("phases", ())),
        general=bool(raw.get("general", False)),
        **texts,
    )


def recognise(texts: Iterable[Text], phase: str = "", *, most: int = SHOWN) -> tuple[Recognised, ...]:
    """The symptoms in `texts` of the failed `phase`, at most `most`, the most specific first.

    Of two equally specific symptoms the one in the earlier text comes first: pass the cause before the logs.
    No text makes it fail.
    """
    readable = [(text, _clean(text.content)) for text in texts]
    ranked: list[tuple[tuple[bool, int, int], Recognised]] = []
    for number, symptom in enumerate(table()):
        if symptom.phases and phase not in symptom.phases:
            continue
        for distance, (text, content) in enumerate(readable):
            match = symptom.pattern.search(content) if text.kind in symptom.kinds else None
            if match is not None:
                ranked.append(((symptom.general, distance, number), _describe(symptom, match, text.where)))
                break
    return tuple(recognised for _, recognised in sorted(ranked, key=lambda pair: pair[0])[:most])


def _describe(symptom: Symptom, match: re.Match[str], where: str) -> Recognised:
    # The values become part of commands: only one plain word is inserted.
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
    explanation, fix = (_fill(text, groups) for text in (symptom.explanation, symptom.fix))
    return Recognised(symptom, " ".join(line.split()), where, explanation, fix)


def _fill(text: str, groups: dict[str, str]) -> str:
    for name, value in groups.items():
        text = text.replace("{" + name + "}", value)
    return text


def _clean(content: str) -> str:
    if len(content) > _TEXT_LIMIT:
        content = content[: _TEXT_LIMIT // 2] + "\n" + content[-_TEXT_LIMIT // 2 :]
    content = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", content.replace("\r\n", "\n"))
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", content)
