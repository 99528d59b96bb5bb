"""A value set in a user's YAML, at a path of keys; comments, order and mode are preserved."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.errors import PveError


class YamlPathError(PveError):
    """The value cannot be set at the path; the message never shows the file's content."""


def parse_path(path: str, node: str = "") -> tuple[str, ...]:
    """`api_tokens.{node}` as keys; `{node}` is replaced after the split, so its dots are no separators.

    Raises YamlPathError for an empty path or key.
    """
    keys = tuple(key.replace("{node}", node) for key in path.split("."))
    if not path or any(not key for key in keys):
        raise YamlPathError(f"expected keys joined by dots, such as api_tokens.{{node}}; found {path!r}")
    return keys


def set_value(text: str, keys: Sequence[str], value: Any) -> str:
    """`text`, a YAML document, with `value` at `keys`; missing maps are created.

    The text is unchanged if it has the value already. Raises YamlPathError if the text is no single YAML
    document, or if a key on the path holds no map.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap
    from ruamel.yaml.error import YAMLError

    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 1 << 20  # no folding of the user's long lines
    yaml.indent(**_indentation(text))
    # The library drops lines before the document (comments, directives, ---): they are preserved here.
    start = re.search(r"\A(?:[#%][^\n]*\n|[ \t]*\r?\n)*---(?=\s)[^\S\n]*(?:\n|\Z)", text)
    lead = text[: start.end()] if start else ""
    body = text[len(lead) :]
    try:
        document = yaml.load(body)
    except YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark is not None else ""
        # `from None`: the library's message quotes the line, which may hold a secret.
        raise YamlPathError(
            "expected one YAML document, found something else: "
            f"{getattr(e, 'problem', None) or 'not readable'}{where}"
        ) from None
    if document is None:
        document, lead = CommentedMap(), text
    place = document
    for depth, key in enumerate(keys):
        if not isinstance(place, dict):
            kind = "a list" if isinstance(place, list) else f"a {type(place).__name__}"
            raise YamlPathError(
                f"expected a map at {'.'.join(keys[:depth]) or 'the top'} to put {key} into, found {kind}"
            )
        actual = _actual_key(place, key)
        if depth == len(keys) - 1:
            if actual in place and place[actual] == value and type(place[actual]) is type(value):
                return text
            place[actual] = value
        else:
            if place.get(actual) is None:
                place[actual] = CommentedMap()
            place = place[actual]
    out = StringIO()
    yaml.dump(document, out)
    result = lead + ("\n" if lead and not lead.endswith("\n") else "") + out.getvalue()
    return result.replace("\r\n", "\n").replace("\n", "\r\n") if "\r\n" in text else result


def set_in_file(path: Path, keys: Sequence[str], value: Any) -> bool:
    """`set_value` in a file, replaced whole, with mode and owner preserved; a missing file is created, 0600.

    True if the file changed. A symbolic link is followed. Raises YamlPathError; OSError.
    """
    path = path.resolve()
    try:
        before = path.read_bytes().decode("utf-8")
        status = path.stat()
    except FileNotFoundError:
        before, status = "", None
    except UnicodeDecodeError as e:
        raise YamlPathError(f"{path}: expected UTF-8 text, found something else at byte {e.start}") from None
    try:
        after = set_value(before, keys, value)
    except YamlPathError as e:
        raise YamlPathError(f"{path}: {e}") from e
    if after == before:
        return False
    with local_file.replacement(path) as file:
        file.write(after.encode())
        if status is not None:
            os.fchmod(file.fileno(), status.st_mode & 0o7777)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), status.st_uid, status.st_gid)
    return True


def _actual_key(place: dict[Any, Any], key: str) -> Any:
    # A key such as 101 is a number in YAML: the existing key is used, no second one added.
    for existing in place:
        if existing != key and str(existing) == key:
            return existing
    return key


def _indentation(text: str) -> dict[str, int]:
    """The user's own indentation of maps and lists, so that other parts remain unchanged."""
    mapping, offset = 2, 0
    previous = ""
    for line in text.splitlines():
        bare = line.lstrip(" ")
        if not bare.strip() or bare.startswith("#"):
            continue
        depth, before = len(line) - len(bare), len(previous) - len(previous.lstrip(" "))
        if previous.partition(" #")[0].rstrip().endswith(":"):
            if bare.startswith("- ") and depth >= before:
                offset = max(offset, depth - before)
            elif depth > before and not previous.lstrip().startswith("- "):
                mapping = depth - before
        previous = line
    return {"mapping": mapping, "sequence": offset + 2, "offset": offset}
