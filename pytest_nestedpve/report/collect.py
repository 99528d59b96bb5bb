"""Fetching several things at once within limits, and keeping them as masked files. Knows no host."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pytest_nestedpve.pve import local_file
from pytest_nestedpve.pve.deadline import Deadline, scaled
from pytest_nestedpve.run.masking import MASK

BUDGET = 30.0
"""Seconds (nominal) for everything together."""
ITEM = 10.0
"""Seconds (nominal) for one thing."""
WIDTH = 4
"""Things fetched at a time. One that does not end within its limit is given up and takes no place."""
TEXT_LIMIT = 1 << 20
"""Bytes of one text: its end is what is kept."""
DATA_LIMIT = 16 << 20
"""Bytes of one thing that is no text."""
TOTAL_LIMIT = 48 << 20
"""Bytes of all."""

# A private key whose first line was cut off with what stood before it.
_KEY_END = re.compile(r"\A(?:(?!-----BEGIN )[\s\S])*?-----END [A-Z0-9 ]*PRIVATE KEY-----")


class NotThere(Exception):
    """There is no such thing to fetch; the text says why."""


@dataclass(frozen=True)
class Item:
    """One thing to fetch: the name of its file, what it is in words, its kind (as symptoms know it), how.

    `fetch` runs in a thread of its own and may be given up on; it returns text or, for a picture, bytes.
    """

    file: str
    what: str
    kind: str
    fetch: Callable[[], str | bytes]
    limit: float = ITEM


@dataclass(frozen=True)
class Kept:
    """A file that was written. `words`: what is in it, empty where that is no text."""

    file: str
    what: str
    kind: str
    size: int
    words: str = ""


@dataclass(frozen=True)
class Missing:
    """Something that could not be had, and why."""

    what: str
    why: str


@dataclass(frozen=True)
class Collection:
    """What came of it; `seconds` of wall-clock time."""

    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
    seconds: float


def collect(
    items: Iterable[Item], directory: Path, mask: Callable[[str], str], *, budget: float = BUDGET
) -> Collection:
    """Fetch the items and write what came into `directory` (0700, files 0600), masked.

    Returns after at most `budget` seconds (nominal), whatever hangs: what is not there by then is missing,
    and what comes later is not taken any more. Raises nothing but what ends the session.
    """
    started = time.monotonic()
    deadline = Deadline(budget)
    work = _Work(list(items))
    kept: list[Kept] = []
    missing: list[Missing] = []
    room = TOTAL_LIMIT
    for item, outcome in work.outcomes(deadline):
        if isinstance(outcome, str | bytes):
            try:
                one = _write(directory, item, outcome, mask, room)
            except OSError as error:
                outcome = error
            else:
                kept.append(one)
                room -= one.size
                continue
        missing.append(Missing(item.what, _why(outcome, mask)))
    order = {item.file: place for place, item in enumerate(work.items)}
    kept.sort(key=lambda one: order[one.file])
    return Collection(tuple(kept), tuple(missing), time.monotonic() - started)


def _why(error: BaseException, mask: Callable[[str], str]) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, NotThere | OSError) and type(error).__module__ == "builtins":
        text = f"{type(error).__name__}: {text}"
    return " ".join(mask(text).split())[:300]


class _Work:
    """Threads that fetch; whoever is late is not waited for."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self._changed = threading.Condition()
        self._ended: list[tuple[Item, str | bytes | BaseException]] = []

    def outcomes(self, deadline: Deadline) -> Iterable[tuple[Item, str | bytes | BaseException]]:
        """Each item once, as it ends or is given up on."""
        waiting = list(self.items)
        running: dict[str, tuple[Item, float]] = {}
        while waiting or running:
            while waiting and len(running) < WIDTH and not deadline.expired:
                item = waiting.pop(0)
                running[item.file] = (item, time.monotonic() + scaled(item.limit))
                threading.Thread(
                    target=self._run, args=(item,), name=f"nested-pve-{item.file}", daemon=True
                ).start()
            if deadline.expired:
                late = f"there was no time for it within {deadline.limit:g} s"
                for item in [*(each for each, _ in running.values()), *waiting]:
                    yield item, NotThere(late)
                return
            for item, outcome in self._wait(running, deadline):
                if running.pop(item.file, None) is not None:
                    yield item, outcome
            now = time.monotonic()
            for item in [each for each, until in running.values() if until <= now]:
                del running[item.file]
                yield item, NotThere(f"it did not come within {scaled(item.limit):g} s")

    def _wait(
        self, running: dict[str, tuple[Item, float]], deadline: Deadline
    ) -> list[tuple[Item, str | bytes | BaseException]]:
        soonest = min(until for _, until in running.values()) - time.monotonic()
        with self._changed:
            if not self._ended:
                self._changed.wait(max(0.01, min(soonest, deadline.remaining())))
            ended, self._ended = self._ended, []
        return ended

    def _run(self, item: Item) -> None:
        outcome: str | bytes | BaseException
        try:
            outcome = item.fetch()
        except BaseException as error:
            outcome = error
        with self._changed:
            self._ended.append((item, outcome))
            self._changed.notify()


def _write(directory: Path, item: Item, data: str | bytes, mask: Callable[[str], str], room: int) -> Kept:
    words = ""
    if isinstance(data, str):
        # Masked before it is cut: half a secret would not be known as one.
        masked = mask(data)
        if "-----END " in masked:
            masked = _KEY_END.sub(f"[private key {MASK}]", masked)
        words = _end_of(masked)
        data = words.encode("utf-8", "replace")
    elif len(data) > DATA_LIMIT:
        raise OSError(f"it has {len(data)} bytes; at most {DATA_LIMIT} are kept")
    if len(data) > room:
        raise OSError(f"the files of this failure have {TOTAL_LIMIT >> 20} MiB already")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    local_file.write(directory / item.file, data)
    return Kept(item.file, item.what, item.kind, len(data), words)


def _end_of(text: str) -> str:
    if len(text) <= TEXT_LIMIT:
        return text
    end = text[-TEXT_LIMIT:]
    return f"[{len(text) - TEXT_LIMIT} characters before this are left out]\n" + end[end.find("\n") + 1 :]
