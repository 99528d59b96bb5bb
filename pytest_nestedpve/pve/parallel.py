"""Work done several at a time, by threads that never hold the process up."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(function: Callable[[T], R], items: Sequence[T], width: int) -> list[R]:
    """`function` of each item, `width` at a time; the results in the order of the items.

    The first exception is raised once all are through. Who is interrupted while waiting here is not held up:
    no further item is begun, and threads still at work end with the process (those of concurrent.futures are
    joined when the interpreter exits, whatever happened before).
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        todo.put(index)
    results: dict[int, R] = {}
    errors: dict[int, BaseException] = {}
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            try:
                index = todo.get_nowait()
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
        over.set()
    if errors:
        raise errors[min(errors)]
    return [results[index] for index in range(len(items))]
