"""Collecting artifacts in parallel, within limits, into files with secrets masked. Independent of hosts."""

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
"""Seconds (nominal) for all items together."""
ITEM = 10.0
"""Seconds (nominal) for one item."""
WIDTH = 4
"""Items fetched at a time. An item past its limit is abandoned and no longer counted."""
TEXT_LIMIT = 1 << 20
"""Characters of one text; the end is kept."""
DATA_LIMIT = 16 << 20
"""Bytes of one item that is no text."""
TOTAL_LIMIT = 48 << 20
"""Bytes of all files together."""

# The rest of a private key whose first lines were cut off.
_KEY_END = re.compile(r"\A(?:(?!-----BEGIN )[\s\S])*?-----END [A-Z0-9 ]*PRIVATE KEY-----")


class NotAvailable(Exception):
    """An item that cannot be fetched; the text is the reason."""


@dataclass(frozen=True)
class Item:
    """One item to fetch: the name of its file, its description, and its kind, one of symptoms.KINDS.

    `fetch` runs in its own thread and may be abandoned; it returns text or, for a picture, bytes.
    """

    file: str
    description: str
    kind: str
    fetch: Callable[[], str | bytes]
    limit: float = ITEM


@dataclass(frozen=True)
class Kept:
    """A written file of `size` bytes. `text` is its content, empty if that is no text."""

    file: str
    description: str
    kind: str
    size: int
    text: str = ""


@dataclass(frozen=True)
class Missing:
    """An item that could not be fetched, and why."""

    description: str
    reason: str


@dataclass(frozen=True)
class Collection:
    """The result: written files, missing items, and `seconds` of wall-clock time."""

    kept: tuple[Kept, ...]
    missing: tuple[Missing, ...]
    seconds: float


def collect(
    items: Iterable[Item], directory: Path, mask: Callable[[str], str], *, budget: float = BUDGET
) -> Collection:
    """Fetch the items and write them to `directory` (0700, files 0600), masked.

    Returns after at most `budget` seconds (nominal): an item that is not fetched by then is missing, and a
    later result is discarded. Raises no Exception of an item.
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
                file = _write(directory, item, outcome, mask, room)
            except OSError as error:
                outcome = error
            else:
                kept.append(file)
                room -= file.size
                continue
        missing.append(Missing(item.description, _format_reason(outcome, mask)))
    order = {item.file: number for number, item in enumerate(work.items)}
    kept.sort(key=lambda file: order[file.file])
    return Collection(tuple(kept), tuple(missing), time.monotonic() - started)


def _format_reason(error: BaseException, mask: Callable[[str], str]) -> str:
    text = str(error) or type(error).__name__
    if not isinstance(error, NotAvailable | OSError) and type(error).__module__ == "builtins":
        text = f"{type(error).__name__}: {text}"
    return " ".join(mask(text).split())[:300]


class _Work:
    """Threads that fetch items; a late one is abandoned."""

    def __init__(self, items: list[Item]) -> None:
        self.items = items
        self._changed = threading.Condition()
        self._ended: list[tuple[Item, str | bytes | BaseException]] = []

    def outcomes(self, deadline: Deadline) -> Iterable[tuple[Item, str | bytes | BaseException]]:
        """Each item once, when it is fetched, fails or is abandoned."""
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
                late = f"not fetched within the {deadline.limit:g} s for all files"
                for item in [*(item for item, _ in running.values()), *waiting]:
                    yield item, NotAvailable(late)
                return
            for item, outcome in self._wait(running, deadline):
                if running.pop(item.file, None) is not None:
                    yield item, outcome
            now = time.monotonic()
            for item in [item for item, until in running.values() if until <= now]:
                del running[item.file]
                yield item, NotAvailable(f"not fetched within {scaled(item.limit):g} s")

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
    text = ""
    if isinstance(data, str):
        # Masked before it is cut: half of a secret would not be masked.
        masked = mask(data)
        if "-----END " in masked:
            masked = _KEY_END.sub(f"[private key {MASK}]", masked)
        text = _end_of(masked)
        data = text.encode("utf-8", "replace")
    elif len(data) > DATA_LIMIT:
        raise OSError(f"it has {len(data)} bytes; expected at most {DATA_LIMIT}")
    if len(data) > room:
        raise OSError(f"the files of this failure would exceed {TOTAL_LIMIT >> 20} MiB")
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    local_file.write(directory / item.file, data)
    return Kept(item.file, item.description, item.kind, len(data), text)


def _end_of(text: str) -> str:
    if len(text) <= TEXT_LIMIT:
        return text
    end = text[-TEXT_LIMIT:]
    return f"[{len(text) - TEXT_LIMIT} characters before this are omitted]\n" + end[end.find("\n") + 1 :]
