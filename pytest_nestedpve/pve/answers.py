"""Parsers for the output of `pvesh`, whose last line is the answer, and for values in answers."""

from __future__ import annotations

import json
import re
import reprlib
from typing import Any

from pytest_nestedpve.pve.errors import UnreadableAnswer, is_noise, plain

# No separators of paths, shells, URLs or terminals: a UPID becomes part of a path.
_PART = r"[\w.@+=%,~!-]"
UPID = re.compile(
    r"UPID:(?P<node>[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?):(?P<pid>[0-9A-Fa-f]{8}):"
    r"(?P<pstart>[0-9A-Fa-f]{8,9}):(?P<starttime>[0-9A-Fa-f]{8}):(?P<type>[A-Za-z0-9_-]{1,64}):"
    rf"(?P<id>{_PART}{{0,255}}):(?P<user>{_PART}{{1,255}}):"
)
_UPID_AT_END = re.compile(rf"(?P<quote>\"?)(?P<upid>{UPID.pattern})(?P=quote)\Z")
_SHOWN = 300
_UPID_LIMIT = 1000
STORAGE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._-]*\Z")
# Printed by a change of a configuration before its answer, which is empty for `set` (recording config-022);
# the values in it may contain line ends.
_CHANGE = re.compile(r"update (?:VM|CT) \d+: ")


def read_answer(text: str, *, call: str = "", secret: bool = False) -> Any:
    """The data in the standard output of a `pvesh … --output-format json` that exited with 0.

    Seen in recordings of PVE 9.2.11: nothing at all or only warnings (no data), JSON on one line, warnings
    or the task's own log before it, a UPID bare or quoted, even behind a log line without its newline.
    Raises UnreadableAnswer, and nothing else, for all other output; half an answer is not interpreted.
    """
    # Unchanged first: a part of a string may look like a control sequence.
    is_json, answer = _data(text.strip())
    if is_json:
        return _of_another_node(answer)
    clean = plain(text).strip()
    if not clean:
        return None
    is_json, answer = _data(clean)
    if is_json:
        return answer
    upid = _UPID_AT_END.search(clean.rpartition("\n")[2].rstrip()[-_UPID_LIMIT:])
    if upid is not None:
        return upid["upid"]
    if _CHANGE.match(clean) or is_noise(clean):
        return None
    half = _SHOWN // 2
    shown = clean if len(clean) <= _SHOWN else f"{clean[:half]} […] {clean[-half:]}"
    if secret:
        shown = "(not shown: it may hold a secret)"
    raise UnreadableAnswer(
        f"expected JSON on the last line, found {len(clean)} characters that end without it: {shown!r}",
        call=call,
    )


def _of_another_node(answer: Any) -> Any:
    """The answer of a call that PVE passed on to another node of the cluster.

    It may be the whole output of its task there as one string, without line ends (recording cluster-052):
    the UPID at the end of that, or no data.
    """
    if not isinstance(answer, str):
        return answer
    upid = _UPID_AT_END.search(answer.rstrip()[-_UPID_LIMIT:])
    if upid is not None and upid["quote"]:
        return upid["upid"]
    return None if _CHANGE.match(answer) else answer


def _data(text: str) -> tuple[bool, Any]:
    """Whether a text, or its last line, is JSON; and the data."""
    for candidate in (text, text.rpartition("\n")[2]):
        try:
            return True, checked(json.loads(candidate, parse_constant=_refuse))
        except (ValueError, RecursionError):
            continue
    return False, None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def checked(data: Any) -> Any:
    """The data of JSON with strings that can be encoded."""
    # A lone surrogate (\ud800) is valid JSON, but cannot be encoded as UTF-8.
    if isinstance(data, str):
        return data if data.isascii() else data.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(data, list):
        return [checked(item) for item in data]
    if isinstance(data, dict):
        return {checked(key): checked(value) for key, value in data.items()}
    return data


def entries(answer: Any, *, call: str = "", strict: bool = False) -> list[dict[str, Any]]:
    """The answer as a list of objects; other items are left out, or, if `strict`, an error.

    Raises UnreadableAnswer when it is no list: PVE answers `[]` for an empty one (recorded), so no data is
    not an empty list.
    """
    if not isinstance(answer, list):
        raise UnreadableAnswer(f"expected a list, found {shown(answer)}", call=call)
    objects = [item for item in answer if isinstance(item, dict)]
    if strict and len(objects) != len(answer):
        odd = next(item for item in answer if not isinstance(item, dict))
        raise UnreadableAnswer(f"expected a list of objects, found {shown(odd)} in it", call=call)
    return objects


def mapping(answer: Any, *, call: str = "") -> dict[str, Any]:
    """The answer as an object; raises UnreadableAnswer for other data."""
    if not isinstance(answer, dict):
        raise UnreadableAnswer(f"expected an object, found {shown(answer)}", call=call)
    return answer


def shown(value: Any) -> str:
    """The beginning of a value of any size and depth, for a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = _SHOWN
    short.maxlevel, short.maxlist, short.maxdict = 3, 4, 6
    return short.repr(value)[:_SHOWN]


def whole(value: Any) -> int | None:
    """An integer in any form that PVE uses (7, "7"); None for other values."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    return None


def flag(value: Any) -> bool:
    """A PVE boolean: 1, "1", true, "yes", "on" are true, all other values are false."""
    return value is True or (not isinstance(value, bool) and str(value).lower() in ("1", "true", "yes", "on"))


def text(value: Any) -> str | None:
    """A non-empty string, or None; numbers become text (the name of a VM may be 7)."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return str(value)
    return value if isinstance(value, str) and value else None
