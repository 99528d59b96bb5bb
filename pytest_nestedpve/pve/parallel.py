"""Several calls at a time, by threads that never delay the end of the process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Sequence[T], width: int) -> list[R]:
    """`function` of all items, `width` at a time; the results in the order of the items.

    The first exception is raised once all calls have ended. An interrupt of the caller is raised at once: no
    further item is started, and running threads end with the process (the interpreter would join those of
    concurrent.futures when it exits).
    """
    pending: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        pending.put(index)
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    stopped = threading.Event()

    def work() -> None:
        while not stopped.is_set():
            try:
                index = pending.get_nowait()
            except queue.Empty:
                return
            try:
                results[index] = function(items[index])
            except BaseException as e:
                errors[index] = e

    threads = [
        threading.Thread(target=work, name=f"nested-pve-parallel-{n}", daemon=True)
        for n in range(min(width, len(items)))
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stopped.set()
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in range(len(items))]
