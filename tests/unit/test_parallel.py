"""Work in parallel threads; an interrupted caller does not wait for running threads."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

import pytest

from pytest_nestedpve.pve.parallel import in_parallel


def test_results_come_in_the_order_of_the_items_with_at_most_the_given_number_at_a_time() -> None:
    busy, most, lock, together = 0, 0, threading.Lock(), threading.Barrier(3)

    def work(item: int) -> int:
        nonlocal busy, most
        with lock:
            busy += 1
            most = max(most, busy)
        together.wait(10)
        with lock:
            busy -= 1
        return item * item

    assert in_parallel(work, range(9), 3) == [n * n for n in range(9)]
    assert most == 3
    assert in_parallel(work, [], 3) == []


def test_an_error_of_one_is_raised_after_the_others_end() -> None:
    done = []

    def work(item: int) -> None:
        if item == 0:
            raise KeyError("first")
        done.append(item)

    with pytest.raises(KeyError, match="first"):
        in_parallel(work, range(4), 2)
    assert sorted(done) == [1, 2, 3]


WAITS = r"""
import os, threading
from pytest_nestedpve.pve.parallel import in_parallel

def work(item):
    os.write(1, b"at work\n")
    threading.Event().wait()

in_parallel(work, range(4), 2)
"""


def test_an_interrupted_process_ends_although_its_threads_wait() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for _ in range(2):  # both threads: none is being started any more
                assert process.stdout.readline() == "at work\n"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in errors
