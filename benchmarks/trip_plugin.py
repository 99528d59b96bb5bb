"""A pytest plugin that saves data of a round trip beyond its audit log, read from the lab's nodes.

Loaded by `-p benchmarks.trip_plugin`; BENCH_LAB names the lab, BENCH_OUT a directory for the files.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import labs

# Prints moments on the guest, one per line: the name and epoch seconds.
MOMENTS = r"""
[ -e /run/cloud-init/result.json ] && echo "cloud-init $(stat -c %.6Y /run/cloud-init/result.json)"
journalctl -q -b -u ssh -o short-unix --no-pager 2>/dev/null |
    sed -n "s/^\([0-9.]*\) .*Accepted publickey.*/login \1/p" | head -1
for unit in qemu-guest-agent ssh networking systemd-networkd pveproxy; do
    journalctl -q -b -u $unit -o short-unix --no-pager 2>/dev/null |
        sed -n "s/^\([0-9.]*\) .*systemd\[1\]: Started .*/$unit \1/p" | head -1
done
true
"""
TASKS = r"find /var/log/pve/tasks -type f -name 'UPID:*' -printf '%f %T@\n' 2>/dev/null; true"
COMMANDS = "cat /var/log/nestedpve-lab-commands.log 2>/dev/null; true"
AFTER = {"wait_ip": "nested", "ensure_pve": "nested", "leaf_wait_ip": "leaf"}


def _save(name: str, node: str, script: str) -> None:
    text = labs.run_on(os.environ["BENCH_LAB"], "sh", "-c", script, node=node)
    (Path(os.environ["BENCH_OUT"]) / name).write_text(text)


@pytest.hookimpl(optionalhook=True)
def pytest_nestedpve_phase_finished(phase: Any) -> None:
    """Save moments of the guest between two phases, so that it counts for neither."""
    if phase.name in AFTER:
        _save(f"moments-{phase.name}", AFTER[phase.name], MOMENTS)


def pytest_configure() -> None:
    """Save tasks and started commands of the nested PVE before it is destroyed."""
    from pytest_nestedpve.teardown import teardown

    destroy_run = teardown.destroy_run

    @functools.wraps(destroy_run)
    def save_and_destroy(*args: Any, **kwargs: Any) -> Any:
        _save("tasks-nested", "nested", TASKS)
        _save("commands-nested", "nested", COMMANDS)
        return destroy_run(*args, **kwargs)

    teardown.destroy_run = save_and_destroy
