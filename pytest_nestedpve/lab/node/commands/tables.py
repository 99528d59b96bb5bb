"""Results in the formats of pvesh and pveum: text tables, json, json-pretty, yaml."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FORMATS = ("text", "json", "json-pretty", "yaml")


@dataclass(frozen=True)
class Style:
    """The values of a command's FORMAT_OPTIONS."""

    output: str = "text"
    border: bool = True
    header: bool = True
    human: bool = True
    quiet: bool = False
    unicode: bool = True


def unicode_locale() -> bool:
    for name in ("LC_ALL", "LC_CTYPE", "LANG"):
        if value := os.environ.get(name):
            return "utf-8" in value.lower() or "utf8" in value.lower()
    return False


def render(result: Any, style: Style, returns: Mapping[str, Any] | None = None) -> str:
    """The text for stdout, with its last newline; empty without a result."""
    if style.quiet or result is None:
        return ""
    if style.output == "json":
        return json_text(result) + "\n"
    if style.output == "json-pretty":
        text = json.dumps(
            _clean(result), sort_keys=True, indent=3, separators=(",", " : "), ensure_ascii=False
        )
        return text + "\n"
    if style.output == "yaml":
        return yaml_text(result)
    if isinstance(result, Mapping):
        return _object(result, style, returns or {})
    if isinstance(result, (list, tuple)):
        return _table(list(result), style, returns or {})
    return f"{result}\n"


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return int(value) if value.is_integer() else float(f"{value:.15g}")
    if isinstance(value, Mapping):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


