"""Invalid answers of a host: random changes of a valid one."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from hypothesis import strategies as st

# Without values such as "no" and 0: these would give another valid answer.
ODD: tuple[Any, ...] = (
    None, True, -1, 2**70, 1.5, float("inf"), "x", "\u00b2", "1" * 30, "\x1b[31mred", "a\0b", "../../etc",
    "; rm -rf /", "$(id)", "\ud800", "\u202e101", [], {}, [None], [[]], {"a": [{}]}, ["101"],
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in JSON data, the whole first."""
    paths = [path]
    if isinstance(value, dict):
        for key in value:
            paths += places(value[key], (*path, key))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            paths += places(item, (*path, number))
    return paths


def odd(chance: random.Random, truth: Any, *, without: bool = True, empty: bool = True) -> Any:
    """A valid answer with up to three values replaced, added, doubled, or (`without`) deleted.

    Unless `empty`, the whole answer is not replaced by an empty list.
    """
    answer = copy.deepcopy(truth)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(answer))
        value = copy.deepcopy(chance.choice(ODD))
        if not path:
            if chance.randrange(4) == 0 and (empty or value != []):
                return value
            if isinstance(answer, dict):
                answer[chance.choice(["vmid", "node", "lock", "x", "pool"])] = value
            elif isinstance(answer, list):
                answer.append(value)
            continue
        holder = answer
        for step in path[:-1]:
            holder = holder[step]
        how = chance.choice(["replace", "replace", "double", "take out" if without else "replace"])
        if how == "take out":
            del holder[path[-1]]
        elif how == "double" and isinstance(holder, list):
            holder.append(copy.deepcopy(holder[path[-1]]))
        else:
            holder[path[-1]] = value
    return answer


IN_FRONT = st.lists(
    st.sampled_from(
        [
            b"WARN: something is odd\n",
            b"perl: warning: Setting locale failed.\n\tLC_ALL = (unset)\n",
            b"trying to acquire lock...\n",
            b"transferred 1.0 GiB of 1.0 GiB (100.00%)\n",
            b"\x1b[33mwarning\x1b[0m\r\n",
            b"\xff\xfe\x80 bytes\n",
            b"\0\0\n",
            b"\xef\xbb\xbf",
            b"[]\n",
            b'{"half": ',
            b"UPID:father:00001037:0008381C:6B04D317:qmcreate:150:root@pam:\n",
        ]
    ),
    max_size=3,
)


@st.composite
def printed(draw: st.DrawFn, truth: Any) -> bytes:
    """Output of `pvesh`: odd data, with other lines in front, cut off, with bytes in between."""
    data = odd(random.Random(draw(st.integers(0, 2**32))), truth) if draw(st.booleans()) else truth
    text = json.dumps(data, ensure_ascii=draw(st.booleans()))
    raw = text.encode("utf-8", "surrogatepass")
    how = draw(st.sampled_from(["whole", "whole", "cut", "bytes", "twice", "key twice", "deep", "number"]))
    if how == "cut":
        raw = raw[: draw(st.integers(0, len(raw)))]
    elif how == "bytes":
        where = draw(st.integers(0, len(raw)))
        raw = raw[:where] + draw(st.sampled_from([b"\xff", b"\0", b"\x1b[2J", b"\xc3", b"\n"])) + raw[where:]
    elif how == "twice":
        raw += raw
    elif how == "key twice":
        raw = raw.replace(b'{"', b'{"vmid": 101, "vmid": 102, "type": "lxc", "', 1)
    elif how == "deep":
        depth = draw(st.sampled_from([50, 480, 990, 100_000]))
        raw = b"[" * depth + raw + b"]" * depth
    elif how == "number":
        raw = raw.replace(b"1", draw(st.sampled_from([b"NaN", b"1e999", b"-1", b"1" * 5000, b"0x1"])), 1)
    return b"".join(draw(IN_FRONT)) + raw + draw(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n"]))