def json_text(value: Any) -> str:
    return json.dumps(_clean(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


# -- tables


def size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1024 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.2f} {unit}"


def duration(seconds: int) -> str:
    text = ""
    for name, length in (("w", 604800), ("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            text += f"{seconds // length}{name} "
            seconds %= length
    return text + f"{seconds}s"


def _cell(value: Any, renderer: str | None, style: Style) -> str:
    if value is None:
        return ""
    if isinstance(value, (Mapping, list, tuple)):
        return json_text(value)
    if isinstance(value, bool):
        return "1" if value else "0"
    if style.human and renderer and isinstance(value, (int, float)):
        if renderer == "bytes":
            return size(value)
        if renderer == "fraction_as_percentage":
            return f"{value * 100:.2f}%"
        if renderer == "duration":
            return duration(int(value))
        if renderer.startswith("timestamp"):
            return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if isinstance(value, float):
        return f"{value:.15g}"
    return str(value)


def _object(result: Mapping[str, Any], style: Style, returns: Mapping[str, Any]) -> str:
    known = returns.get("p") or {}
    rows = []
    for key in sorted(result):
        rows.append([key, _cell(result[key], known.get(key, {}).get("renderer"), style)])
    return draw(["key", "value"], rows, style)


def _table(result: Sequence[Any], style: Style, returns: Mapping[str, Any]) -> str:
    if not result:
        return ""
    if not isinstance(result[0], Mapping):
        return "".join(f"{item}\n" for item in result)
    known: Mapping[str, Any] = returns.get("p") or {}
    if known:
        columns = sorted(key for key in known if not known[key].get("optional"))
        columns += sorted(key for key in known if known[key].get("optional"))
    else:
        columns = sorted({key for row in result for key in row})
    right = {key for key in columns if known.get(key, {}).get("number")}
    first = columns[0]
    numeric = first in right
    ordered = sorted(result, key=lambda row: (row.get(first) or 0) if numeric else str(row.get(first) or ""))
    rows = [
        [_cell(row.get(key), known.get(key, {}).get("renderer"), style) for key in columns] for row in ordered
    ]
    return draw(columns, rows, style, right)


def draw(
    columns: Sequence[str], rows: Sequence[Sequence[str]], style: Style, right: set[str] | None = None
) -> str:
    """The text of a table. Cells may have several lines."""
    right = right or set()
    split = [[cell.split("\n") if cell else [""] for cell in row] for row in rows]
    widths = [
        max([len(name) if style.header else 0, *(len(line) for row in split for line in row[n])])
        for n, name in enumerate(columns)
    ]

    def pad(text: str, n: int) -> str:
        if columns[n] in right:
            return text.rjust(widths[n])
        return text if not style.border and n == len(columns) - 1 else text.ljust(widths[n])

    if not style.border:
        lines = [" ".join(pad(name, n) for n, name in enumerate(columns))] if style.header else []
        for row in split:
            for height in range(max(len(cell) for cell in row)):
                cells = [cell[height] if height < len(cell) else "" for cell in row]
                lines.append(" ".join(pad(text, n) for n, text in enumerate(cells)))
        return "".join(line + "\n" for line in lines)
    v, h, hh, tops, mids, doubles, bottoms = (
        ("│", "─", "═", "┌┬┐", "├┼┤", "╞╪╡", "└┴┘")
        if style.unicode
        else ("|", "-", "=", "+++", "+++", "+++", "+++")
    )

    def rule(ends: str, line: str) -> str:
        return ends[0] + ends[1].join(line * (width + 2) for width in widths) + ends[2]

    def row_text(cells: Sequence[str]) -> str:
        return v + v.join(f" {pad(text, n)} " for n, text in enumerate(cells)) + v

    lines = [rule(tops, h)]
    if style.header:
        lines += [row_text(columns), rule(doubles, hh)]
    for number, row in enumerate(split):
        if number:
            lines.append(rule(mids, h))
        for height in range(max(len(cell) for cell in row)):
            lines.append(row_text([cell[height] if height < len(cell) else "" for cell in row]))
    lines.append(rule(bottoms, h))
    return "".join(line + "\n" for line in lines)


# -- yaml


def yaml_text(value: Any) -> str:
    """YAML in the form of libyaml's emitter."""
    value = _clean(value)
    if isinstance(value, Mapping):
        return "--- {}\n" if not value else "---\n" + _yaml_map(value, "")
    if isinstance(value, list):
        return "--- []\n" if not value else "---\n" + _yaml_list(value, "")
    return f"--- {_scalar(value, '')}\n"


def _yaml_map(value: Mapping[str, Any], indent: str) -> str:
    text = ""
    for key in sorted(value):
        item = value[key]
        name = f"{indent}{_scalar(key, indent)}:"
        if isinstance(item, Mapping):
            text += f"{name} {{}}\n" if not item else f"{name}\n" + _yaml_map(item, indent + "  ")
        elif isinstance(item, list):
            text += f"{name} []\n" if not item else f"{name}\n" + _yaml_list(item, indent)
        else:
            text += f"{name} {_scalar(item, indent)}\n"
    return text


def _yaml_list(value: list[Any], indent: str) -> str:
    text = ""
    for item in value:
        if isinstance(item, Mapping) and item:
            body = _yaml_map(item, indent + "  ")
            text += f"{indent}- {body[len(indent) + 2 :]}"
        elif isinstance(item, list) and item:
            body = _yaml_list(item, indent + "  ")
            text += f"{indent}- {body[len(indent) + 2 :]}"
        else:
            plain = (
                "{}"
                if isinstance(item, Mapping)
                else "[]"
                if isinstance(item, list)
                else _scalar(item, indent)
            )
            text += f"{indent}- {plain}\n"
    return text


def _scalar(value: Any, indent: str) -> str:
    if value is None:
        return "~"
    if not isinstance(value, str):
        return str(value)
    if "\n" in value:
        lines = value.split("\n")
        mark = "|" if value.endswith("\n") else "|-"
        body = lines[:-1] if value.endswith("\n") else lines
        return mark + "".join("\n" + (indent + "  " + line if line else "") for line in body)
    number = re.fullmatch(r"[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?", value)
    special = value.lower() in ("", "~", "null", "true", "false", "yes", "no", "on", "off", "y", "n")
    awkward = re.search(r"^[\s\-?:,\[\]{}#&*!|>'\"%@`]|: |\s#|[:\s]$", value) and not re.match(r"-\S", value)
    if number or special or awkward or value.startswith("="):
        return "'" + value.replace("'", "''") + "'"
    return value
